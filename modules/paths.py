"""Paths as users write them: which can name a file, and the usual mistakes in those that name none.

Standard library only.
"""

import os
import re
from pathlib import Path

from modules.addresses import is_address

MOST_OF_NAME, MOST_OF_PATH = 255, 4096  # bytes, characters; no file system takes more
QUOTES = tuple("\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb")
NOTHING = ("none", "null", "nil")  # as people write it; an option or a key is left out
_HUB = re.compile(r"(?:hf|huggingface|hub):(?!\\)", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:[\w\\/]")
# a whole part of a path
_VARIABLE = re.compile(r"(?<![^\\/])(?:\$\{\w+\}|\$(?:env:)?[A-Za-z_]\w*|%[A-Za-z_]\w*%)(?![^\\/.])")


def expand_path(text: str, base: Path | None = None) -> Path:
    """Return the path with `~` resolved; a relative one is in the folder `base`.

    Raises ValueError, saying why, if no file can have that name.
    """
    if "\0" in text:
        raise ValueError("it holds the character NUL (\\u0000), which no file's name can have")
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise ValueError("there is no such user. Write the path out") from None
    path = path if base is None else base / path
    check_length(path)
    return path


def check_length(path: Path) -> None:
    """Raise ValueError if no file can have so long a name."""
    if len(os.fsencode(path)) > MOST_OF_NAME:  # else no part is longer
        longest = max(len(os.fsencode(part)) for part in path.parts)
        if longest > MOST_OF_NAME or len(str(path)) > MOST_OF_PATH:
            raise ValueError("no file has so long a name. Give the path of a file")


def path_exists(path: Path) -> bool:
    """Return as `Path.exists`; False too if no file can have that name, where it may raise OSError."""
    return os.path.exists(path)  # noqa: PTH110


def explain_path(text: str) -> str | None:
    """Return why a path that names nothing is no path, if it shows a usual mistake.

    These are an address, quotation marks, a variable, a pattern and another system's path. The result follows
    the path in a message and ends without a full stop.
    """
    if is_address(text) or _HUB.match(text):
        return "this is an address. Download the file first and give its path"
    if text.startswith(QUOTES) or text.endswith(QUOTES):
        plain = text.strip("".join(QUOTES))
        return f'quotation marks are part of this path. Write it with straight ones around: "{plain}"'
    if text.strip().lower() in NOTHING:
        return "this names nothing, and is taken for a path. Leave it out"
    if text != text.strip():
        return "this path begins or ends with a blank. Remove it"
    found = _VARIABLE.search(text)
    if found is not None and not path_exists(Path(text[: found.end()])):
        return (
            f"{found[0]} is no folder, and no variable was put in its place. Bash and PowerShell replace "
            "$NAME outside of single quotes, cmd replaces %NAME%. Set it, or write the path out"
        )
    if os.name != "nt" and _DRIVE.match(text):
        return "this is a path of Windows. Here (in WSL) C: is /mnt/c, and folders are parted by /"
    return None


def explain_missing(path: Path) -> str:
    """Return a hint, which begins with a blank, about a path that names nothing; "" if there is none.

    `$MODELS/wan.safetensors` is `/wan.safetensors` if the variable is not set.
    """
    if path.is_absolute() and path.parent == Path(path.anchor):
        return f" It is at the very top, in {path.anchor}: is a variable that stood before it not set?"
    if any(mark in str(path) for mark in "*?"):
        return " A pattern that fits no file stays as it is, and some shells replace none."
    return ""
