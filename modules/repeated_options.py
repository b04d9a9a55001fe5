"""Repeat the options of one command in the next command, under the names that they have there.

Standard library only.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar

from modules.errors import OptionError
from modules.option_values import Placeholder, convert_value
from modules.options import (
    Options,
    find_record_type,
    get_option_info,
    is_set,
    option_name,
    override_options,
    resolve_type_hints,
)

T = TypeVar("T", bound=Options)


class AcceptedOption(NamedTuple):
    """An option of a record: its flags, and the values that it accepts."""

    flags: tuple[str, ...]  # the public name is the last one
    is_switch: bool
    hint: Any  # type of the field
    types: tuple[Any, ...]  # possible types of its value
    choices: tuple[Any, ...] = ()  # allowed values; () for any value of its type


class RepeatedOption(NamedTuple):
    """An option of an earlier command that the following command may need too."""

    name: str
    flags: tuple[str, ...]  # all spellings
    flag: str  # the spelling that the user typed
    value: Any


def accepted_options(
    record: type[Options], flags: Mapping[str, Sequence[str]] | None = None
) -> dict[str, AcceptedOption]:
    """Return the options of a record and its nested records, by public name.

    `flags` are additional spellings by public name, as the field that contains the record declares them.
    """
    outer_flags = flags or {}
    accepted: dict[str, AcceptedOption] = {}
    for field in dataclasses.fields(record):
        name = option_name(field)
        hint = resolve_type_hints(record)[field.name]
        declared = field.metadata.get("declared")
        settings: Mapping[str, Any] = {} if declared is None else declared.settings
        nested_record = find_record_type(hint)
        if nested_record is not None:
            # The flags that a field changes for options of the record that it contains, by option
            changes = settings.get("settings", {})
            accepted |= accepted_options(
                nested_record,
                {
                    **({name: change["flags"] for name, change in changes.items() if "flags" in change}),
                    **outer_flags,
                },
            )
            continue
        spellings = outer_flags.get(name) or (() if declared is None else declared.flags)
        accepted[name] = AcceptedOption(
            flags=(*(flag for flag in spellings if flag != f"--{name}"), f"--{name}"),
            is_switch=hint is bool,
            hint=hint,
            types=typing.get_args(hint) if isinstance(hint, UnionType) else (hint,),
            choices=tuple(settings.get("choices") or ()),
        )
    return accepted


def repeat_given(options: Options, typed: Mapping[str, str] | None = None) -> list[RepeatedOption]:
    """Return a record's options that differ from their defaults, for a following command.

    `typed` maps the public names of given options to their spelling. Other options are left out, because a
    script may have its own defaults. None means that all options were given.
    """
    accepted = accepted_options(type(options))
    return [
        RepeatedOption(name, accepted[name].flags, f"--{name}" if typed is None else typed[name], value)
        for name, value in _list_given_values(options)
        if typed is None or name in typed
    ]


def _list_given_values(options: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _list_given_values(value)
        elif is_set(options, field):
            yield option_name(field), value


def join_options(
    record: type[Options], chosen: Mapping[str, Any], repeated: Iterable[RepeatedOption]
) -> dict[str, Any]:
    """Combine chosen options with the options of earlier commands; return the values by flag.

    Options that the command does not have are left out. A chosen value replaces an earlier command's value,
    unless it is a `Placeholder`. Options are spelled as the user typed them.

    Args:
        record: Record of the command's options.
        chosen: Chosen values by flag. None and False leave an option out; it is then not repeated either.
        repeated: Options of earlier commands.
    """
    accepted = accepted_options(record)
    name_by_flag = {flag: name for name, option in accepted.items() for flag in option.flags}
    # name of an option, or its flag if the command does not know it -> flag and value
    joined = {name_by_flag.get(flag, flag): (flag, value) for flag, value in chosen.items()}
    for option in repeated:
        name = next(find_names(option, accepted, name_by_flag), None)
        if name is None:
            continue
        flags = accepted[name].flags
        default_flag = flags[-1]  # --NAME
        flag, value = joined.get(name, (default_flag, option.value))
        if isinstance(value, Placeholder):
            value = option.value
        if option.flag in flags:
            flag = option.flag
        joined[name] = flag, value
    return dict(joined.values())


def find_names(
    option: RepeatedOption, accepted: Mapping[str, AcceptedOption], name_by_flag: Mapping[str, str]
) -> Iterator[str]:
    """Yield the public names in a record that match an earlier command's option, usually one or none.

    The name that matches the typed spelling comes first.
    """
    spellings = (option.flag, f"--{option.name}", *option.flags)
    names = dict.fromkeys(name_by_flag[flag] for flag in spellings if flag in name_by_flag)
    for name in names:
        if accepted[name].is_switch == isinstance(option.value, bool):
            yield name


def fill_options(options: T, repeated: Iterable[RepeatedOption]) -> T:
    """Return `options` with values of earlier commands in place of defaults.

    A value is skipped if its option is given in `options`, or excludes a given option. If the record rejects
    the combined values, only paths are used; if it rejects these too, none are.
    """
    accepted = accepted_options(type(options))
    name_by_flag = {flag: name for name, option in accepted.items() for flag in option.flags}
    info = get_option_info(type(options))
    given_names = {name for name, _ in _list_given_values(options)}
    values: dict[str, Any] = {}
    for option in repeated:
        for name in find_names(option, accepted, name_by_flag):
            excluded = {*info[name].get("excludes", ())}
            if name not in given_names and not given_names & excluded:
                values.setdefault(name, convert_value(option.value, accepted[name].hint, f"--{name}"))
    paths = {name: value for name, value in values.items() if isinstance(value, Path)}
    for candidates in (values, paths):
        with contextlib.suppress(OptionError):
            return override_options(options, candidates)
    return options
