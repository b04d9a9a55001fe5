"""Parse a script's options: add records to argparse, and explain mistakes. Imports no torch."""

import argparse
import logging
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn

from modules.command import (
    LISTS_OPTIONS,
    did_you_mean,
    plain_message,
    quote_command,
    shorten_word,
    wait_for_first_process,
    wants_color,
)
from modules.errors import OptionError
from modules.installation import find_front_words, find_script
from modules.option_checks import CHECKED_INFO
from modules.option_values import HEIGHT_WIDTH, JOINED, UNIT, height_width
from modules.options import (
    NOTED_FACTS,
    TYPED,
    Declared,
    KeyFile,
    Options,
    Rejection,
    find_reach,
    find_record_type,
    find_rejection,
    get_field_default,
    option_name,
    resolve_type_hints,
)
from modules.paths import path_exists

# type of an option -> description of its value
NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
# dashes by which word processors and web pages replace --
_DASHES = re.compile(
    "^(?=.{0,1}[\u2010-\u2015\u2212\ufe58\ufe63\uff0d])[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]+(?=[A-Za-z])"
)
_SWAP_DASHES = str.maketrans("-_", "_-")
_LINE_ENDS = {"\\", "^", "`", " "}
_MISSING = "the following arguments are required: "  # argparse's message
logger = logging.getLogger(__name__)

METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}  # other types take a text
_BOLD, _CYAN, _PLAIN = "\033[1m", "\033[36m", "\033[0m"
_Group = argparse._ActionsContainer


class _Word(str):
    """A word of the command line that differs (by identity) from other words with the same text."""


