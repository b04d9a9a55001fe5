"""Answer --help and wrong options of the running script from its table, before its modules are imported."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from modules.command import command_line, name_as_typed, start_logging
from modules.errors import UserError
from modules.installation import PREFIX, ROOT, find_script
from modules.option_tables import TABLES, find_table
from modules.parser import Parser, refuse_unsupported, typed_names
from modules.script_words import console_words
from modules.table_parser import build_parser
from modules.text_files import real_path

_HELP = {"-h", "--help"}
CHECKOUT_SECONDS = 60  # within which a checkout or an update writes all its files


class _OutdatedTables(Exception):
    """The table does not know the words, and may be older than the code, which then answers itself."""


class _TableParser(Parser):
    def error(self, message: str) -> NoReturn:
        if not PREFIX and _are_outdated():
            raise _OutdatedTables
        super().error(message)


def answer_running_script() -> None:
    """Answer for the script that this process runs; do nothing if it runs none of ours."""
    script = _find_running_script(sys.argv[0])
    if script is not None:
        program = " ".join(console_words(script.stem)) if PREFIX else None
        answer_script(script, sys.argv[1:], program)


def answer_script(script: Path, words: Sequence[str], program: str | None = None) -> None:
    """End the process with the help, or with the message on a wrong option, if the words ask for it.

    Args:
        script: Path of the script in the checkout or the package.
        words: Words of the command line behind the script.
        program: Name of the program in messages. None: the first word of the command line.
    """
    table = find_table(script)
    if table is None or (table.get("cuts_words") and not _HELP.issuperset(words or [""])):
        return
    start_logging()
    parser = build_parser(table, program, _TableParser)
    try:
        parsed = parser.parse_args(words)
        with name_as_typed(typed_names(parsed)):
            refuse_unsupported(parser, parsed, tells_unneeded=False)
    except _OutdatedTables:
        return
    except UserError as error:
        command_line(partial(_raise, error))


def _raise(error: UserError) -> None:
    raise error


def _find_running_script(typed: str) -> Path | None:
    """Return the path in ROOT of the script that a process was started with; None if it is none of ours.

    typed: the first word of the command line: a file, or in the package also a console command.
    """
    path = Path(typed)
    try:
        return find_script(real_path(path).relative_to(ROOT).as_posix())
    except (ValueError, OSError):
        is_command = PREFIX and path.suffix.lower() in ("", ".exe")
        return find_script(path.stem) if is_command else None


def _are_outdated() -> bool:
    """Return whether a file of a room was changed after the tables were compiled."""
    latest = TABLES.stat().st_mtime + CHECKOUT_SECONDS
    for room in (folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()):
        for parent, _, names in os.walk(room):
            sources = (Path(parent, name) for name in names if name.endswith(".py"))
            if any(source.stat().st_mtime > latest for source in sources):
                return True
    return False
