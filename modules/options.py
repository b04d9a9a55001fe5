"""From parsed arguments to frozen option records. Standard library only.

Defaults stand in `add_argument` only; an option record has none. A record's fields are str, int, float, bool, Path, tuples of
these, or another option record; where the public name misleads, the field says `metadata={"option": "public_name"}`.
"""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from modules.errors import OptionError

T = TypeVar("T")


def read_options(cls: type[T], args: argparse.Namespace) -> T:
    """Build the option record `cls` from parsed arguments.

    Each field takes the argument of its name (or of its metadata "option"); a field whose type is itself an option record is read
    the same way; text becomes Path and lists become tuples where the field says so.
    Raises TypeError where a field has no argument: that is our mistake, not the user's.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = read_options(typing.cast(type, hint), args)
            continue
        option = field.metadata.get("option", field.name)
        if not hasattr(args, option):
            raise TypeError(f"{cls.__name__}.{field.name}: no argument --{option} was added to the parser")
        values[field.name] = _convert(getattr(args, option), hint)
    return cls(**values)


def _convert(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is Path:
            return Path(value).expanduser()
        if typing.get_origin(kind) is tuple:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(_convert(item, typing.get_args(kind)[0]) for item in items)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    return value


def add_unsupported(group: argparse._ActionsContainer, *flags: str, reason: str, **settings: Any) -> None:
    """Declare an option that is listed by --help but refused when used; `reason` completes "--flag is not supported yet: ...".

    `settings` are those of `add_argument`, so that types, defaults and choices already stand.
    """
    text = settings.pop("help", "")
    action = group.add_argument(*flags, help=f"{text} (not supported yet)".strip(), **settings)
    action.unsupported_reason = reason  # type: ignore[attr-defined]


def refuse_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise OptionError where an option declared by `add_unsupported` has another value than its default."""
    for action in parser._actions:
        reason = getattr(action, "unsupported_reason", None)
        if reason is not None and getattr(args, action.dest, action.default) != action.default:
            raise OptionError(f"{action.option_strings[0]} is not supported yet: {reason}")


def true_or_false(text: str) -> bool:
    """Read a yes/no word given as the value of an option. Raises ArgumentTypeError."""
    word = text.strip().lower()
    if word in {"true", "1", "yes", "on"}:
        return True
    if word in {"false", "0", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def require(value: T | None, option: str, why: str) -> T:
    """Return `value`, or raise OptionError naming the option that has to be given."""
    if value is None:
        raise OptionError(f"{option} is missing: {why}")
    return value
