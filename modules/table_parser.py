"""Build the parser of a script from its table, and convert a parser to a table.

The parser knows what one does that is built from the records, and `check_arguments` the facts by which
records check their values: help, wrong options and the settings of the page need no record, and nothing that
the file of a record imports. Standard library only.
"""

import argparse
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from modules.installation import import_own
from modules.option_checks import check_paths, check_relations, check_value
from modules.option_tables import find_argument_name
from modules.option_values import check_characters, convert_value
from modules.options import TYPED, KeyFile, Rejection
from modules.parser import Parser, get_or_add_group
from modules.run_limits import is_limited

# attribute of an argparse action -> its value if the action's row in the table does not have it
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
    "noted": {},
}
# name of an action of a switch -> the same for attributes that argparse sets itself
_SWITCH_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "store_true": {"nargs": 0, "const": True, "default": False},
    "store_false": {"nargs": 0, "const": False, "default": True},
}
_BUILTIN_TYPES: Mapping[str, type] = {"int": int, "float": float, "str": str, "Path": Path}
_ACTIONS: Mapping[str, type[argparse.Action]] = {
    "store": argparse._StoreAction,
    "store_true": argparse._StoreTrueAction,
    "store_false": argparse._StoreFalseAction,
    "append": argparse._AppendAction,
    "extend": argparse._ExtendAction,
    "on_or_off": argparse.BooleanOptionalAction,
}
_ACTION_NAMES = {kind: name for name, kind in _ACTIONS.items()}
_DEFAULT_SUFFIX = " (default: %(default)s)"  # BooleanOptionalAction adds it in Python 3.12 and older


class _NamedType:
    """A function that parses an option's value; its module is imported when it is first called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._module, self.__name__ = name.split(":")

    def __call__(self, text: str) -> Any:
        return getattr(import_own(self._module), self.__name__)(text)


def build_parser(table: Mapping[str, Any], prog: str | None = None, kind: type[Parser] = Parser) -> Parser:
    """Return the parser of a script, equal to the parser that is built from the script's option records.

    Args:
        table: Description of the parser, as `find_table` returns it.
        prog: Name of the program in messages. None: the running program's.
        kind: Class of the parser.
    """
    settings: dict[str, Any] = {} if prog is None else {"prog": prog}
    allows_abbreviation = table.get("allow_abbrev", True)
    parser = kind(description=table["description"], allow_abbrev=allows_abbreviation, **settings)
    parser.shown_flags = table.get("shown_flags", {})
    parser.key_files = [
        KeyFile(partial(frozenset, keys), hint) for hint, keys in table.get("key_files", {}).items()
    ]
    parser.left_out = table.get("left_out", {})
    parser.set_defaults(**parser.left_out)
    parser.changes_values = table.get("changes_values", False)
    for title in table.get("groups", ()):
        get_or_add_group(parser, title)
    for section in table.get("sections", ()):
        group = get_or_add_group(parser, section["title"])
        for option in section["options"]:
            # skips the checks of `add_argument`, which passed at compile time
            action = _build_action(option)
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
    # 1. Attributes that the row lacks get the defaults of `_DEFAULTS`.
    # 2. Lists, which JSON has instead of tuples, become tuples, and names of types become the types.
    # 3. An option of another program gets its `Rejection`, from which its help may follow.
    flags = row["flags"]
    dest = find_argument_name(row)
    action_name = row.get("action", "store")
    action_class = _ACTIONS[action_name]
    defaults = {**_DEFAULTS, **_SWITCH_DEFAULTS.get(action_name, {})}
    attributes = {name: row.get(name, default) for name, default in defaults.items()}
    if action_class is argparse.BooleanOptionalAction:  # argparse's help differs between Python versions
        on_flags = [flag for flag in flags if not flag.startswith("--no-")]
        template = action_class(on_flags, dest, default=attributes["default"], help=attributes["help"])
        attributes |= {"help": template.help, "nargs": template.nargs}
    for name in ("choices", "known_as", "stays", "metavar"):
        if isinstance(attributes[name], list):
            attributes[name] = tuple(attributes[name])
    if isinstance(attributes["type"], str):
        type_name = attributes["type"]
        attributes["type"] = _BUILTIN_TYPES.get(type_name) or _NamedType(type_name)
    if "rejection" in row:
        rejection = {"help": "", "reason": "", "instead": "", "settings": {}, **row["rejection"]}
        rejection["values"] = tuple(rejection.get("values", ()))
        attributes["rejection"] = Rejection(**rejection)
        attributes["help"] = row.get("help") or _default_help(attributes["rejection"])
    if "not_given" in row:
        attributes["not_given"] = row["not_given"]
    action = action_class.__new__(action_class)
    vars(action).update(attributes, option_strings=flags, dest=dest)
    return action


class _ParsedArguments(NamedTuple):
    """The arguments of a command line, with the methods that `modules.option_checks` calls."""

    actions: Mapping[str, argparse.Action]  # by `dest`
    values: argparse.Namespace

    def find_paths(self, name: str) -> Any:
        """Return a path option's value as its record stores it: one path or several; None if unset."""
        argument = name.replace("-", "_")
        action = self.actions.get(argument)
        value = getattr(self.values, argument, None)
        if action is None or value is None:
            return None
        check_characters(name, value)
        flag = f"--{name}" if action.option_strings else name
        return convert_value(value, tuple[Path, ...] if isinstance(value, list) else Path, flag)

    def list_set(self, names: Collection[str]) -> list[str]:
        """Return which of these options differ from their defaults and are not turned off."""
        return [
            name for name in names if _is_set(self.actions.get(name.replace("-", "_")), name, self.values)
        ]

    def list_typed(self, names: Collection[str]) -> list[str]:
        """Return which of these options are set and typed on the command line."""
        typed = getattr(self.values, TYPED)
        return [name for name in self.list_set(names) if name.replace("-", "_") in typed]


