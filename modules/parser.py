"""The parser of a script's options, light: put records into argparse, and answer mistakes."""

import argparse
import logging
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from modules.command import (
    as_typed,
    did_you_mean,
    let_the_first_tell,
    name_as_typed,
    one_line,
    plain_message,
    wants_colour,
)
from modules.errors import OptionError
from modules.option_values import HEIGHT_WIDTH, JOINED, UNIT, height_width
from modules.options import (
    Declared,
    Options,
    Refusal,
    default_of,
    hints_of,
    option_name,
    reach_of,
    read_options,
    record_of,
    refusal_of,
)
from modules.paths import path_exists

# type of an option -> what it takes, in words
NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
# what word processors and web pages make of --
_DASHES = re.compile(
    "^(?=.{0,1}[\u2010-\u2015\u2212\ufe58\ufe63\uff0d])[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+(?=[A-Za-z])"
)
_OTHER_DASHES = str.maketrans("-_", "_-")
_LINE_ENDS = {"\\", "^", "`", " "}
_MISSING = "the following arguments are required: "  # as argparse says it
logger = logging.getLogger(__name__)

METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}  # others take a text
_BOLD, _CYAN, _PLAIN = "\033[1m", "\033[36m", "\033[0m"
_Group = argparse._ActionsContainer


class _Word(str):
    """A word of the command line with an identity of its own, even if other words are equal."""


