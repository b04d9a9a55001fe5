"""Build frozen option records from parsed arguments. Standard library only.

Defaults are in `add_argument` only; an option record has none. A record's fields are str, int, float, bool,
Path, tuples of these, or another option record. If the public name is misleading, the field has another name
and `metadata={"option": "public_name"}`.
"""

import argparse
import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modules.addresses import hide_secrets
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.paths import expand_path, explain_path, path_exists
from modules.text_files import bad_character

T = TypeVar("T")

MOST = 10**9  # of any number but a seed; no count, size or factor that is meant goes beyond
UNBOUNDED = {"seed"}
MOST_OF_ARGUMENT = 10_000  # characters of one KEY=VALUE

# Facts of a field, for `field(metadata=...)`; one that holds a record passes its own on to all options in it.
IDENTITY = {"resume": "identity"}  # a resumed run has to give the saved value
CHANGEABLE = {"resume": "identity", "resume_changed": True}  # unless --resume_changed is given
HABIT = {"resume": "habit"}  # it may give another one, which is warned about
FREE = {"resume": "free"}  # it may give another one
SECRET = {"secret": True}  # a key or token: shown and recorded nowhere
# What the metadata of a generated file say of an option:
SETTING = {"record": "setting"}  # its value as given; so for an option without this fact
OF_DECODING = {"record": "decoding"}  # likewise; a run that only decodes says it anew
# its value for this video, which a prompt line, an image or the task may decide
OF_REQUEST = {"record": "request"}
NO_PIXELS = {"record": "nothing"}  # nothing: it changes no pixel


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The option record of a family that has no options of its own."""


NO_OPTIONS = NoOptions()


def read_options(cls: type[T], args: argparse.Namespace) -> T:
    """Build the option record `cls` from parsed arguments.

    Each field takes the argument of its name (or of its metadata "option"). A field whose type is an option
    record is read the same way; if the type is `Record | None` and the parser has no argument for that
    record's first field, it is None. Text becomes Path and lists become tuples according to the field's type.
    Raises OptionError if a text holds what no text can (`bad_character`), if a path is empty, or if a number
    is infinite or beyond all sense; TypeError if a field has no argument: that is our mistake, not the
    user's.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        record = record_of(hint)
        if record is not None:
            is_there = record is hint or hasattr(args, option_name(dataclasses.fields(record)[0]))
            values[field.name] = read_options(record, args) if is_there else None
            continue
        option = option_name(field)
        if not hasattr(args, option):
            raise TypeError(f"{cls.__name__}.{field.name}: no argument --{option} was added to the parser")
        value = getattr(args, option)
        _check_characters(option, value)
        values[field.name] = _convert(value, hint, option)
    made = cls(**values)  # first, as a record's own checks say more
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _check_numbers(option_name(field), values[field.name])
    return made


def option_values(options: Any) -> dict[str, Any]:
    """Return the values of an option record, nested records included, by their public names."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= option_values(value) if dataclasses.is_dataclass(value) else {option_name(field): value}
    return values


def override_options(options: T, values: Mapping[str, Any]) -> T:
    """Return an option record with other values by public name, in nested records too.

    Names that no field has are left out. Raises OptionError as `read_options` does.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        name, value = option_name(field), getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = override_options(value, values)
        elif name in values:
            _check_numbers(name, values[name])
            changes[field.name] = values[name]
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def facts_of(cls: type) -> dict[str, dict[str, Any]]:
    """Return the facts of every option of a record by its public name, those of the records in it too."""
    hints = typing.get_type_hints(cls)
    facts: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(cls):
        own = {fact: value for fact, value in field.metadata.items() if fact != "option"}
        record = record_of(hints[field.name])
        inner = {option_name(field): {}} if record is None else facts_of(record)
        facts |= {name: {**own, **more} for name, more in inner.items()}
    return facts


def options_with(cls: type, fact: str, value: Any) -> tuple[str, ...]:
    """Return the public names of the options of a record of which a fact has that value."""
    return tuple(name for name, facts in facts_of(cls).items() if facts.get(fact) == value)


def record_of(hint: Any) -> Any:
    """Return the option record in a field's type, `Record` or `Record | None`; None for any other type."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def option_name(field: "dataclasses.Field[Any]") -> str:
    """Return the public name of a record's field."""
    return str(field.metadata.get("option", field.name))


def _check_characters(option: str, value: Any) -> None:
    texts = value if isinstance(value, (list, tuple)) else [value]
    for text in texts:
        if isinstance(text, Path) and "\0" in str(text):  # other bytes that are no UTF-8 may be in a name
            raise OptionError(f"--{option} holds the character NUL (\\u0000), which no file's name can have")
        found = bad_character(text) if isinstance(text, str) else None
        if found is not None:
            raise OptionError(
                f"--{option} holds {found}: set the terminal, or the file that it comes from, to UTF-8"
            )


def to_path(option: str, text: str) -> Path:
    """Return the path with `~` resolved.

    Raises OptionError for a name that no file can have, and for usual mistakes in one that is not there.
    """
    try:
        path = expand_path(text)
    except ValueError as error:
        raise OptionError(f"{option} {shorten(text, 80)!r}: {error}") from None
    why = None if path_exists(path) else explain_path(text)
    if why is not None:
        raise OptionError(f"{option} {hide_secrets(shorten(text, 200))}: {why}")
    return path


def _check_numbers(option: str, value: Any) -> None:
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(number, (int, float)) or option in UNBOUNDED:
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise OptionError(f"--{option} {number}: give a finite number")
        if abs(number) > MOST:
            raise OptionError(f"--{option} {show_number(number)}: give a number of at most {MOST:,}")


