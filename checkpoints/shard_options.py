"""File names of sharded models, and maximum sizes as users type them.

Standard library only.
"""

import re
from pathlib import Path

from modules.errors import OptionError

INDEX = ".index.json"  # suffix of an index, after the name of the single file
MODEL = "diffusion_pytorch_model.safetensors"  # diffusers' name of a transformer's single file
MAX_SHARDS = 99_999  # their names have five digits
MIN_SHARD_BYTES = 1000
_SIZE = re.compile(r"(?P<number>\d{1,12}(\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def read_shard_size(option: str, text: str) -> int:
    """Parse a size such as 5GB, 500MB or 2GiB into bytes.

    Raises:
        OptionError: If the text is not a valid size.
    """
    match = _SIZE.fullmatch(text.strip())
    base = 1024 if match is not None and match["binary"] else 1000
    size = 0 if match is None else int(float(match["number"]) * base ** _POWERS[match["unit"].lower()])
    if size < MIN_SHARD_BYTES:
        raise OptionError(f"{option} {text}: pass a size such as 5GB or 500MB")
    return size


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder contains a diffusers transformer, as one file or as shards with an index."""
    return any((folder / name).is_file() for name in (MODEL, f"{MODEL}{INDEX}"))