class Parser(argparse.ArgumentParser):
    """Parser of a script's options.

    A mistake gives one message, with the option or value that was probably meant, and exit code 2. Help shows
    defaults, and colours on a terminal.
    """

    key_file = ""
    # option -> the flag that messages show for it if none is typed, for scripts with names of their own
    shown_flags: Mapping[str, str] = {}

    def __init__(self, *args: Any, add_help: bool = True, **settings: Any) -> None:
        super().__init__(*args, add_help=False, **settings)  # type: ignore[misc]
        # of the options that were given: the spelling by `dest`, the first one if there are several
        self.typed_flags: dict[str, str] = {}
        self._all_typed: set[str] = set()
        texts = {"-h": "show the options that people use", "--help": "show all options"} if add_help else {}
        for flag, text in texts.items():  # `_show_help` reads them
            self.add_argument(flag, action="store_true", default=argparse.SUPPRESS, dest="help", help=text)

    def print_help(self, file: Any = None, is_short: bool = False) -> None:
        """Print all options, by group, or one screen of them; in colour on a terminal."""
        file, text = file or sys.stdout, self.format_short_help() if is_short else self.format_help()
        if wants_colour(file):
            text = re.sub(r"(?m)^(\S.*:)$|^usage:", rf"{_BOLD}\g<0>{_PLAIN}", text)
            text = re.sub(r"(?<![\w-])--?[A-Za-z]\w*(?:-\w+)*", rf"{_CYAN}\g<0>{_PLAIN}", text)
        self._print_message(text, file)

    def format_help(self) -> str:
        from modules.help_text import full_help  # only -h and --help need it

        return full_help(self)

    def format_short_help(self) -> str:
        from modules.help_text import short_help  # likewise

        return short_help(self)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but report mistyped options before missing ones, often the same option."""
        words = sys.argv[1:] if args is None else list(args)
        self._show_help(words)
        last_but_one, last = ["", "", *words][-2:]
        takes_it = any(last_but_one in one.option_strings and one.nargs != 0 for one in self._actions)
        if last in _LINE_ENDS and not takes_it:  # for another shell
            self.error(
                f"the command ends in '{last}', and its next line was not read: a line goes on with \\ as "
                "its very last character in bash, with ^ in cmd, with ` in PowerShell. Write one line"
            )
        words = self._respell(words)
        self._refuse_unknown(words)
        self._refuse_joined(words)
        takers = [one for one in self._actions if getattr(one, "by_place", False)]
        words = self._give_flags(words, takers) if takers else words
        self._note_flags(words)
        found, others = super().parse_known_args(words, namespace)
        if others:
            from modules.mistyped import explain_rest  # only mistakes need it

            self.error(
                explain_rest(self._option_string_actions, words, others, self._get_positional_actions())
            )
        names = self._find_typed_names()
        if names:
            found.typed_names = names  # for records with a field of this name
        return found

    def _find_typed_names(self) -> dict[str, str]:
        """Return other flags of the options that are typed, each with the flag to show in its place."""
        names: dict[str, str] = {}
        for action in self._actions:
            shown = self.typed_flags.get(action.dest)
            if shown is not None:
                flags = [flag for flag in action.option_strings if flag[:2] == "--" and flag[:5] != "--no-"]
                names |= {flag: shown for flag in flags if flag not in self._all_typed}
            elif action.dest in self.shown_flags:
                names[f"--{action.dest}"] = self.shown_flags[action.dest]
        return {flag: shown for flag, shown in names.items() if flag != shown}

    def _note_flags(self, words: Sequence[str]) -> None:
        """Keep the spelling of each option that is given, whole where only its beginning was typed."""
        flags = self._option_string_actions
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            begun = [flag for flag in flags if flag.startswith(name)] if name[:2] == "--" else []
            if name in flags or len(begun) == 1:
                flag = name if name in flags else begun[0]
                self.typed_flags.setdefault(flags[flag].dest, flag)
                self._all_typed.add(flag)

    def _refuse_joined(self, words: Sequence[str]) -> None:
        """Refuse numbers that are typed as one word; people write sizes as width x height: 832x480."""
        typed = [part for word in words for part in (word.split("=", 1) if word[:2] == "--" else [word])]
        for before, word in pairwise(typed):
            action, joined = self._option_string_actions.get(before), JOINED.fullmatch(word)
            if joined is None or action is None or action.type not in NUMBERS:
                continue
            if action.metavar == HEIGHT_WIDTH:
                sides = " ".join(height_width(joined))
                self.error(f"{before} {word}: give height and width: {before} {sides}")
            if action.nargs == 2:
                self.error(f"{before} {word}: give two numbers: {before} {joined[1]} {joined[3]}")

    def _give_flags(self, words: Sequence[str], takers: Sequence[argparse.Action]) -> list[str]:
        """Return the words, with those that belong to no option placed after flags of `by_place` options.

        takers: the `by_place` options. The first word goes to the first taker that is not given, and so on; a
        taker of several values takes all.
        """
        typed = [_Word(word) for word in words]  # argparse returns these same objects: equal words differ
        required = [one for one in self._actions if one.required]
        for one in required:
            one.required = False
        try:
            found, others = super().parse_known_args(typed)
        finally:
            for one in required:
                one.required = True
        takers = [one for one in takers if getattr(found, one.dest) is one.default]
        taken = [word for word in others if word != "--"]
        if not taken or not takers:
            return list(words)
        rest = [word for word in typed if not any(word is other for other in others)]
        if takers[0].nargs is not None:
            return [*rest, takers[0].option_strings[-1], *taken]
        if len(taken) > len(takers):
            flags = " and ".join(one.option_strings[-1] for one in takers)
            self.error(
                f"{as_typed(taken)}: {len(taken)} words without an option, and only {flags} can be left out. "
                "Put a name with blanks in quotes."
            )
        joined = zip((one.option_strings[-1] for one in takers), taken, strict=False)
        return [*rest, *(f"{flag}={word}" for flag, word in joined)]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but print the help first if that is asked for."""
        words = sys.argv[1:] if args is None else list(args)
        self._show_help(words)
        return super().parse_known_args(self._respell(words), namespace)

    def _respell(self, words: Sequence[str]) -> list[str]:
        """Return the words with --no-metadata as --no_metadata, where the script has that one alone, and
        `--memory 12 GB` with one value.
        """
        flags, found = self._option_string_actions, list(words)
        for place in range(len(found) - 1, 0, -1):
            number = re.fullmatch(r"(?:--\w+=)?(?:\d+[xX])?[0-9.]+", found[place - 1])
            if number is not None and re.fullmatch(UNIT, found[place], re.IGNORECASE):
                found[place - 1 : place + 1] = [f"{number[0]} {found[place]}"]
        for place, word in enumerate(found[: found.index("--") if "--" in found else None]):
            name, *value = word.split("=", 1)
            other = "--" + name[2:].translate(_OTHER_DASHES)
            if name[:2] == "--" and name[2:] and not any(flag.startswith(name) for flag in flags):
                found[place] = "=".join([other, *value]) if other in flags else word
        return found

    def _show_help(self, words: Sequence[str]) -> None:
        asked = {word for word in words if word == "-h" or (word[3:] and "--help".startswith(word))}
        if asked:
            self.print_help(is_short=asked == {"-h"})
            self.exit()

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, without the list of all options."""
        if message.startswith(_MISSING):
            lines = []
            for name in message.removeprefix(_MISSING).split(", "):
                helps = [
                    action.help
                    for action in self._actions
                    if name in {"/".join(action.option_strings), action.metavar, action.dest} and action.help
                ]
                lines.append(f"{name} is missing" + (f": {helps[0].replace('%%', '%')}" if helps else ""))
            message = "\n  ".join(lines)
        else:
            message = message.replace("\n", "\\n")
        message = plain_message(message, sys.argv)
        let_the_first_tell()
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        flags = self._option_string_actions
        said: dict[str, None] = {}  # each message once, in order
        for before, word in pairwise(["", *words[: words.index("--") if "--" in words else None]]):
            name = word.partition("=")[0]
            is_number = self._negative_number_matcher.match(word) is not None
            plain = _DASHES.sub("--", name)
            if plain != name and " " not in name and any(flag.startswith(plain) for flag in flags):
                message = f"{name} begins with a typographic dash, not with --. Write {plain}"
                said[message] = None
            # argparse takes the beginning of an option too
            begun = [flag for flag in flags if flag.startswith(name)]
            if not re.match(r"--.|-[^-]", name) or is_number or name in flags:
                continue
            from modules.mistyped import meant_elsewhere  # likewise

            elsewhere = meant_elsewhere(flags, name.lstrip("-"), self.key_file)
            if begun and not (elsewhere and (len(begun) > 1 or begun[0] not in elsewhere)):
                continue
            is_value = before in flags and flags[before].nargs != 0
            if " " in name or (" " in word and (is_value or not word.startswith("--"))):
                continue  # argparse takes what has blanks as a text
            if is_value and not word.startswith("--"):
                message = f"{word} is no option. A value that begins with - goes behind =: {before}={word}"
            else:
                near = did_you_mean(name.lstrip("-"), [flag[2:] for flag in flags if flag[:2] == "--"])
                near = near.replace("mean ", "mean --") or " Leave it out."
                is_file = word[:2] != "--" and path_exists(Path(word))
                near = f" Of the file of this name write ./{word}" if is_file else near
                message = f"Unknown option {name}.{elsewhere or near}"
            said[message] = None
        if said:
            self.error(" ".join(said))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            shown = one_line(str(value))
            reason = getattr(action, "refused", {}).get(value)
            if reason is not None:
                raise argparse.ArgumentError(action, f"{value}: {reason}. Use {', '.join(choices)}.")
            from modules.mistyped import ours_for  # likewise

            ours = ours_for(str(value).lower(), choices)
            near = f" Did you mean {ours}?" if ours else did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"{shown} is no choice. Use {', '.join(choices)}.{near}")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        """Count an option's values as argparse does, but say which ones are wanted if there are too few."""
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            values = action.metavar
            if (
                action.nargs is None
                and isinstance(values, str)
                and values not in (*METAVARS.values(), "TEXT")
            ):
                raise argparse.ArgumentError(action, f"{error.message}: {values}") from None
            if not isinstance(action.metavar, tuple):
                raise
        names, default = action.metavar, action.default
        example = f", such as {' '.join(map(str, default))}" if isinstance(default, list) else ""
        raise argparse.ArgumentError(action, f"give {len(names)} values: {' and '.join(names)}{example}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a word as argparse does, but explain an option's values in plain words."""
        try:
            value = super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in NUMBERS:
                raise
        else:
            if isinstance(value, str) and action.choices is not None and value not in action.choices:
                same = [one for one in action.choices if str(one).lower() == value.lower()]
                return same[0] if len(same) == 1 else value
            return value
        parts = arg_string.split(",")
        point = f"write a decimal point: {'.'.join(parts)}"
        is_decimal = action.type is float and re.fullmatch(
            r"-?\d+,\d+(e[+-]?\d+)?", arg_string, re.IGNORECASE
        )
        if action.nargs is None and is_decimal:
            raise argparse.ArgumentError(action, f"{arg_string}: {point}")
        are_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", part.strip()) for part in parts)
        if len(parts) > 1 and action.nargs in ("+", "*") and are_numbers:
            apart = " ".join(part.strip() for part in parts)
            point = f", or {point}" if is_decimal else ""
            raise argparse.ArgumentError(action, f"{arg_string}: write several numbers apart: {apart}{point}")
        example = action.default if type(action.default) in NUMBERS else 1
        raise argparse.ArgumentError(
            action, f"{one_line(arg_string)} is not {NUMBERS[action.type]}. Give one, such as {example:g}."
        )


def typed_names(args: argparse.Namespace) -> Mapping[str, str]:
    """Return other flags of options that were typed, each with the flag to show; see `name_as_typed`."""
    names: Mapping[str, str] = getattr(args, "typed_names", {})
    return names


def parse_options(
    description: str | None, argv: Sequence[str] | None, *records: type[Options], **own: Any
) -> list[Any]:
    """Return the records of a script that has these options and no others. own: of `add_options`."""
    return parse_spelled(description, argv, *records, **own)[0]


def parse_spelled(
    description: str | None, argv: Sequence[str] | None, *records: type[Options], **own: Any
) -> tuple[list[Any], Mapping[str, str]]:
    """Return what `parse_options` does, and how each given option was spelled, by public name."""
    parser = Parser(description=description)
    add_options(parser, *records, **own)
    args = parser.parse_args(argv)
    with name_as_typed(typed_names(args)):
        refuse_unsupported(parser, args)
        return [read_options(record, args) for record in records], parser.typed_flags


def add_options(
    parser: argparse.ArgumentParser,
    *records: type[Options],
    group: _Group | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    refused: Mapping[str, str] | None = None,
) -> None:
    """Declare the options of records, and of the records in them, to a parser.

    An optional record in one (`Record | None`) is declared only if it is named itself. By public name:
    `without` are options that the script does not have, whose record holds the default; `defaults` and
    `settings` (of `add_argument`, such as `help`; `flags` for further spellings; `refused` as of `option`)
    are the script's own;
    `refused` says why the script refuses an option. group: where a record without a title goes.
    """
    own, more, reasons = defaults or {}, settings or {}, refused or {}
    for cls in records:
        if cls.key_file and isinstance(parser, Parser):
            parser.key_file = cls.key_file
        place = group_of(parser, cls.heading) if cls.heading else group or parser
        for field in fields(cls):
            declared, name = field.metadata.get("declared"), option_name(field)
            there = group_of(parser, declared.title) if declared is not None and declared.title else place
            hint = hints_of(cls)[field.name]
            if record_of(hint) is hint:
                inner = {} if declared is None else declared.settings
                add_options(
                    parser,
                    *((hint,) if issubclass(hint, Options) else ()),  # others are declared by functions
                    group=there,
                    without={*without, *inner.get("without", ())},
                    defaults={**inner.get("defaults", {}), **own},
                    settings={**inner.get("settings", {}), **more},
                    refused={**inner.get("refused", {}), **reasons},
                )
            elif declared is not None and declared.help:
                given = {**declared.settings, **more.get(name, {})}
                required = given.get("required") or (declared.positional and given.get("nargs") != "*")
                default = own[name] if name in own else None if required else default_of(cls, field)
                if name in without:
                    parser.set_defaults(**{name.replace("-", "_"): default})
                else:
                    action = _add_option(there, name, hint, default, declared, more.get(name, {}))
                    action.is_secret = "secret" in field.metadata  # type: ignore[attr-defined]
                    action.reach = reach_of(field.metadata)  # type: ignore[attr-defined]
                    if name in reasons:
                        action.refusal = Refusal(action.help or "", reasons[name], "", (), {})  # type: ignore[attr-defined]
        for name, refusal in ((name, getattr(cls, name)) for base in cls.__mro__ for name in vars(base)):
            if isinstance(refusal, Refusal) and name not in without:
                tail = "" if refusal.reason else f"not needed: {refusal.instead}"
                text = "; ".join(part for part in (refusal.help, tail) if part)
                text = text or refusal.reason.replace("%", "%%")
                flag = f"--{name.replace('_', '-') if cls.dashed else name}"
                declared_so = dict(refusal.settings)
                action = place.add_argument(flag, *declared_so.pop("flags", ()), help=text, **declared_so)
                action.refusal = refusal  # type: ignore[attr-defined]


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    found = [group for group in parser._action_groups if group.title == title]
    return found[0] if found else parser.add_argument_group(title)


def _add_option(
    group: _Group, name: str, hint: Any, default: Any, declared: Declared, more: Mapping[str, Any]
) -> argparse.Action:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    usual = "default: the task's" if default is None else f"default {default}"
    settings = {**declared.settings, **more}
    refused = settings.pop("refused", declared.refused)
    words: dict[str, Any] = {"help": declared.help.replace("{default}", usual), "default": default}
    if isinstance(default, Path):
        words["default"] = str(default)
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is tuple:
        words["nargs"] = "*"
        kind = typing.get_args(kind)[0]
        words["default"] = list(default) if isinstance(default, tuple) else default
    if kind is bool:
        words["action"] = "store_true"
    else:
        words |= {"type": kind} if kind in NUMBERS else {}
        words |= {} if "choices" in settings else {"metavar": METAVARS.get(kind, "TEXT")}
    words |= settings
    if declared.positional:
        action = group.add_argument(name, **words)
    else:
        flags = dict.fromkeys((*words.pop("flags", declared.flags), f"--{name}"))  # one may be in both
        action = group.add_argument(*flags, dest=name.replace("-", "_"), **words)
    action.often, action.refused, action.by_place = declared.often, refused, declared.by_place  # type: ignore[attr-defined]
    return action


def refuse_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise OptionError if an option that is refused is used; say which are not needed."""
    for action in parser._actions:
        refusal, value = refusal_of(action), getattr(args, action.dest, action.default)
        if refusal is None or value in (action.default, *refusal.values):
            continue
        if refusal.reason:
            raise OptionError(f"{action.option_strings[0]} is refused: {refusal.reason}")
        logger.info("%s is not needed: %s", action.option_strings[0], refusal.instead)
