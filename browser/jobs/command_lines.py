"""Format a command of this program so that it can be typed in any folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from modules.command import name_extensions, quote_for_powershell, quote_for_shell, typed_words
from modules.installation import (
    FRONT_SCRIPT,
    MAX_BEFORE,
    PREFIX,
    ROOT,
    find_script,
)


def format_command(argv: Sequence[str], folder: Path | None = None) -> str:
    """Return a command line that works in a terminal in any folder.

    Args:
        argv: Command of this project. In a checkout, which installs no `reelsmith` program, the script's full
            path is inserted.
        folder: Folder to which relative paths in the command refer; None if the command has none.
    """
    line = quote_for_shell(typed_words(argv) if PREFIX else _add_script_path(argv))
    return f"{format_cd(folder)}{line}"


def format_cd(folder: Path | None, in_powershell: bool = False) -> str:
    """Return the words that change into a folder before a command line; "" if the folder is None."""
    if folder is None:
        return ""
    argv = ["cd", str(folder.absolute())]
    return f"{quote_for_powershell(argv)}; " if in_powershell else f"{quote_for_shell(argv)} && "


def format_move(paths: Sequence[Path], folder: Path) -> str:
    """Return a command line that moves files into a new folder, for a terminal in any folder."""
    sources = [str(path.absolute()) for path in paths]
    target = str(folder.absolute())
    if os.name == "nt":
        made = quote_for_powershell(["mkdir", target])
        listed = ", ".join(quote_for_powershell([source]) for source in sources)
        return f"{made}; mv {listed} {quote_for_powershell([target])}"
    return f"{quote_for_shell(['mkdir', '-p', target])} && {quote_for_shell(['mv', *sources, target])}"


def _add_script_path(argv: Sequence[str]) -> list[str]:
    """Replace a command's script name with its absolute path in the checkout."""
    argv = name_extensions(argv)
    if argv[:1] == ["reelsmith"]:
        return ["python", str(ROOT / FRONT_SCRIPT), *argv[1:]]
    if argv[:1] not in (["python"], ["accelerate"]):
        return argv
    for index, word in enumerate(argv[:MAX_BEFORE]):
        script = find_script(word)
        if script is not None:
            return [*argv[:index], str(ROOT / script), *argv[index + 1 :]]
    return argv
