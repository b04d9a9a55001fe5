"""Print the metadata of a safetensors file."""

import json
import sys
from pathlib import Path
from typing import Any

from modules.control_codes import escape_control_codes
from modules.errors import CheckpointError
from modules.limits import MAX_DEPTH
from modules.options import Options, option
from modules.text_files import read_safetensors_texts


class ShowMetadataOptions(Options, title="what to do"):
    """Options of tools/show_metadata.py."""

    model: Path = option("safetensors file of a model or a LoRA", place="file", required=True, by_place=True)


def show_metadata(options: ShowMetadataOptions) -> None:
    """Print the metadata of a safetensors file as JSON. JSON values are printed as objects.

    Raises:
        CheckpointError: If the file cannot be read as safetensors.
    """
    path = options.model
    try:
        metadata = read_safetensors_texts(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {error}. Files of torch (.ckpt, .pt) contain no metadata, "
            "and blissful_tuner/metaview.py shows those of images and videos.",
            path,
        ) from error
    if not metadata:
        sys.stderr.write(f"{escape_control_codes(str(path))} contains no metadata\n")
    values = {name: _parse_value(text) for name, text in sorted(metadata.items())}
    text = json.dumps(values, indent=2, ensure_ascii=False)
    sys.stdout.write(f"{escape_control_codes(text)}\n")


def _parse_value(text: str) -> Any:
    """Parse a metadata value if it is a JSON object or list; return any other value unchanged."""
    if not text.startswith(("{", "[")) or text.count("{") + text.count("[") > MAX_DEPTH**2:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
