"""Build the parser of a script from its table, and convert a parser to a table.

The parser knows what one does that is built from the records, and `check_arguments` the facts by which
records check their values: help, wrong options and the settings of the page need no record, and nothing that
the file of a record imports. Standard library only.
"""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modules.installation import import_own
from modules.option_checks import check_paths, check_relations, check_value
from modules.option_tables import read_entry
from modules.option_values import check_characters, convert_value
from modules.options import TYPED, KeyFile, Rejection
from modules.parser import Parser, group_of
from modules.run_limits import is_limited

# attribute of an action -> its value where the table does not name it
_DEFAULTS: Mapping[str, Any] = {
    "nargs": None,
    "const": None,
    "default": None,
    "type": None,
    "choices": None,
    "required": False,
    "help": None,
    "metavar": None,
    "often": False,
    "refused": {},
    "by_place": False,
    "known_as": (),
    "is_secret": False,
    "reach": "",
    "stays": (),
    "facts": {},
}
# likewise, of a switch
_OF_SWITCH: Mapping[str, Mapping[str, Any]] = {
    "store_true": {"nargs": 0, "const": True, "default": False},
    "store_false": {"nargs": 0, "const": False, "default": True},
}
_NUMBERS: Mapping[str, type] = {"int": int, "float": float, "str": str, "Path": Path}
_ACTIONS: Mapping[str, type[argparse.Action]] = {
    "store": argparse._StoreAction,
    "store_true": argparse._StoreTrueAction,
    "store_false": argparse._StoreFalseAction,
    "append": argparse._AppendAction,
    "extend": argparse._ExtendAction,
    "on_or_off": argparse.BooleanOptionalAction,
}
_NAMES = {kind: name for name, kind in _ACTIONS.items()}
_SHOWN_DEFAULT = " (default: %(default)s)"  # BooleanOptionalAction adds it in Python 3.12 and older