def check_arguments(parser: Parser, arguments: argparse.Namespace) -> None:
    """Check typed values against the declarations of their options, before the option records do.

    If a settings file may still change values (`changes_values`), whether an option has the other options
    that it needs is left to the records. So are all warnings, which would otherwise be logged twice.

    Args:
        parser: A parser built from a compiled table.
        arguments: The arguments that it has parsed.

    Raises:
        OptionError: If a value is not allowed, if it conflicts with another option or needs one that is not
            given, or if a path is unusable.
    """
    parsed = _ParsedArguments({action.dest: action for action in parser._actions}, arguments)
    typed: Collection[str] = getattr(arguments, TYPED)
    # positional arguments have no flags
    actions = [action for action in parser._actions if action.dest in typed or not action.option_strings]
    for action in actions:
        facts: Mapping[str, Any] = getattr(action, "facts", {})
        name = _find_public_name(action)
        value = getattr(arguments, action.dest, None)
        if value is None or not facts:
            continue
        check_value(name, value, facts)
        if not _is_set(action, name, arguments):
            continue
        if parser.changes_values:  # untyped options may still change, so only typed ones can conflict
            check_relations(name, {**facts, "needs": ()}, parsed.list_typed)
        else:
            check_relations(name, facts, parsed.list_set)
    if is_limited():  # the records first check which paths may be accessed
        return
    for action in actions:
        if getattr(action, "facts", {}).get("are_paths"):
            _check_option_paths(action, parsed)


def _check_option_paths(action: argparse.Action, parsed: _ParsedArguments) -> None:
    """Raise OptionError for an unusable path; the record will log that a file is replaced."""
    info: Mapping[str, Any] = getattr(action, "facts", {})
    name = _find_public_name(action)
    flag = f"--{name}" if action.option_strings else name
    if info.get("place") != "safetensors":
        check_paths(flag, parsed.find_paths(name), info, parsed.find_paths)
        return
    from modules.console import quiet  # imported only if a file may be replaced

    with quiet():
        check_paths(flag, parsed.find_paths(name), info, parsed.find_paths)


def _find_public_name(action: argparse.Action) -> str:
    """Return an option's public name in its record: the flag that corresponds to the action's `dest`."""
    names = (flag.removeprefix("--") for flag in action.option_strings)
    return next((name for name in names if name.replace("-", "_") == action.dest), action.dest)


