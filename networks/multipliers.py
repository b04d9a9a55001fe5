"""Files of LoRAs with a multiplier behind a colon. Standard library only."""

import math
from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError
from modules.paths import explain_missing


def files_with_multipliers(option: str, texts: Sequence[Path]) -> list[tuple[Path, float]]:
    """Return the file and the multiplier of each `FILE[:MULTIPLIER]`.

    option: that they are from. Raises OptionError if a file is missing or a multiplier is not finite.
    """
    files = [split_multiplier(option, text) for text in texts]
    for path, _ in files:
        if not path.exists():
            raise OptionError(
                f"{option} {path}: no such file.{explain_missing(path)} Give the path of an existing one"
            )
    return files


def split_multiplier(option: str, text: Path) -> tuple[Path, float]:
    r"""Split `FILE:0.8`; the multiplier is 1 without a number. A drive's colon (C:\x) belongs to the name."""
    name, colon, number = str(text).rpartition(":")
    if not colon or text.exists():
        return text, 1.0
    try:
        multiplier = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(multiplier):
        raise OptionError(f"{option} {text}: the multiplier is {number}; give a finite number")
    return Path(name), multiplier
