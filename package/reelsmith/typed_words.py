"""Keyword arguments of Python as the words of a command line, checked by the table of its script."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modules.command import name_as_typed
from modules.console import quiet
from modules.control_codes import shorten
from modules.error_output import extract_error_message
from modules.errors import OptionError, UserError
from modules.installation import EXTENSIONS
from modules.option_tables import find_table
from modules.options import TYPED
from modules.parser import Parser, reject_unsupported, typed_names
from modules.table_parser import build_parser, check_arguments
from modules.text_files import bad_character
from training.config_options import read_config_file

# names that read better in Python -> options
SHORT_NAMES = {"config": "config_file", "dataset": "dataset_config"}


class _RaisingParser(Parser):
    """A parser that raises OptionError with argparse's messages instead of ending the process."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise OptionError with argparse's message about a wrong option, instead of ending the process."""
        raise OptionError(extract_error_message(message or "the options ask for the help alone"))


class ScriptArguments:
    """The options of one script as keyword arguments.

    Attributes:
        script: Path of the script in the checkout or the package.
        known: Names of the keyword arguments that the script takes.
    """

    def __init__(self, script: Path) -> None:
        """Build the parser of a script from its stored table of options, without importing the script.

        Raises:
            UserError: If the script has no table.
        """
        table = find_table(script)
        if table is None:
            raise UserError(f"{script}: this script has no table of options")
        self.script = script
        # whether the script passes some options on to another script that it starts
        self._passes_options_on = bool(table.get("cuts_words"))
        self._parser = build_parser(table, script.name, _RaisingParser)
        self._actions = {
            flag.lstrip("-").replace("-", "_"): action
            for action in self._parser._actions
            for flag in action.option_strings
        }
        self.known = {
            *self._actions,
            *(short for short, name in SHORT_NAMES.items() if name in self._actions),
        }

    def make_argv(self, operands: Sequence[object], options: Mapping[str, Any]) -> list[str]:
        """Convert Python arguments to the command-line arguments that follow the script's name.

        Values that are None or False are omitted. A mapping becomes KEY=VALUE arguments.

        Args:
            operands: Positional arguments, such as the folder of `new`.
            options: Values by option name.

        Raises:
            OptionError: If a switch is given a value that is not a bool, if another option is True, or if a
                text has a character that no program can be given.
        """
        argv = [str(operand) for operand in operands]
        for name, value in options.items():
            name = name if name in self._actions else SHORT_NAMES.get(name, name)
            argv += _format_option(name, value, self._actions.get(name))
        for word in argv:
            reason = bad_character(word)
            if reason is not None:
                raise OptionError(f"{shorten(word, 80)!r} contains {reason}. Omit it")
        return argv

    def check(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse the options and check them as the command does before it loads a model; return their values.

        Typed options take precedence over the file of --config_file. Call this method only once.

        Raises:
            UserError: If the command itself would reject the options, with its message.
        """
        if self._passes_options_on:  # to another script, whose options this parser does not know
            return {}
        parser = self._parser
        if os.environ.get(EXTENSIONS):  # they may bring options, which the command itself checks
            return vars(parser.parse_known_args(argv)[0])
        arguments: argparse.Namespace = parser.parse_args(argv)
        with name_as_typed(typed_names(arguments)):
            reject_unsupported(parser, arguments, logs_unneeded=False)
            check_arguments(parser, arguments)
        values = vars(arguments)
        if values.get("config_file") is None:
            return values
        with quiet():  # the command logs the same warnings
            values_in_file = read_config_file(values["config_file"], parser)
        merged = dict(values)
        for name, value in values_in_file.items():
            if name not in getattr(arguments, TYPED):
                merged[name] = value
        return merged


def _format_option(name: str, value: Any, action: argparse.Action | None) -> list[str]:
    """Convert one keyword argument to command-line arguments."""
    # None and False give no arguments, and True gives only the flag. `action` is the parser's option with
    # this name; None if there is none, which the parser will report.
    flag = f"--{name}"
    if action is not None:
        # The flag of the option that a keyword argument names: `my_option` may be --my-option
        flags = {flag.lstrip("-").replace("-", "_"): flag for flag in action.option_strings}
        flag = flags[name]
        # Raise OptionError if a switch is given a value, or another option True in place of its value
        is_switch = action.nargs == 0
        if is_switch and not isinstance(value, bool | None):
            raise OptionError(f"{flag} is a switch: pass True or False, not {value!r}")
        needs_value = action.nargs not in (0, "?", "*")
        if needs_value and value is True:
            raise OptionError(f"{flag} is not a switch: pass its value in place of True")
    if value is False and isinstance(action, argparse.BooleanOptionalAction):
        return [f"--no-{flag[2:]}"]
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    # An option with its value, or with the items of a list; a mapping becomes KEY=VALUE words
    if isinstance(value, Mapping):
        value = [f"{key}={mapped}" for key, mapped in value.items()]
    if not isinstance(value, list | tuple):
        return [f"{flag}={value}"]
    items = [str(item) for item in value]
    if isinstance(action, argparse._AppendAction):  # an option that is typed once for each value
        return [f"{flag}={item}" for item in items]
    return [flag, *items]
