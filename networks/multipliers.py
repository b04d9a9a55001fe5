"""Parse LoRA files with a multiplier after a colon. Standard library only."""

import math
from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError
from modules.paths import explain_missing


def files_with_multipliers(option: str, texts: Sequence[Path]) -> list[tuple[Path, float]]:
    """Split each string `FILE[:MULTIPLIER]` into a path and a multiplier.

    Args:
        option: Option that sets the strings, for messages.
        texts: The strings.

    Raises:
        OptionError: If a file is missing or a multiplier is not finite.
    """
    files_and_multipliers = [split_multiplier(option, text) for text in texts]
    for path, _ in files_and_multipliers:
        if not path.exists():
            raise OptionError(
                f"{option} {path}: no such file.{explain_missing(path)} Pass the path of an existing file"
            )
    return files_and_multipliers


def split_multiplier(option: str, text: Path) -> tuple[Path, float]:
    r"""Split `FILE:0.8` into a path and a multiplier (1 if there is no number).

    The colon of a drive (`C:\x`) belongs to the path, because no number follows it.
    """
    name, colon, number = str(text).rpartition(":")
    if not colon or text.exists():  # a file name may contain a colon itself
        return text, 1.0
    try:
        multiplier = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(multiplier):
        raise OptionError(f"{option} {text}: the multiplier is {number}; pass a finite number")
    return Path(name), multiplier
