"""Check the names of output files, and ask before replacing existing files. Standard library only."""

import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError, OutputError
from modules.text_files import real_path

logger = logging.getLogger(__name__)

MAX_OUTPUT_NAME_BYTES = 160  # bytes; suffixes add up to 90, and file systems allow 255
WINDOWS_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", re.IGNORECASE | re.DOTALL
)
WINDOWS_SIGNS = set('<>:"|?*')
# of files that are not safetensors files
OTHER_KINDS = {
    ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".txt", ".json", ".toml", ".zip", ".mp4", ".png",
}  # fmt: skip


def check_output_name(option: str, name: str, is_new: bool = True) -> None:
    """Raise OptionError if file and folder names cannot begin with `name`.

    With `is_new`, names that are invalid on Windows are rejected on every machine, because LoRAs and runs are
    copied between machines. A run that was started under such a name can continue.
    """
    size = len(name.encode("utf-8", "surrogateescape"))
    reason = ""
    if "/" in name or "\\" in name:
        reason = "it contains a folder, which --output_dir names"
    elif not name.strip() or set(name.strip()) == {"."}:
        reason = "it names no file"
    elif escape_control_codes(name) != name or "\n" in name or "\t" in name:
        reason = "it contains control codes"
    elif name.lower().endswith(".safetensors"):
        reason = "the suffix is added automatically"
    elif size > MAX_OUTPUT_NAME_BYTES:
        reason = f"it has {size} bytes, and {MAX_OUTPUT_NAME_BYTES} are the most"
    elif is_new:
        reason = find_error_on_windows(name)
    if reason:
        raise OptionError(
            f"{option} {shorten(name, 60)!r}: {reason}. Pass a name of letters and numbers, such as my_lora"
        )


def find_error_on_windows(name: str) -> str:
    """Return why Windows does not allow a name for files and folders; "" if it does."""
    signs = [sign for sign in name if sign in WINDOWS_SIGNS]
    if signs:
        return f"names on Windows cannot have the character {signs[0]}"
    if is_windows_device(name):
        return f"on Windows {name.partition('.')[0].strip()} is a device, with any ending"
    if name[-1] in ". ":
        return f"it ends in a {'dot' if name[-1] == '.' else 'space'}, which Windows removes"
    return ""


def is_windows_device(name: str) -> bool:
    """Return whether Windows reserves this name for a device, with any suffix."""
    return WINDOWS_DEVICE.fullmatch(name) is not None


def fold_name(name: str) -> str:
    """Return a normalized file name, so that names which some disks consider the same are equal.

    Disks of Windows and macOS ignore case and Unicode forms of a character.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_output_file(option: str, path: Path) -> None:
    """Raise OptionError if no safetensors file can be written at this path."""
    if path.suffix.lower() in OTHER_KINDS and not path.is_dir():
        raise OptionError(
            f"{option} {path}: a safetensors file is written. Pass a name that ends in .safetensors"
        )
    check_place(option, path)
    if path.exists():
        logger.warning("%s %s already exists: it will be replaced", option, path)


def check_place(option: str, path: Path) -> None:
    """Raise OptionError if no file can be written at a path: it is a folder, or a parent is a file."""
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder. Pass the name of the file to write in it")
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise OptionError(f"{option} {path}: {above} is a file, not a folder. Choose another folder")


def reject_replacing(option: str, output: Path, inputs: Sequence[Path]) -> None:
    """Raise OptionError if the output file is one of the input files, even by another path."""
    for path in inputs:
        is_same = real_path(output) == real_path(path)
        if is_same or (output.exists() and path.exists() and output.samefile(path)):
            raise OptionError(
                f"{option} {output} is one of the files to read, {path}, which would be lost. Pass a new "
                "name."
            )


Answer = Literal["overwrite", "leave", "free"]


def has_terminal() -> bool:
    """Return whether a person at a terminal can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask_on_terminal(question: str) -> str:
    """Print a question to standard error, and return the line that the user types."""
    sys.stderr.write(question)  # not standard output, which is for results
    sys.stderr.flush()
    return sys.stdin.readline()


def ask_at_console(
    question: str,
    read: Callable[[str], str] = ask_on_terminal,
    is_terminal: Callable[[], bool] = has_terminal,
    offers_name: bool = True,
) -> Answer | None:
    """Ask whether to overwrite files; return "overwrite", "leave" or "free", or None without a terminal.

    An empty answer means "leave".

    "free" asks for an unused name, and is possible only with `offers_name`.
    """
    if not is_terminal():
        return None
    choices = "y: yes, N: no, f: find a free name [y/N/f]" if offers_name else "y: yes, N: no [y/N]"
    answer = read(f"{question}? {choices} ").strip().lower()
    if answer in {"y", "yes"}:
        return "overwrite"
    return "free" if offers_name and answer in {"f", "free"} else "leave"


def ask_to_overwrite(question: str) -> Answer | None:
    """Ask whether to overwrite, yes or no, without offering another name; None without a terminal."""
    return ask_at_console(question, offers_name=False)


def ask_to_replace(
    paths: Sequence[Path], yes: bool, ask: Callable[[str], Answer | None] = ask_to_overwrite
) -> None:
    """Ask whether existing files may be replaced; do nothing if no file exists or `yes` is set.

    `ask` asks a question and returns the answer, or None if nobody can answer.

    Raises:
        OutputError: If the answer is no, or if nobody can answer.
    """
    existing = [path for path in paths if path.exists()]
    if not existing or yes:
        return
    tail = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
    verb = "exist" if tail else "exists"
    answer = ask(f"{existing[0]}{tail} {verb} already. Overwrite")
    if answer is None:
        raise OutputError(f"{existing[0]}{tail} {verb} already. Pass another name, or --yes to replace.")
    if answer != "overwrite":
        raise OutputError(f"{existing[0]} is kept. Nothing was written.")
