"""The text of -h (one screen of frequently used options) and of --help (all options by group).

Standard library only, so that `--help` answers at once.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from modules.options import find_rejection

SCREEN_LINES = 66  # lines; -h shows the full help if it is not longer
MIN_FREQUENT = 5  # minimum number of options in a short help
COLUMN = 28  # column at which descriptions begin in the short help
LONGEST_CHOICES = 24  # characters of choices next to an option; longer lists are in its text
LONGEST_CLAUSE = 90  # maximum characters of a clause in the short help, if it can be cut
LONGEST_DEFAULT = 80


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends the default to an option's help, if it is a value that the help does not name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        if hasattr(self, "_set_color"):  # Python 3.14 would color the text and count color codes as columns
            self._set_color(False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        default = "" if "default" in text.lower() else _describe_default(action)
        return f"{text} (default: {default.replace('%', '%%')})" if default else text


def full_help(parser: argparse.ArgumentParser) -> str:
    """Return the help of all options: groups that are often used first, unsupported options last."""
    formatter = HelpFormatter(parser.prog)
    formatter.add_usage(_format_usage(parser), [], [])
    formatter.add_text(parser.description)
    groups = sorted(parser._action_groups, key=_rank_group)
    for group in groups:
        formatter.start_section(group.title)  # hidden if the section is empty
        formatter.add_arguments([action for action in group._group_actions if not find_rejection(action)])
        formatter.end_section()
    actions = [action for group in groups for action in group._group_actions]
    # Add sections for options that are refused, and for those that are accepted but not needed
    refused: dict[str, list[str]] = {}  # reason -> flags
    unneeded: dict[str, list[str]] = {}  # what makes the option unnecessary -> flags
    for action in actions:
        rejection = find_rejection(action)
        if rejection is None:
            continue
        flags = "/".join(action.option_strings)
        if rejection.reason:
            refused.setdefault(rejection.reason, []).append(flags)
        else:
            unneeded.setdefault(rejection.instead, []).append(flags)
    sections = {"refused, with the reason": refused, "accepted, not needed": unneeded}
    for title, flags_by_reason in sections.items():
        if flags_by_reason:
            lines = _list_by_reason(flags_by_reason.items(), formatter._width - 2)
            formatter.start_section(title)
            formatter.add_text("\n".join(lines))
            formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


@dataclass(frozen=True)
class DescribedOption:
    """A script's option with the facts that its help shows."""

    name: str
    flags: Sequence[str]
    help: str
    group: str
    kind: str  # switch, whole, number, text or other
    is_list: bool
    choices: Sequence[str]
    default: str
    rejection: str | None  # why it is rejected or not needed
    reach: str  # its effect outside of the program; see `find_reach`


def describe_options(parser: argparse.ArgumentParser) -> list[DescribedOption]:
    """Return the descriptions of all options that have a flag, in the order of the full help."""
    return [
        _describe_option(action, group.title or "")
        for group in sorted(parser._action_groups, key=_rank_group)
        for action in group._group_actions
        if action.option_strings and action.dest != "help"
    ]


def _describe_option(action: argparse.Action, group: str) -> DescribedOption:
    """Convert an argparse action to a `DescribedOption`."""
    kinds: dict[Any, str] = {None: "text", str: "text", int: "whole", float: "number"}
    is_switch = action.nargs == 0
    rejection = find_rejection(action)
    return DescribedOption(
        name=action.dest,
        flags=action.option_strings,
        help=(action.help or "").replace("%%", "%"),
        group=group,
        kind="switch" if is_switch else kinds.get(action.type, "other"),
        is_list=action.nargs not in (None, 0, "?"),
        choices=[str(choice) for choice in action.choices or ()],
        default=str(action.default).lower() if is_switch else _describe_default(action),
        rejection=None if rejection is None else (rejection.reason or rejection.instead),
        reach=getattr(action, "reach", ""),
    )


def _list_by_reason(flags_by_reason: Iterable[tuple[str, list[str]]], width: int) -> list[str]:
    """Return help lines: each reason for refusing options, followed by the flags of these options."""
    lines = []
    for reason, flags in flags_by_reason:
        lines += wrap(f"{reason.rstrip('.')}:", width)
        below = wrap(", ".join(flags), width - 4, break_long_words=False, break_on_hyphens=False)
        lines += [f"    {line}" for line in below]
    return lines


