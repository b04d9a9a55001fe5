"""Options of tools/pack.py and tools/unpack.py, and what both know about a packed file.

Standard library only.
"""

from pathlib import Path, PurePosixPath

from modules.control_codes import escape_control_codes
from modules.options import Options, option
from modules.output_files import check_place, find_error_on_windows
from project.options import MODELS

MANIFEST = "reelsmith.json"  # member of a packed file with its format and modification times
VERSION = 1
# first part of a model's path in a packed run.toml; `unpack` puts its own folder of models there
ARCHIVE_MODEL_FOLDER = "models"
MAX_NAME_BYTES = 1000  # maximum bytes of a file name


class PackOptions(Options):
    """Options of `pack`: the folder, and where to write the archive."""

    folder: Path = option(
        "folder that `new` described", positional=True, place="folder", hint="the folder that `new` described"
    )
    output: Path | None = option("file to write (default: FOLDER-pack.zip next to the folder)", flags=("-o",))
    with_state: bool = option(
        "take the newest state of the training along too, to continue it on the other machine"
    )
    overwrite: bool = option("replace the file if it exists")

    def __post_init__(self) -> None:
        if self.output is not None:
            check_place("--output", self.output)


class UnpackOptions(Options):
    """Options of `unpack`: the archive, and the folder to unpack it into."""

    file: Path = option("file that `pack` wrote", positional=True, place="file")
    folder: Path | None = option(
        "folder to make (default: the name of the packed one, here)", positional=True, nargs="?"
    )
    models: Path = option("folder of models on this machine, which `run --download` fills", default=MODELS)


def find_name_error(name: str, on_windows: bool) -> str:
    """Return why a file name is not allowed in an archive; "" if it is.

    `name` is the path within the folder, with forward slashes. With `on_windows`, names that only Windows
    forbids are rejected, too.
    """
    parts = PurePosixPath(name).parts
    if _leads_outside(name):
        return "it leads out of the folder"
    if "\\" in name or escape_control_codes(name) != name or any(sign in name for sign in "\n\t\0"):
        return "it contains a backslash or control codes"
    if any(part.startswith(".") for part in parts):
        return "it is hidden"
    try:
        num_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if num_bytes > MAX_NAME_BYTES:
        return f"it has {num_bytes} bytes, and at most {MAX_NAME_BYTES} are allowed"
    errors_on_windows = map(find_error_on_windows, parts if on_windows else ())
    return next(filter(None, errors_on_windows), "")


def _leads_outside(name: str) -> bool:
    """Return whether a path may lead out of the folder, or is spelled as `pack` would not write it."""
    parts = PurePosixPath(name).parts
    is_shortened = name != "/".join(parts)  # by pathlib, such as a//b or ./a
    return is_shortened or name.startswith("/") or ".." in parts or not parts