def _is_set(action: argparse.Action | None, name: str, arguments: argparse.Namespace) -> bool:
    """Return whether an option's value differs from its record's default and is not an "off" value."""
    value = getattr(arguments, name.replace("-", "_"), None)
    if action is None:  # the script lacks the option; the record may have a value
        return bool(value)
    info: Mapping[str, Any] = getattr(action, "facts", {})
    default = info.get("usual", action.default)
    if isinstance(value, str) and isinstance(default, str) and info.get("are_paths"):
        value, default = Path(value), Path(default)
    return bool(value != default) and value not in info.get("off", ())


def _default_help(rejection: Rejection) -> str:
    """Return the default help of an option from another program."""
    return rejection.reason.replace("%", "%%") or f"not needed: {rejection.instead}"


def describe_parser(parser: Parser) -> dict[str, Any]:
    """Return a description of a script's parser that can be stored as JSON: its options in sections.

    A section contains consecutive options of one group; a group may have several sections.
    """
    # The sections of a parser, each with its title and its options, without --help
    title_by_action = {
        id(action): group.title for group in parser._action_groups for action in group._group_actions
    }
    sections: list[dict[str, Any]] = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        title = title_by_action[id(action)]
        if not sections or sections[-1]["title"] != title:
            sections.append({"title": title, "options": []})
        sections[-1]["options"].append(_describe_action(action))
    group_titles = [group.title for group in parser._action_groups if group.title is not None]
    # the order of the groups is stored only if it does not follow from the sections
    titles_by_sections = ["positional arguments", "options", *(section["title"] for section in sections)]
    follows_sections = group_titles == list(dict.fromkeys(titles_by_sections))
    table: dict[str, Any] = {
        "description": parser.description,
        "groups": [] if follows_sections else group_titles,
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
    flags = list(action.option_strings)
    row: dict[str, Any] = {"flags": flags}
    if action.dest != find_argument_name(row):
        row["dest"] = action.dest
    action_name = _ACTION_NAMES[type(action)]
    if action_name != "store":
        row["action"] = action_name
    attributes = _collect_attributes(action)
    defaults = {**_DEFAULTS, **_SWITCH_DEFAULTS.get(action_name, {})}
    for name, value in attributes.items():
        plain = _to_json_value(value)
        if plain != _to_json_value(defaults[name]):
            row[name] = plain
    rejection: Rejection | None = vars(action).get("rejection")
    if rejection is not None:
        # The fields of a rejected option that are not empty, without its help
        facts = {"reason": rejection.reason, "instead": rejection.instead, "values": list(rejection.values)}
        row["rejection"] = {name: value for name, value in facts.items() if value}
        if row.get("help") == _default_help(rejection):  # the help that follows from the rejection
            del row["help"]
    if "not_given" in vars(action):
        row["not_given"] = vars(action)["not_given"]
    return row


def _collect_attributes(action: argparse.Action) -> dict[str, Any]:
    """Return the attributes of an option by the names of `_DEFAULTS`, with the name of its type."""
    attributes = {name: vars(action).get(name, default) for name, default in _DEFAULTS.items()}
    if attributes["type"] is not None:
        attributes["type"] = _name_type(attributes["type"])
    if isinstance(action, argparse.BooleanOptionalAction):  # sets both by itself
        attributes["help"] = (attributes["help"] or "").removesuffix(_DEFAULT_SUFFIX)
        attributes["nargs"] = None
    return attributes


def _to_json_value(value: Any) -> Any:
    """Convert a value of an argparse action, such as its choices, to JSON types."""
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _to_json_value(inner) for name, inner in sorted(value.items())}
    return value.as_posix() if isinstance(value, Path) else value


def _name_type(kind: Callable[[str], Any]) -> str:
    """Return the name that a table stores for the function that parses an option's value."""
    if isinstance(kind, _NamedType):
        return kind.name
    name = getattr(kind, "__qualname__", "")
    if _BUILTIN_TYPES.get(name) is kind:
        return str(name)
    module = import_own(kind.__module__)
    if getattr(module, name, None) is not kind:
        raise TypeError(f"{kind!r} is not a function of a module: a table cannot name it")
    return f"{kind.__module__}:{name}"
