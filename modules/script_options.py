"""Read the options of the running script, from its table if it was used, else by its records."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from modules.command import name_as_typed
from modules.installation import ONLY_OPTIONS
from modules.options import Options, read_options
from modules.parser import Parser, add_options, reject_unsupported, typed_names
from modules.table_answers import CommandLine, take_parsed_line


def read_command_line(argv: Sequence[str] | None, build_parser: Callable[[], Parser]) -> CommandLine:
    """Return the running script's parser and its parsed arguments.

    Args:
        argv: Arguments of the command line. None: the process's own, which the script's table has parsed.
        build_parser: Makes the parser from the script's records, if no compiled table has parsed the line.
    """
    parsed = take_parsed_line() if argv is None else None
    if parsed is not None:
        return parsed
    parser = build_parser()
    return CommandLine(parser, parser.parse_args(argv))


class ParsedOptions(NamedTuple):
    """A script's option records, and the flag with which each given option was typed."""

    records: list[Any]
    typed_flags: Mapping[str, str]  # by public name


def parse_options(
    description: str | None, argv: Sequence[str] | None, *records: type[Options], **changes: Any
) -> list[Any]:
    """Parse a script's command line into its option records; `changes` are passed to `add_options`."""
    options = parse_with_flags(description, argv, *records, **changes).records
    if os.environ.get(ONLY_OPTIONS):  # the page only checks the options
        raise SystemExit(0)
    return options


def parse_with_flags(
    description: str | None, argv: Sequence[str] | None, *records: type[Options], **changes: Any
) -> ParsedOptions:
    """Parse a script's command line into its option records. Help and errors end the program.

    Args:
        description: Description of the script in its help.
        argv: Arguments of the command line. None: the process's own.
        *records: Records that declare the options.
        **changes: Arguments of `add_options`.
    """

    def build_parser() -> Parser:
        parser = Parser(description=description)
        add_options(parser, *records, **changes)
        return parser

    parser, arguments = read_command_line(argv, build_parser)
    with name_as_typed(typed_names(arguments)):
        reject_unsupported(parser, arguments)
        options = [read_options(record, arguments) for record in records]
    return ParsedOptions(options, parser.typed_flags)