class _NamedType:
    """A function that reads the words of an option; its module is imported when the first word is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._module, self.__name__ = name.split(":")

    def __call__(self, text: str) -> Any:
        return getattr(import_own(self._module), self.__name__)(text)


def build_parser(table: Mapping[str, Any], prog: str | None = None, kind: type[Parser] = Parser) -> Parser:
    """Return the parser of a script, equal to the parser that is built from the script's option records.

    Args:
        table: Description of the parser, as `find_table` returns it.
        prog: Name of the program in messages. None: that of the running one.
        kind: Class of the parser.
    """
    settings: dict[str, Any] = {} if prog is None else {"prog": prog}
    allows_abbreviation = table.get("allow_abbrev", True)
    parser = kind(description=table["description"], allow_abbrev=allows_abbreviation, **settings)
    parser.shown_flags = table.get("shown_flags", {})
    parser.key_files = [
        KeyFile(partial(read_entry, "keys", hint), hint) for hint in table.get("key_files", ())
    ]
    parser.left_out = table.get("left_out", {})
    parser.set_defaults(**parser.left_out)
    parser.changes_values = table.get("changes_values", False)
    for title in table.get("groups", ()):
        group_of(parser, title)
    for name in table["sections"]:
        section = read_entry("section", name)
        group = group_of(parser, section["title"])
        for option in section["options"]:
            # without the checks of `add_argument`, which its compiling has passed
            action = _build_action(read_entry("option", option))
            action.container = group
            group._group_actions.append(action)
            parser._actions.append(action)
            for flag in action.option_strings:
                parser._option_string_actions[flag] = action
                if parser._negative_number_matcher.match(flag):
                    parser._has_negative_number_optionals.append(True)
    return parser


def _build_action(row: Mapping[str, Any]) -> Any:
    """Build the argparse action that a row of a table describes, without calling the constructor."""
    flags = row["flags"]
    dest = row.get("dest") or _name_after(flags)
    action_name = row.get("action", "store")
    kind = _ACTIONS[action_name]
    defaults = {**_DEFAULTS, **_OF_SWITCH.get(action_name, {})}
    info = {name: row.get(name, default) for name, default in defaults.items()}
    if kind is argparse.BooleanOptionalAction:  # argparse's help differs between Python versions
        on_flags = [flag for flag in flags if not flag.startswith("--no-")]
        built: argparse.Action = kind(on_flags, dest, default=info["default"], help=info["help"])
        info |= {"help": built.help, "nargs": built.nargs}
    action = kind.__new__(kind)
    vars(action).update(info, option_strings=flags, dest=dest)
    # the table is JSON: lists stand for tuples, and names for types
    for name in ("choices", "known_as", "stays"):
        if isinstance(info[name], list):
            setattr(action, name, tuple(info[name]))
    if isinstance(info["metavar"], list):
        action.metavar = tuple(info["metavar"])
    if isinstance(info["type"], str):
        action.type = _NUMBERS.get(info["type"]) or _NamedType(info["type"])
    if "rejection" in row:
        rejection = {"help": "", "reason": "", "instead": "", "settings": {}, **row["rejection"]}
        rejection["values"] = tuple(rejection.get("values", ()))
        action.rejection = Rejection(**rejection)  # type: ignore[attr-defined]
        action.help = row.get("help") or _help_of(action.rejection)  # type: ignore[attr-defined]
    if "not_given" in row:
        action.not_given = row["not_given"]  # type: ignore[attr-defined]
    return action


def check_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """Check typed values by the facts of their options, as their records do.

    The records check needs that a file may still meet (`changes_values`), and log all warnings, which would
    otherwise be logged twice.

    Args:
        parser: A parser built from a compiled table.
        arguments: The arguments that it has parsed.

    Raises:
        OptionError: If a value is not allowed, if it conflicts with another option or needs one that is not
            given, or if a path is unusable.
    """
    actions = {action.dest: action for action in parser._actions}
    typed: Collection[str] = getattr(arguments, TYPED)

    def value_of(name: str) -> Any:
        """Return the value of an option as its record has it, if it is one path or several."""
        action = actions.get(name.replace("-", "_"))
        value = getattr(arguments, name.replace("-", "_"), None)
        if action is None or value is None:
            return None
        check_characters(name, value)
        flag = f"--{name}" if action.option_strings else name
        return convert_value(value, tuple[Path, ...] if isinstance(value, list) else Path, flag)

    def list_given(names: Collection[str]) -> list[str]:
        return [name for name in names if _is_given(actions.get(name.replace("-", "_")), name, arguments)]

    def list_typed(names: Collection[str]) -> list[str]:
        return [name for name in list_given(names) if name.replace("-", "_") in typed]

    checked = [action for action in parser._actions if action.dest in typed or not action.option_strings]
    for action in checked:
        info: Mapping[str, Any] = getattr(action, "facts", {})
        name = _find_public_name(action)
        value = getattr(arguments, action.dest, None)
        if value is None or not info:
            continue
        check_value(name, value, info)
        if not _is_given(action, name, arguments):
            continue
        if parser.changes_values:
            check_relations(name, {**info, "needs": ()}, list_typed)
        else:
            check_relations(name, info, list_given)
    if is_limited():  # the records first check which paths may be accessed
        return
    for action in checked:
        info = getattr(action, "facts", {})
        if info.get("are_paths"):
            name = _find_public_name(action)
            flag = f"--{name}" if action.option_strings else name
            if info.get("place") != "safetensors":
                check_paths(flag, value_of(name), info, value_of)
                continue
            from modules.console import quiet  # imported only if a file may be replaced

            with quiet():
                check_paths(flag, value_of(name), info, value_of)


def _find_public_name(action: argparse.Action) -> str:
    """Return the name of an option in its record: the flag under which its value is stored."""
    names = (flag.removeprefix("--") for flag in action.option_strings)
    return next((name for name in names if name.replace("-", "_") == action.dest), action.dest)


def _is_given(action: argparse.Action | None, name: str, arguments: argparse.Namespace) -> bool:
    """Return whether an option's value differs from its record's default and does not turn it off."""
    value = getattr(arguments, name.replace("-", "_"), None)
    if action is None:  # the script lacks the option; the record may have a value
        return bool(value)
    info: Mapping[str, Any] = getattr(action, "facts", {})
    default = info.get("usual", action.default)
    if isinstance(value, str) and isinstance(default, str) and info.get("are_paths"):
        value, default = Path(value), Path(default)
    return bool(value != default) and value not in info.get("off", ())


def _name_after(flags: Sequence[str]) -> str:
    """Return the default name of an option: the name of its last flag."""
    return flags[-1].removeprefix("--").replace("-", "_") if flags else ""


def _help_of(rejection: Rejection) -> str:
    """Return the default help of an option of other programs."""
    return rejection.reason.replace("%", "%%") or f"not needed: {rejection.instead}"


def describe_parser(parser: Parser) -> dict[str, Any]:
    """Return a description of a script's parser that can be stored as JSON: its options in sections."""
    sections: list[dict[str, Any]] = []
    groups = [group for group in parser._action_groups if group.title is not None]
    title_of = {id(action): group.title for group in groups for action in group._group_actions}
    for action in parser._actions:
        if action.dest == "help":
            continue
        title = title_of[id(action)]
        if not sections or sections[-1]["title"] != title:
            sections.append({"title": title, "options": []})
        sections[-1]["options"].append(_describe_action(action))
    titles = [group.title for group in groups]
    in_order = dict.fromkeys(["positional arguments", "options", *(part["title"] for part in sections)])
    table: dict[str, Any] = {
        "description": parser.description,
        # stored only if the order of the sections does not show it
        "groups": [] if titles == list(in_order) else titles,
        "sections": sections,
        "shown_flags": dict(parser.shown_flags),
        "left_out": {name: _to_json_value(value) for name, value in parser.left_out.items()},
        "key_files": {file.hint: sorted(file.read_keys()) for file in parser.key_files},
    }
    if not parser.allow_abbrev:
        table["allow_abbrev"] = False
    if parser.changes_values:
        table["changes_values"] = True
    return {name: value for name, value in table.items() if value not in ({}, [])}