def short_help(parser: argparse.ArgumentParser) -> str:
    """Return one screen of help: the frequently used options; the full help if it fits on a screen."""
    actions = [action for action in parser._actions if not find_rejection(action)]
    frequent = [action for action in actions if action.required or getattr(action, "often", False)]
    full = parser.format_help()
    if len(frequent) < MIN_FREQUENT or full.count("\n") <= SCREEN_LINES:
        return full
    formatter = HelpFormatter(parser.prog)
    formatter.add_usage(_format_usage(parser), [], [])
    width = max(60, formatter._width)
    about = f"{parser.description or ''}\n".splitlines()[0]
    lines = [formatter.format_help() + about, ""]
    for action in frequent:
        last_spelling = (action.option_strings or [""])[-1]
        shortest_flag = getattr(parser, "shown_flags", {}).get(action.dest, last_spelling)
        lines += _format_short_lines(formatter, action, width, shortest_flag)
    return "\n".join([*lines, "", f"{len(actions) - len(frequent)} more options, by group: --help"]) + "\n"


def _format_short_lines(
    formatter: argparse.HelpFormatter, action: argparse.Action, width: int, shortest_flag: str
) -> list[str]:
    """Return the lines of an option in the short help: flags and value, then the text in a second column."""
    # `shortest_flag` is the flag to show if not all spellings fit.
    choices = [*map(str, action.choices or ())]
    has_long_choices = len(" ".join(choices)) > LONGEST_CHOICES
    value = ""
    if action.nargs != 0:
        value = "NAME" if has_long_choices else formatter._format_args(action, action.dest.upper())
    invocation = f"{' or '.join(action.option_strings)} {value}".strip()
    if len(invocation) > COLUMN - 4 and len(action.option_strings) > 1:  # 2 spaces before and after it
        invocation = f"{shortest_flag} {value}".strip()
    return wrap(
        _format_short_help(action, choices if has_long_choices else []),
        width,
        initial_indent=f"  {invocation:{COLUMN - 4}}  ",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
    )


def _format_short_help(action: argparse.Action, choices: Sequence[str]) -> str:
    """Return the first clauses of an option's help, with the choices to list and the default."""
    help_text = (action.help or "").replace("%%", "%")
    text, *clauses = re.split(r"; |(?<!e\.g)\. ", help_text)[0].split(": ")
    for clause in clauses:
        text += f": {clause}" if len(f"{text}: {clause}") <= LONGEST_CLAUSE else ""
    if choices:
        text += f": {', '.join(choices)}"
    # a help text that explains the default takes precedence over the plain value
    explained = re.search(r"\bdefault:? ([^;]+)", help_text)
    default = _describe_default(action) if explained is None else explained[1]
    if default and "default" not in text:
        text += f" (default: {default})"
    return text


def _describe_default(action: argparse.Action) -> str:
    """Return an option's default as a user would type it; "" if there is none or it is long."""
    default = action.default
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    if isinstance(default, float) and float(f"{default:g}") == default:
        default = f"{default:g}"
    if default in (None, "", argparse.SUPPRESS) or isinstance(default, bool) or find_rejection(action):
        return ""
    return str(default) if len(str(default)) <= LONGEST_DEFAULT else ""


def _rank_group(group: argparse._ArgumentGroup) -> int:
    actions = group._group_actions
    if not any(action.required or not action.option_strings for action in actions):
        return 1 if any(getattr(action, "often", False) for action in actions) else 2
    return 0


def _format_usage(parser: argparse.ArgumentParser) -> str:
    """Return the usage line, with required options only."""
    formatter = HelpFormatter(parser.prog)
    parts = []
    for action in parser._actions:
        if not action.option_strings:
            parts.append(formatter._format_args(action, action.dest))
        elif action.required:
            value = formatter._format_args(action, action.dest.upper())
            parts.append(f"{action.option_strings[-1]} {value}".strip())
        elif getattr(action, "by_place", False):
            parts.append(f"[{action.dest.upper()}{'' if action.nargs is None else ' ...'}]")
    return " ".join(["%(prog)s", *(part.replace("%", "%%") for part in parts), "[options]"])