class Parser(argparse.ArgumentParser):
    """Parser of a script's options.

    A mistake causes a single message, with the option or value that was probably meant, and exit code 2. The
    help shows defaults and is colored on a terminal.
    """

    # option -> flag for messages if it was not typed, for scripts that rename options
    shown_flags: Mapping[str, str] = {}

    def __init__(self, *args: Any, add_help: bool = True, **settings: Any) -> None:
        """Make a parser without options; it takes the arguments of `ArgumentParser`."""
        self._command_words = find_front_words()  # "reelsmith.py", "train", "wan", if these were typed
        if self._command_words:
            # the help names that command instead of the script
            settings.setdefault("prog", " ".join(self._command_words))
            script_command = rf"python (?:\w+/)?{re.escape(Path(sys.argv[0]).name)}"
            typed_command = f"python {' '.join(self._command_words)}"
            description = settings.get("description") or ""
            settings["description"] = re.sub(script_command, typed_command, description)
        super().__init__(*args, add_help=False, **settings)  # type: ignore[misc]
        self.typed_flags: dict[str, str] = {}  # `dest` of each given option -> its first typed flag
        self._typed_spellings: set[str] = set()  # all typed flags
        self.key_files: list[KeyFile] = []  # settings files whose keys may be typed as options by mistake
        self.left_out: dict[str, Any] = {}  # record options that the script lacks -> values
        # whether arguments may be replaced (by a file, for example) before records are read
        self.changes_values = False
        if add_help:  # declared only for the help; `_show_help` handles both earlier
            for flag, text in {"-h": "show the most common options", "--help": "show all options"}.items():
                self.add_argument(
                    flag, action="store_true", default=argparse.SUPPRESS, dest="help", help=text
                )

    def print_help(self, file: Any = None, is_short: bool = False) -> None:
        """Print all options by group, or with `is_short` one screen of options; in color on a terminal."""
        file = file or sys.stdout
        text = self.format_short_help() if is_short else self.format_help()
        if wants_color(file):
            text = re.sub(r"(?m)^(\S.*:)$|^usage:", rf"{_BOLD}\g<0>{_PLAIN}", text)
            text = re.sub(r"(?<![\w-])--?[A-Za-z]\w*(?:-\w+)*", rf"{_CYAN}\g<0>{_PLAIN}", text)
        self._print_message(text, file)

    def format_help(self) -> str:
        """Return the help of --help: all options."""
        from modules.help_text import full_help  # imported only for -h and --help

        return full_help(self)

    def format_short_help(self) -> str:
        """Return the help of -h: options that are often needed."""
        from modules.help_text import short_help  # only -h needs it

        return short_help(self)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but report mistyped options before missing ones (often the same option)."""
        argv = sys.argv[1:] if args is None else list(args)
        self._show_help(argv)  # ends the program if help is asked for
        # find mistakes that argparse would explain worse, and convert the words to the form that it expects
        if argv and argv[-1] in _LINE_ENDS:
            # Reject a command that ends in a line-continuation character of another shell, such as ` or ^
            last_but_one, last = ["", *argv][-2:]
            takes_it = any(
                last_but_one in action.option_strings and action.nargs != 0 for action in self._actions
            )
            if not takes_it:
                self.error(
                    f"the command ends in '{last}', and its next line was not read: a line continues with \\ "
                    "as its very last character in bash, with ^ in cmd, with ` in PowerShell. Write one line"
                )
        argv = self._normalize(argv)
        self._reject_unknown(argv)
        self._reject_joined_numbers(argv)
        without_flag = [action for action in self._actions if getattr(action, "by_place", False)]
        if without_flag:
            argv = self._insert_omitted_flags(argv, without_flag)
        flags_for_messages = self._record_typed_flags(argv)
        parsed, unused = super().parse_known_args(argv, namespace)
        if unused:
            from modules.mistyped import explain_unused_words  # only mistakes need it

            positionals = self._get_positional_actions()
            self.error(explain_unused_words(self._option_string_actions, argv, unused, positionals))
        if flags_for_messages:
            parsed.typed_names = flags_for_messages  # read by `typed_names`
        typed = frozenset(self._option_string_actions[flag].dest for flag in self._typed_spellings)
        setattr(parsed, TYPED, typed)
        return parsed

    def _record_typed_flags(self, argv: Sequence[str]) -> dict[str, str]:
        """Record the flag with which each option is typed; abbreviations are completed, with a warning."""
        flags = self._option_string_actions
        self._typed_spellings.clear()
        for word in argv[: argv.index("--") if "--" in argv else None]:
            flag = word.partition("=")[0]
            typed = flag
            if flag not in flags and flag[:2] == "--":
                flag = self._complete_flag(flag)
            if flag not in flags:
                continue
            if flag != typed:
                logger.warning("%s is taken as %s. Write it in full", typed, flag)
            self.typed_flags.setdefault(flags[flag].dest, flag)
            self._typed_spellings.add(flag)
        displayed_flags: dict[str, str] = {}
        for action in self._actions:
            if action.dest in self.typed_flags:
                typed_flag = self.typed_flags[action.dest]
                for flag in action.option_strings:
                    is_switched_off = flag[:5] == "--no-"
                    if flag[:2] == "--" and not is_switched_off and flag not in self._typed_spellings:
                        displayed_flags[flag] = typed_flag
            elif action.dest in self.shown_flags:
                displayed_flags[f"--{action.dest}"] = self.shown_flags[action.dest]
        return {flag: shown for flag, shown in displayed_flags.items() if flag != shown}

    def _complete_flag(self, abbreviation: str) -> str:
        """Return the only flag that begins with an abbreviation; the abbreviation if there is none."""
        completions = [flag for flag in self._option_string_actions if flag.startswith(abbreviation)]
        return completions[0] if len(completions) == 1 else abbreviation

    def _reject_joined_numbers(self, argv: Sequence[str]) -> None:
        """Reject two numbers typed as one word for an option that takes two, such as 832x480."""
        words: list[str] = []
        for word in argv:
            words += word.split("=", 1) if word[:2] == "--" else [word]
        for flag, value in pairwise(words):
            action = self._option_string_actions.get(flag)
            numbers = JOINED.fullmatch(value)
            if numbers is None or action is None or action.type not in NUMBERS:
                continue
            if action.metavar == HEIGHT_WIDTH:
                sides = " ".join(height_width(numbers))
                self.error(f"{flag} {value}: use height and width: {flag} {sides}")
            if action.nargs == 2:
                self.error(f"{flag} {value}: use two numbers: {flag} {numbers[1]} {numbers[3]}")

    def _insert_omitted_flags(
        self, argv: Sequence[str], without_flag: Sequence[argparse.Action]
    ) -> list[str]:
        """Insert omitted flags before words that belong to options whose flag may be omitted."""
        # `without_flag` are these options (`by_place`). The first word without an option becomes the value of
        # the first of them that has none, and so on; an option with several values gets all these words.
        words = [_Word(word) for word in argv]  # argparse keeps these objects: equal words differ
        parsed, unused = self._parse_without_required(words)
        unset = [action for action in without_flag if getattr(parsed, action.dest) is action.default]
        free_words = [word for word in unused if word != "--"]
        if not free_words or not unset:
            return list(argv)
        unused_ids = {id(word) for word in unused}
        used_words = [word for word in words if id(word) not in unused_ids]
        flags = [action.option_strings[-1] for action in unset]
        takes_several = unset[0].nargs is not None
        if takes_several:
            return [*used_words, flags[0], *free_words]
        if len(free_words) > len(unset):
            self.error(
                f"{quote_command(free_words)}: {len(free_words)} words without an option, and only "
                f"{' and '.join(flags)} can be left out. Put a name with spaces in quotes."
            )
        return [*used_words, *(f"{flag}={word}" for flag, word in zip(flags, free_words, strict=False))]

    def _parse_without_required(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse as `parse_known_args` does, but report no missing options: they are reported later."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            return super().parse_known_args(words)
        finally:
            for action in required:
                action.required = True

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, but first print the help if the user asks for it."""
        argv = sys.argv[1:] if args is None else list(args)
        self._show_help(argv)
        return super().parse_known_args(self._normalize(argv), namespace)

    def _normalize(self, argv: Sequence[str]) -> list[str]:
        """Join `12`, `GB` to one word `12 GB`, and correct - and _ in option names; return the words."""
        words = list(argv)
        # from the end, so that the indices of earlier words stay valid
        for index in range(len(words) - 1, 0, -1):
            number = re.fullmatch(r"(?:--\w+=)?(?:\d+[xX])?[0-9.]+", words[index - 1])
            if number is not None and re.fullmatch(UNIT, words[index], re.IGNORECASE):
                words[index - 1 : index + 1] = [f"{number[0]} {words[index]}"]
        flags = self._option_string_actions
        end = words.index("--") if "--" in words else None  # words after `--` are not options
        for index, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            if name[:2] != "--" or name == "--" or any(flag.startswith(name) for flag in flags):
                continue
            with_other_dashes = "--" + name[2:].translate(_SWAP_DASHES)
            if with_other_dashes in flags:
                words[index] = f"{with_other_dashes}{equals}{value}"
        return words

    def _show_help(self, argv: Sequence[str]) -> None:
        help_flags = {word for word in argv if word == "-h" or (word[3:] and "--help".startswith(word))}
        if help_flags:
            self.print_help(is_short=help_flags == {"-h"})
            self.exit()

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message, without listing all options."""
        if message.startswith(_MISSING):
            missing = message.removeprefix(_MISSING).split(", ")
            message = "\n  ".join(f"{name} is missing{self._append_help(name)}" for name in missing)
        else:
            message = message.replace("\n", "\\n")
        message = plain_message(message, sys.argv)
        wait_for_first_process()
        script = find_script(self.prog) if self.prog.endswith(".py") else None
        shown = self.prog if script is None else quote_command(["python", script.as_posix()])
        if self._command_words:
            shown = quote_command(["python", *self._command_words])
        self.exit(2, f"{self.prog}: error: {message}\n{shown}{LISTS_OPTIONS}\n")

    def _append_help(self, name: str) -> str:
        """Return ": " and the help of the option that an argparse message names; "" if it has none."""
        for action in self._actions:
            names = {"/".join(action.option_strings), action.metavar, action.dest}
            if name in names and action.help:
                return f": {action.help.replace('%%', '%')}"
        return ""

    def _reject_unknown(self, argv: Sequence[str]) -> None:
        """Exit with a message about all words that look like options, but are not options of this script."""
        messages: dict[str, None] = {}  # each once, in order
        end = argv.index("--") if "--" in argv else None
        for before, word in pairwise(["", *argv[:end]]):
            looks_like_option = word.startswith("-") or _DASHES.match(word) is not None
            if not looks_like_option or word.partition("=")[0] in self._option_string_actions:
                continue
            for message in (self._explain_dash(word), self._explain_unknown(before, word)):
                if message:
                    messages[message] = None
        if messages:
            self.error(" ".join(messages))

    def _explain_dash(self, word: str) -> str:
        """Explain a word that begins with a typographic dash instead of a hyphen; return "" for any other."""
        name = word.partition("=")[0]
        plain = _DASHES.sub("--", name)
        flags = self._option_string_actions
        if plain == name or " " in name or not any(flag.startswith(plain) for flag in flags):
            return ""
        return f"{name} begins with a typographic dash, not with --. Write {plain}"

    def _explain_unknown(self, before: str, word: str) -> str:
        """Return an error message for a word that looks like an option but is not one."""
        # "" for any other word.
        # `before` is the preceding word.
        flags = self._option_string_actions
        name = word.partition("=")[0]
        if not self._looks_like_unknown_option(before, word):
            return ""
        from modules.mistyped import explain_foreign_name, guess_option  # only mistakes need it

        advice = explain_foreign_name(flags, name.lstrip("-"), self.key_files)  # for names of other programs
        abbreviated = [flag for flag in flags if flag.startswith(name)]  # argparse accepts abbreviations
        advises_abbreviated = len(abbreviated) == 1 and abbreviated[0] in advice
        if abbreviated and (not advice or advises_abbreviated):
            return ""
        has_two_dashes = word.startswith("--")
        if self._takes_value(before) and not has_two_dashes:
            return f"{word} is not an option. A value that begins with - goes after =: {before}={word}"
        if not advice and not has_two_dashes and path_exists(Path(word)):
            advice = f" For the file of this name, write ./{word}"
        return f"Unknown option {name}.{advice or guess_option(flags, name.lstrip('-'))}"

    def _looks_like_unknown_option(self, before: str, word: str) -> bool:
        """Return whether a word begins with a dash and is not an option, number or text with spaces."""
        name = word.partition("=")[0]
        if not re.match(r"--.|-[^-]", name) or name in self._option_string_actions:
            return False
        if self._negative_number_matcher.match(word) is not None:
            return False
        # argparse treats words with spaces as text
        is_text = " " in word and (self._takes_value(before) or not word.startswith("--"))
        return " " not in name and not is_text

    def _takes_value(self, word: str) -> bool:
        """Return whether a word is the flag of an option that takes a value."""
        flags = self._option_string_actions
        return word in flags and flags[word].nargs != 0

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            shown = shorten_word(str(value))
            reason = getattr(action, "refused", {}).get(value)
            if reason is not None:
                raise argparse.ArgumentError(action, f"{value}: {reason}. Use {', '.join(choices)}.")
            from modules.mistyped import find_our_option  # likewise

            ours = find_our_option(str(value).lower().replace(" ", "_"), choices)
            near = f" Did you mean {ours}?" if ours else did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"{shown} is not a choice. Use {', '.join(choices)}.{near}")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        """Count an option's values as argparse does, but name the expected values if there are too few."""
        names = action.metavar
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            tells_its_value = isinstance(names, str) and names not in (*METAVARS.values(), "TEXT")
            if action.nargs is None and tells_its_value:
                raise argparse.ArgumentError(action, f"{error.message}: {names}") from None
            if not isinstance(names, tuple):
                raise
        default = action.default
        example = f", such as {' '.join(map(str, default))}" if isinstance(default, list) else ""
        raise argparse.ArgumentError(action, f"use {len(names)} values: {' and '.join(names)}{example}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a word as argparse does, but explain the allowed values in plain words."""
        try:
            value = super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in NUMBERS:
                raise
            from modules.mistyped import explain_number  # only mistakes need it

            message = explain_number(action, arg_string, NUMBERS[action.type])
            raise argparse.ArgumentError(action, message) from None
        if isinstance(value, str) and action.choices is not None and value not in action.choices:
            alike = [choice for choice in action.choices if str(choice).lower() == value.lower()]
            return alike[0] if len(alike) == 1 else value
        return value


def typed_names(args: argparse.Namespace) -> Mapping[str, str]:
    """Return the flags that the user typed, by the flags that messages would otherwise show."""
    names: Mapping[str, str] = getattr(args, "typed_names", {})
    return names


def add_options(
    parser: argparse.ArgumentParser,
    *records: type[Options],
    group: _Group | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    refused: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Add the options of records and of their nested records to a parser.

    A nested record that is optional (`Record | None`) is added only if it is in `records` too. All
    mappings are keyed by the public names of options.

    Args:
        parser: Parser of a script.
        *records: Option records.
        group: Gets the options of records without a heading.
        without: Options that the script lacks; their records contain the default.
        defaults: Defaults that replace the declared ones.
        settings: Arguments of `add_argument` that replace the declared ones, such as `help`; also
            `flags` (additional spellings) and `refused` (rejected values with the reason).
        refused: Options that the script rejects, with the reason.
        facts: Facts of all these options that do not declare them otherwise.
    """
    overrides = _ScriptOverrides(without, defaults or {}, settings or {}, refused or {}, facts or {})
    for cls in records:
        if isinstance(parser, Parser):
            parser.key_files += cls.key_files
        target = get_or_add_group(parser, cls.heading) if cls.heading else group or parser
        for field in fields(cls):
            _add_field(parser, target, cls, field=field, overrides=overrides)
        _add_rejections(target, cls, without)


class _ScriptOverrides(NamedTuple):
    """A script's changes to the options that its records declare, by public name."""

    without: Collection[str]
    defaults: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    refused: Mapping[str, str]
    facts: Mapping[str, Any]  # of the fields that contain the record

    def merge(self, field: Field[Any]) -> "_ScriptOverrides":
        """Return these changes together with those that a field declares for the record that it contains."""
        declared = field.metadata.get("declared")
        nested = {} if declared is None else declared.settings
        return _ScriptOverrides(
            facts={**self.facts, **field.metadata},
            without={*self.without, *nested.get("without", ())},
            defaults={**nested.get("defaults", {}), **self.defaults},
            settings={**nested.get("settings", {}), **self.settings},
            refused={**nested.get("refused", {}), **self.refused},
        )


def _add_field(
    parser: argparse.ArgumentParser,
    group: _Group,
    cls: type[Options],
    *,
    field: Field[Any],
    overrides: _ScriptOverrides,
) -> None:
    """Add the option of a field, or all options of the record that it contains, to a parser."""
    declared = field.metadata.get("declared")
    if declared is not None and declared.title:
        group = get_or_add_group(parser, declared.title)
    hint = resolve_type_hints(cls)[field.name]
    if find_record_type(hint) is hint:  # the field contains a record
        if issubclass(hint, Options):  # other records are declared by a function
            add_options(parser, hint, group=group, **overrides.merge(field)._asdict())
    elif declared is not None and declared.help:
        _add_declared(parser, group, cls, field=field, declared=declared, overrides=overrides)


def _add_declared(
    parser: argparse.ArgumentParser,
    group: _Group,
    cls: type[Options],
    *,
    field: Field[Any],
    declared: Declared,
    overrides: _ScriptOverrides,
) -> None:
    """Add an option to a parser; if the script lacks it, only its default."""
    name = option_name(field)
    settings = {**declared.settings, **overrides.settings.get(name, {})}
    if name in overrides.defaults:
        default = overrides.defaults[name]
    else:
        is_required = settings.get("required") or (declared.positional and settings.get("nargs") != "*")
        default = None if is_required else get_field_default(cls, field)
    if name in overrides.without:  # its record gets the default
        _leave_out(parser, name.replace("-", "_"), default)
        return
    hint = resolve_type_hints(cls)[field.name]
    action: Any = _add_option(group, name, hint, default=default, declared=declared, settings=settings)
    # facts that argparse does not know, for messages and the page
    action.is_secret = "secret" in field.metadata
    action.reach = find_reach(field.metadata)
    action.stays = field.metadata.get("stays", ())
    action.facts = _collect_checked_facts(cls, field, action.default)
    noted = {**overrides.facts, **field.metadata}
    action.noted = {fact: noted[fact] for fact in NOTED_FACTS if fact in noted}
    if name in overrides.refused:
        reason = overrides.refused[name]
        action.rejection = Rejection(action.help or "", reason=reason, instead="", values=(), settings={})


def _leave_out(parser: argparse.ArgumentParser, argument: str, default: Any) -> None:
    """Give an option that the script lacks its default, for the record that reads it."""
    parser.set_defaults(**{argument: default})
    if isinstance(parser, Parser):
        parser.left_out[argument] = default


def _collect_checked_facts(cls: type[Options], field: Field[Any], default: Any) -> dict[str, Any]:
    """Return the declared facts that are needed to check the value of a field."""
    # `default` is the script's value if the option is not typed. A default that differs from the record's is
    # added as the fact `usual`.
    facts = {name: field.metadata[name] for name in CHECKED_INFO if name in field.metadata}
    hint = resolve_type_hints(cls)[field.name]
    kinds = typing.get_args(hint) or (hint,)
    if "place" in facts and str not in kinds:  # otherwise the values are texts
        facts["are_paths"] = True
    try:
        record_default = get_field_default(cls, field)
    except TypeError:  # the option is required
        return facts
    if isinstance(record_default, tuple):
        record_default = list(record_default)
    elif isinstance(record_default, Path):
        record_default = record_default.as_posix()
    return facts if record_default == default else {**facts, "usual": record_default}


def _add_rejections(group: _Group, cls: type[Options], without: Collection[str]) -> None:
    """Add the options of other programs that a record or its bases reject, or accept without effect."""
    attributes = [(name, getattr(cls, name)) for base in cls.__mro__ for name in vars(base)]
    for name, rejection in attributes:
        if not isinstance(rejection, Rejection) or name in without:
            continue
        reason_in_help = "" if rejection.reason else f"not needed: {rejection.instead}"
        text = "; ".join(part for part in (rejection.help, reason_in_help) if part)
        text = text or rejection.reason.replace("%", "%%")
        flag = f"--{name.replace('_', '-') if cls.dashed else name}"
        settings = dict(rejection.settings)
        flags = settings.pop("flags", ())
        action: Any = group.add_argument(flag, *flags, help=text, **settings)
        action.rejection = rejection


def get_or_add_group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the parser's argument group with this title; add it if necessary."""
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def _add_option(
    group: _Group, name: str, hint: Any, *, default: Any, declared: Declared, settings: dict[str, Any]
) -> Any:
    """Add an option to an argument group, and return its argparse action."""
    # `settings` are the arguments of `add_argument`, including those that the script changes.
    default_text = "default: the task's" if default is None else f"default {default}"
    refused = settings.pop("refused", declared.refused)
    arguments = {
        "help": declared.help.replace("{default}", default_text),
        **_list_type_arguments(hint, default, has_choices="choices" in settings),
        **settings,
    }
    action: Any
    if declared.positional:
        action = group.add_argument(name, **arguments)
    else:
        flags = (*arguments.pop("flags", declared.flags), f"--{name}")
        unique_flags = dict.fromkeys(flags)  # the name may be among the additional flags
        action = group.add_argument(*unique_flags, dest=name.replace("-", "_"), **arguments)
    # facts that argparse does not know, for the help and for messages
    action.often = declared.often
    action.refused = refused
    action.by_place = declared.by_place
    action.known_as = declared.known_as
    return action


def _list_type_arguments(hint: Any, default: Any, has_choices: bool) -> dict[str, Any]:
    """Return the arguments of `add_argument` that follow from the type and the default of a field."""
    types = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    value_type = next(kind for kind in types if kind is not type(None))
    arguments: dict[str, Any] = {"default": default.as_posix() if isinstance(default, Path) else default}
    if typing.get_origin(value_type) is tuple:
        arguments["nargs"] = "*"
        value_type = typing.get_args(value_type)[0]
        arguments["default"] = list(default) if isinstance(default, tuple) else default
    if value_type is bool:
        arguments["action"] = "store_true"
    else:
        if value_type in NUMBERS:
            arguments["type"] = value_type
        if not has_choices:
            arguments["metavar"] = METAVARS.get(value_type, "TEXT")
    return arguments


def reject_unsupported(
    parser: argparse.ArgumentParser, args: argparse.Namespace, logs_unneeded: bool = True
) -> None:
    """Raise OptionError if an unsupported option is used.

    With `logs_unneeded`, options that are not needed are logged.
    """
    for action in parser._actions:
        rejection = find_rejection(action)
        value = getattr(args, action.dest, action.default)
        if rejection is None or value in (action.default, *rejection.values):
            continue
        if rejection.reason:
            raise OptionError(f"{action.option_strings[0]} is refused: {rejection.reason}")
        if logs_unneeded:
            logger.info("%s is not needed: %s", action.option_strings[0], rejection.instead)