def _describe_action(action: argparse.Action) -> dict[str, Any]:
    """Return the row of an option: its flags, its name, and the values that differ from `_DEFAULTS`."""
    info = {name: vars(action).get(name, default) for name, default in _DEFAULTS.items()}
    flags = list(action.option_strings)
    row: dict[str, Any] = {"flags": flags}
    if action.dest != _name_after(flags):
        row["dest"] = action.dest
    kind = _NAMES[type(action)]
    if kind != "store":
        row["action"] = kind
    defaults = {**_DEFAULTS, **_OF_SWITCH.get(kind, {})}
    if info["type"] is not None:
        info["type"] = _name_type(info["type"])
    if isinstance(action, argparse.BooleanOptionalAction):  # sets both by itself
        info["help"] = (info["help"] or "").removesuffix(_SHOWN_DEFAULT)
        info["nargs"] = None
    for name, value in info.items():
        plain = _to_json_value(value)
        default = defaults[name]
        if plain != (list(default) if isinstance(default, tuple) else default):
            row[name] = plain
    rejection: Rejection | None = vars(action).get("rejection")
    if rejection is not None:
        rejection_row = {
            "reason": rejection.reason,
            "instead": rejection.instead,
            "values": list(rejection.values),
        }
        row["rejection"] = {name: value for name, value in rejection_row.items() if value}
        if row.get("help") == _help_of(rejection):  # the help that follows from the rejection
            del row["help"]
    if "not_given" in vars(action):
        row["not_given"] = vars(action)["not_given"]
    return row


def _to_json_value(value: Any) -> Any:
    """Convert a value of an argparse action to a value that JSON can store."""
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _to_json_value(inner) for name, inner in sorted(value.items())}
    return value.as_posix() if isinstance(value, Path) else value


def _name_type(kind: Callable[[str], Any]) -> str:
    """Return the name that a table stores for the type function of an option."""
    if isinstance(kind, _NamedType):
        return kind.name
    name = getattr(kind, "__qualname__", "")
    if _NUMBERS.get(name) is kind:
        return str(name)
    module = import_own(kind.__module__)
    if getattr(module, name, None) is not kind:
        raise TypeError(f"{kind!r} is not a function of a module: a table cannot name it")
    return f"{kind.__module__}:{name}"
