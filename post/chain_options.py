"""Read the options of one tool, or of several that work one after the other. Standard library only."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules.command import Parser, did_you_mean
from modules.errors import OptionError
from modules.options import read_options
from post.run_options import RunOptions, add_run_arguments
from post.tools_options import TOOLS, Tool

THEN = "--then"


@dataclass(frozen=True)
class Chain:
    """What one run is told: its files, and the tools with their options in the order of work."""

    run: RunOptions
    tools: tuple[tuple[Tool, Any], ...]  # a tool and the record of its options


def read_chain(tool: str, description: str, argv: Sequence[str] | None = None) -> Chain:
    """Read the command line of a tool's script, `--then` and further tools included.

    Ends the program, as argparse does, if it cannot be understood.
    """
    first, *others = split_at(sys.argv[1:] if argv is None else list(argv), THEN)
    parser = Parser(description=description)
    chosen = find_tool(tool)
    add_run_arguments(parser)
    chosen.add_arguments(parser)
    parser.add_argument(
        THEN,
        metavar="TOOL ...",
        help="give the result to another tool, behind whose name its own options follow: "
        f"{', '.join(each.name for each in TOOLS)}",
    )
    args = parser.parse_args(first)
    run = read_options(RunOptions, args)
    tools = [(chosen, read_options(chosen.record, args)), *(read_tool(words) for words in others)]
    return Chain(run, tuple(tools))


def read_tool(words: Sequence[str]) -> tuple[Tool, Any]:
    """Read the name of a tool and its options: `facefix --weight 0.7`, or `facefix weight=0.7`."""
    if not words:
        raise OptionError(f"{THEN}: the name of a tool is missing: {', '.join(tool.name for tool in TOOLS)}")
    tool = find_tool(words[0])
    parser = Parser(prog=f"{THEN} {tool.name}", add_help=False)
    tool.add_arguments(parser)
    return tool, read_options(tool.record, parser.parse_args(as_options(words[1:], parser)))


def find_tool(name: str) -> Tool:
    """Return the tool of that name, in small or capital letters. Raises OptionError if there is none."""
    for tool in TOOLS:
        if name.lower().removesuffix(".py") in {tool.name.lower(), *tool.aliases}:
            return tool
    names = [tool.name for tool in TOOLS]
    raise OptionError(f"{name} is no tool. Use {', '.join(names)}.{did_you_mean(name, names)}")


def split_words(text: str) -> list[str]:
    """Split what is given to --post into words; quotes hold blanks together, a backslash is a letter."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise OptionError(f"{text}: a quotation mark is not closed") from None


def split_at(words: Sequence[str], mark: str) -> list[list[str]]:
    """Cut a list at each `mark`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def as_options(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Write `factor=2` as `--factor=2` and `only_center` as `--only_center`; other words stay."""
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    made = []
    for word in words:
        name, has_value, _ = word.partition("=")
        flag = flags.get(f"--{name}")
        made.append(f"--{word}" if flag is not None and (has_value or flag.nargs == 0) else word)
    return made
