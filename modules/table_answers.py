"""Read the command line of the running script by its table, before its modules are imported.

--help and errors are answered then; the arguments of any other command line wait for the script.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from modules.command import command_line, name_as_typed, start_logging
from modules.errors import UserError
from modules.installation import EXTENSIONS, PREFIX, ROOT, find_script
from modules.option_tables import find_compile_time, find_table
from modules.options import Options
from modules.parser import Parser, reject_unsupported, typed_names
from modules.script_words import console_words
from modules.table_parser import build_parser, check_arguments
from modules.text_files import real_path

_HELP = {"-h", "--help"}
CHECKOUT_SECONDS = 60  # time in which a checkout or an update writes all files


class _OutdatedTablesError(Exception):
    """Raised if the option table lacks a typed option and may be outdated; the records parse instead."""


class _TableParser(Parser):
    def error(self, message: str) -> NoReturn:
        _reject_outdated_tables()
        super().error(message)


class CommandLine(NamedTuple):
    """The parser of a script, and the arguments that it has parsed."""

    parser: Parser
    arguments: argparse.Namespace


# words of the process -> what a table has read of them, until the script takes it
_parsed_lines: dict[tuple[str, ...], CommandLine] = {}


def answer_running_script() -> None:
    """Parse the command line of the running script with its compiled option table, if the script is ours.

    Do nothing in a worker process, which has the same command line: its files may be gone by then.
    """
    process = sys.modules.get("multiprocessing.process")  # worker processes import it before the script
    is_worker = process is not None and process.parent_process() is not None
    script = None if is_worker else _find_running_script(sys.argv[0])
    if script is not None:
        program = " ".join(console_words(script.stem)) if PREFIX else None
        answer_script(script, sys.argv[1:], program)


def answer_script(script: Path, argv: Sequence[str], program: str | None = None) -> None:
    """Parse a script's command line with its compiled table; print help or an option error and exit.

    Valid arguments are stored for `take_parsed_line`. Nothing is done if the script has no table, if some
    words belong to another script, or if the table may be outdated: then the records parse the line later.

    Args:
        script: Path of the script in the checkout or the package.
        argv: Arguments of the command line after the script.
        program: Name of the program in messages. None: the first word of the command line.
    """
    if os.environ.get(EXTENSIONS):  # extensions may add options, so the records have to parse them
        from modules.extensions import check_named  # imported only if extensions are enabled

        command_line(check_named, needs_packages=False)
        return
    table = find_table(script)
    asks_for_help = _HELP.issuperset(argv or [""])
    if table is None or (table.get("cuts_words") and not asks_for_help):
        return
    start_logging()
    parser = build_parser(table, program, _TableParser)
    try:
        arguments = parser.parse_args(argv)
        try:
            with name_as_typed(typed_names(arguments)):
                reject_unsupported(parser, arguments, logs_unneeded=False)
                check_arguments(parser, arguments)
        except UserError as error:
            _reject_outdated_tables()
            command_line(partial(_raise, error))  # prints the error and exits
    except _OutdatedTablesError:
        return
    _parsed_lines[tuple(sys.argv)] = CommandLine(parser, arguments)


def take_parsed_line() -> CommandLine | None:
    """Return this process's command line as its option table parsed it; None at each further call.

    Also None if a source file of option records is newer than the tables; the records then parse the line.
    """
    parsed = _parsed_lines.pop(tuple(sys.argv), None)
    if parsed is None or (not PREFIX and _are_records_newer()):
        return None
    return parsed


def _raise(error: UserError) -> None:
    raise error


def _find_running_script(typed: str) -> Path | None:
    """Return the running script's path relative to ROOT; None if it is not one of our scripts."""
    path = Path(typed)
    try:
        return find_script(real_path(path).relative_to(ROOT).as_posix())
    except (ValueError, OSError):
        is_command = PREFIX and path.suffix.lower() in ("", ".exe")
        return find_script(path.stem) if is_command else None


def _reject_outdated_tables() -> None:
    """Raise _OutdatedTablesError if a source file of a package is newer than the compiled tables."""
    if PREFIX:
        return
    latest = find_compile_time() + CHECKOUT_SECONDS
    for room in (folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()):
        for parent, _, names in os.walk(room):
            sources = (Path(parent, name) for name in names if name.endswith(".py"))
            if any(source.stat().st_mtime > latest for source in sources):
                raise _OutdatedTablesError


def _are_records_newer() -> bool:
    """Return whether a source file with option declarations is newer than the compiled tables."""
    latest = find_compile_time() + CHECKOUT_SECONDS
    waiting: list[type] = [Options]
    modules = set()
    while waiting:
        record = waiting.pop()
        modules.add(record.__module__)
        waiting += record.__subclasses__()
    files = (getattr(sys.modules.get(module), "__file__", None) for module in modules)
    return any(Path(file).stat().st_mtime > latest for file in files if file)
