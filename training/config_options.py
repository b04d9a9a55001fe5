"""--config_file: options from a TOML file, checked as strictly as the command line."""

import argparse
import difflib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError, UserError
from modules.option_values import int_or_float, to_path
from modules.options import (
    APPENDS,
    IMPORTS,
    IMPORTS_CLASS,
    STARTS,
    Options,
    option,
)
from modules.parser import Parser
from modules.paths import explain_missing, path_exists
from modules.run_limits import is_limited, reject_outside
from modules.text_files import parse_toml, read_text

logger = logging.getLogger(__name__)

PROJECT_TABLE = "reelsmith"  # table with settings of run_project.py
OUR_NETWORKS = "networks."  # prefix of our own network modules
LOG_SUFFIXES = (".log", ".txt")
MIN_SIMILARITY = 0.9  # minimum similarity of a mistyped name and the intended one; 1: equal


class ConfigOptions(Options):
    """The option --config_file, which names a TOML file with more options."""

    config_file: str | None = option(
        "TOML file with options by name; tables only group them; the command line overrides it"
    )


def read_config_file(name: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read options from the TOML file `name` (".toml" may be omitted), converted as on the command line.

    Tables are flattened, except for `reelsmith`, which is not for training. If a key is repeated, the last
    value is used. Empty strings count as unset. A key that resembles no option is ignored with a warning,
    because it may belong to another tool.

    Raises:
        UserError: If the file is missing or is not TOML.
        OptionError: If a key is a mistyped option, or if a value has a wrong type or is not one of the
            choices.
    """
    if name.lower().endswith((".yaml", ".yml", ".json")):
        raise UserError(
            f"--config_file {name} is not a TOML file. Write its options as TOML: network_dim = 16"
        )
    path = to_path("--config_file", name if name.endswith(".toml") else f"{name}.toml")
    actions = _map_actions_by_key(parser)
    tables = {name: value for name, value in _load(path).items() if name != PROJECT_TABLE}
    if isinstance(tables.get("datasets"), list):
        raise OptionError(f"{path} describes a data set: pass it to --dataset_config, and options here")
    flat = dict(_flatten(tables))
    values = {}
    for key, value in flat.items():
        action = actions.get(key)
        if action is None:
            _report_unknown_key(path, key, flat, actions)
            continue
        if _is_empty(value):
            continue
        if getattr(action, "reach", "") == STARTS["reach"]:
            raise OptionError(
                f"{path}: {key} starts a program, and no file may do that, which somebody else may have "
                f"written. Omit it there, and type --{key} ... with the command"
            )
        values[action.dest] = convert_value(str(path), action, value)
        _require_log_suffix(path, action, values[action.dest])
        if isinstance(parser, Parser) and f"--{key}" in action.option_strings:
            parser.typed_flags.setdefault(action.dest, f"--{key}")  # messages use the name in the file
    return values


def _report_unknown_key(
    path: Path, key: str, values: Mapping[str, Any], actions: Mapping[str, argparse.Action]
) -> None:
    """Warn about a key that is not an option, with advice for keys of Kohya's GUI."""
    # Reject misspelled options.
    from training.kohya_page import explain_key, is_kohya_gui_key  # only with a file

    if not is_kohya_gui_key(key):
        # Raise OptionError for a key that is nearly the name of an option
        close = difflib.get_close_matches(key, actions, n=1, cutoff=MIN_SIMILARITY)
        if close:
            raise OptionError(f"{path}: no option is called {key}. Did you mean {close[0]}?")
        from modules.extensions import FEATURES
        from modules.mistyped import explain_switched_off  # only with a wrong key

        switched_off = explain_switched_off(FEATURES, key)
        if switched_off:
            raise OptionError(f"{path}: no option is called {key}.{switched_off}")
        logger.warning(f"{path}: {key} is ignored because no option has that name")
        return
    advice = explain_key(key, values)
    if advice is not None:
        logger.warning(f"{path}: {key} is ignored: {advice}")


def _require_log_suffix(path: Path, action: argparse.Action, value: Any) -> None:
    """Raise OptionError if a config file sets a file to append to that is not a log, e.g. a shell script."""
    is_appended = getattr(action, "reach", "") == APPENDS["reach"]
    if is_appended and value is not None and Path(value).suffix.lower() not in LOG_SUFFIXES:
        raise OptionError(
            f"{path}: {action.dest} = {str(value)!r}: a file, which somebody else may have written, names "
            f"only logs that end in {' or '.join(LOG_SUFFIXES)}. Rename it, or type --{action.dest} ... with "
            "the command"
        )


def _is_empty(value: Any) -> bool:
    """Return whether a value is "" or a list of "", which GUIs write for options that are not set."""
    return value == "" or (isinstance(value, list) and value != [] and all(item == "" for item in value))


def _map_actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Map every name of each option that a config file may set to the option's argparse action."""
    named = {action.dest: action for action in parser._actions if action.dest not in {"help", "config_file"}}
    spelled: dict[str, argparse.Action] = {}
    for action in named.values():
        if action.nargs == 0:  # other spellings of switches may mean the opposite
            continue
        spelled |= {flag.lstrip("-"): action for flag in action.option_strings}
    return spelled | named


def check_imports(parser: argparse.ArgumentParser, values: Mapping[str, Any], place: str) -> None:
    """Raise OptionError if a value from a file imports code that no installed package provides.

    Args:
        parser: The parser of the script.
        values: Option values by argparse destination.
        place: The file with the values, for the message.
    """
    from modules.installed import require_installed  # not for --help

    for action in parser._actions:
        reach = getattr(action, "reach", "")  # what a value can do beyond the training, such as import code
        value = values.get(action.dest)
        if reach not in IMPORTS or not value:
            continue
        is_class = reach == IMPORTS_CLASS["reach"]
        module = value.rpartition(".")[0] if is_class else value
        if module and not module.startswith(OUR_NETWORKS):
            advice = f"type --{action.dest} {value}"
            remedy = "start the training itself, and type it there" if is_limited() else advice
            require_installed(f"{place}: {action.dest} = {value}", module, remedy)


def write_config_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write options as TOML that `read_config_file` can read.

    Raises:
        OptionError: If the file already exists.
        OutputError: If it cannot be written.
    """
    from modules.atomic_write import write_text  # only for the file

    reject_outside("output_config", path)
    if path.exists():
        raise OptionError(f"--output_config: {path} exists already. Remove it, or name another file")
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items()]
    write_text(path, "\n".join([*lines, ""]))


def toml_value(value: Any) -> str:
    """Return a value as TOML: lists, booleans and numbers unchanged, anything else as a quoted string."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in text) + '"'


def _load(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises UserError if it cannot be read or is not TOML."""
    try:
        return parse_toml(read_text(path))
    except OSError as error:
        # an existing path is a folder or is not readable: similar names would not help
        similar_names = "" if path_exists(path) else explain_missing(path)
        raise UserError(
            f"--config_file {path}: cannot be read ({error.strerror}).{similar_names} Pass the path of a "
            "TOML file."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config_file {path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it "
            "as UTF-8."
        ) from None
    except ValueError as error:
        raise UserError(f"--config_file {path} is not valid TOML: {error}") from None


def _flatten(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key, value


def convert_value(place: str, action: argparse.Action, value: Any) -> Any:
    """Return a TOML value as the type that the command line would give.

    Args:
        place: The file, for the message.
        action: The option of the script's parser.
        value: The value in the file.

    Raises:
        OptionError: If the value has a wrong type, or is not one of the option's choices.
    """
    if action.nargs == 0:  # a switch, which other programs also write as 0 or 1
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise _explain_wrong_value(place, action, value)
        return bool(value)
    if action.nargs is None:
        return _convert_single(place, action, value)
    items = value if isinstance(value, list) else [value]
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise _explain_wrong_value(place, action, value)
    return [_convert_single(place, action, item) for item in items]


def _convert_single(place: str, action: argparse.Action, value: Any) -> Any:
    """Convert one value of a file to the value that the option has if it is typed on the command line."""
    if value is False and action.default in (None, ""):  # other programs write false for "not set"
        return action.default
    if isinstance(value, (bool, list)) or (action.type is None and not isinstance(value, str)):
        raise _explain_wrong_value(place, action, value)
    # some programs write 64 as 64.0
    if action.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        converted = value if action.type is None else action.type(str(value))  # type: ignore[operator]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise _explain_wrong_value(place, action, value) from None
    if action.choices is not None and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise OptionError(
            f"{place}: {action.dest} = {value!r}: choose from {', '.join(choices)}."
            f"{did_you_mean(str(converted), choices)}"
        )
    return converted


def _explain_wrong_value(place: str, action: argparse.Action, value: Any) -> OptionError:
    """Return the error for a value whose type or number of values does not fit the option."""
    kind = bool if action.nargs == 0 else action.type  # an option without values is a switch
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        int_or_float: "steps, or a fraction such as 0.05",
    }
    if action.nargs in {None, 0}:
        count_text = ""
    elif isinstance(action.nargs, int):
        count_text = f", {action.nargs} in a list"
    else:
        count_text = ", or a list of them"
    return OptionError(
        f"{place}: {action.dest} = {value!r}: expected {names.get(kind, 'text in quotes')}{count_text}"
    )