def show_number(number: float) -> str:
    """Return a number in few characters."""
    if isinstance(number, int) and abs(number) >= 10**40:
        return f"of {len(str(abs(number)))} digits"
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def _convert(value: Any, hint: Any, option: str) -> Any:
    if value is None:
        return None
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in kinds:
        return value
    for kind in kinds:
        if kind is Path:
            if not str(value):
                raise OptionError(f"--{option} is empty: give a path, or leave the option out")
            return to_path(f"--{option}", str(value))
        if typing.get_origin(kind) is tuple:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(_convert(item, typing.get_args(kind)[0], option) for item in items)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    return value


def add_unsupported(
    group: argparse._ActionsContainer,
    *flags: str,
    reason: str,
    harmless: tuple[Any, ...] = (),
    **settings: Any,
) -> None:
    """Declare an option that --help lists but that is refused when used.

    reason: completes "--flag is not supported yet: ...". harmless: values, besides the default, that are
    accepted because they change nothing. settings: those of `add_argument`, so that types, defaults and
    choices are already fixed.
    """
    text = settings.pop("help", "")
    action = group.add_argument(*flags, help=f"{text} (not supported yet)".strip(), **settings)
    action.unsupported_reason = reason  # type: ignore[attr-defined]
    action.harmless = (action.default, *harmless)  # type: ignore[attr-defined]


def add_unneeded(
    group: argparse._ActionsContainer,
    *flags: str,
    instead: str,
    values: tuple[Any, ...] = (),
    **settings: Any,
) -> None:
    """Declare an option of other programs that asks for nothing here: if it is given, a line says so.

    instead: what happens instead, a sentence. values: those that need no line, besides the default. settings:
    those of `add_argument`; a `help` stands before that sentence.
    """
    text = settings.pop("help", "")
    action = group.add_argument(*flags, help=f"{text}; not needed: {instead}".removeprefix("; "), **settings)
    action.instead = instead  # type: ignore[attr-defined]
    action.silent = (action.default, *values)  # type: ignore[attr-defined]


def list_unneeded(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return a line for each option declared by `add_unneeded` that is given."""
    return [
        f"{action.option_strings[0]} is not needed: {action.instead}"
        for action in parser._actions
        if hasattr(action, "instead") and getattr(args, action.dest) not in getattr(action, "silent", ())
    ]


def refuse_value(action: argparse.Action, *values: str, reason: str) -> None:
    """Have `Parser` say why these values are not among the choices of an option."""
    known = getattr(action, "refused", {})
    action.refused = {**known, **dict.fromkeys(values, reason)}  # type: ignore[attr-defined]


def refuse_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise OptionError if an option declared by `add_unsupported` is used."""
    for action in parser._actions:
        reason = getattr(action, "unsupported_reason", None)
        if reason is not None and getattr(args, action.dest, action.default) not in action.harmless:  # type: ignore[attr-defined]
            raise OptionError(f"{action.option_strings[0]} is not supported yet: {reason}")


def require(value: T | None, option: str, why: str) -> T:
    """Return `value`. Raises OptionError, with the option's name, if it is None."""
    if value is None:
        raise OptionError(f"{option} is missing: {why}")
    return value


def check_at_least(option: str, value: float | None, minimum: float, meaning: str) -> None:
    """Raise OptionError if a value is given and is below `minimum` or NaN.

    meaning: says what to give instead.
    """
    if value is not None and not value >= minimum:
        raise OptionError(f"{option} {value}: must be at least {minimum} ({meaning})")


def check_at_most(option: str, value: float | None, maximum: float, meaning: str) -> None:
    """Raise OptionError if a value is given and is above `maximum`; `meaning` says what to give instead."""
    if value is not None and not value <= maximum:
        raise OptionError(f"{option} {show_number(value)}: must be at most {maximum:,} ({meaning})")


def check_below(option: str, value: float | None, limit: float, meaning: str) -> None:
    """Raise OptionError if a value is given and not below `limit`; `meaning` says what to give instead."""
    if value is not None and not value < limit:
        raise OptionError(f"{option} {value}: must be below {limit} ({meaning})")


def check_seed(option: str, seed: int | None) -> None:
    """Raise OptionError if a seed does not fit the 64 bits that torch's generators take."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise OptionError(f"{option} {show_number(seed)} does not fit 64 bits: give a number below 2^64")


def int_or_float(text: str) -> int | float:
    """Parse a number of steps or a fraction: "100" -> 100, "0.05" and "5%" -> 0.05.

    Raises ArgumentTypeError if the text is neither, such as "1.5".
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a percentage") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps and not a fraction from 0 to 1")
    if text.endswith("%") or value < 1:
        if value > 1:
            raise argparse.ArgumentTypeError(f"{text!r} is more than the whole run: give at most 100%")
        return value if value else 0
    if value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of steps; fractions of the run lie between 0 and 1"
        )
    return int(value)


def split_pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """Parse `key=value` texts to a dictionary; the value may contain further `=`.

    Raises OptionError if an item has no `=` or no key, or if it is too long to be meant.
    """
    pairs: dict[str, str] = {}
    for item in items or ():
        if len(item) > MOST_OF_ARGUMENT:
            raise OptionError(
                f"{option} {' '.join(item[:40].split())}...: {MOST_OF_ARGUMENT:,} characters are the most. "
                "Write less, or leave it out"
            )
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise OptionError(
                f"{option} {item!r}: write key=value, without spaces around the =, or put all of it in quotes"
            )
        pairs[key.strip()] = value
    return pairs


def read_literals(option: str, items: Sequence[str] | None) -> dict[str, Any]:
    """Parse `key=value` texts with values as Python literals (0.9,0.95 is a tuple); bare words stay text."""
    return {key: _literal(value) for key, value in split_pairs(option, items).items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # a bare word; what is nested too deeply
        return text
