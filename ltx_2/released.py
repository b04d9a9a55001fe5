"""Files as LTX-2 is released: one with all parts, or diffusers' folders; and the settings next to tensors."""

from collections.abc import Mapping
from typing import Any

from checkpoints.dits import OTHER_NETWORKS
from checkpoints.encoders import declared_settings
from checkpoints.opening import Checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json

CONFIG = "config"  # key of the metadata: settings of all parts, as JSON


def select_part(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Return one part of an official file, without its name prefix; return other files unchanged."""
    return checkpoint.without_prefix(prefix, ignored_prefixes=("model.", *OTHER_NETWORKS))


def read_settings(checkpoint: Checkpoint, part: str, class_name: str) -> Mapping[str, Any]:
    """Return the settings of a part in the file's metadata, else in config.json next to it; {} if neither.

    Args:
        checkpoint: The open file.
        part: Name of the part; "" if the file contains only this part.
        class_name: Class of the part in diffusers, which its config.json names.

    Raises:
        CheckpointError: If the settings cannot be read.
    """
    try:
        settings = parse_json(checkpoint.metadata.get(CONFIG, "{}"))
        settings = (settings.get(part) if part else settings) or {}
        if not isinstance(settings, dict):
            raise TypeError(f"{part}: {settings!r:.40}")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the settings in its metadata cannot be read ({error}). Copy the file again.",
            checkpoint.path,
        ) from error
    if settings:
        return settings
    _, declared = declared_settings(checkpoint, {class_name})  # config.json
    return declared
