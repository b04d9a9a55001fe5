"""Declare options once, as fields of a record, for the parser, the checks and the messages.

    class SavingOptions(Options, title="saving"):
        output_dir: Path | None = option("folder to save into", often=True)
        save_every_n_epochs: int | None = option("save after this many epochs", least=1)
        save_n_epoch_ratio: int | None = option("this many saves", least=1, excludes="save_every_n_epochs")

A field's type determines the value: bool is a switch, a tuple takes several words, str, int, float and
Path one. `option` has all other facts. `add_options(parser, SavingOptions)` (modules/parser.py) declares all
of them to a parser, `read_options(SavingOptions, args)` makes the record. Standard library only.
"""

import argparse
import dataclasses
import functools
import logging
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

from modules.installation import is_started_by_file, reject_in_queue, reject_starting
from modules.option_checks import LIMITS, check_paths, check_relations, check_value, find_needed, list_paths
from modules.option_values import check_characters, check_numbers, convert_value
from modules.run_limits import reject_outside, reject_sending

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Facts about resuming and about the metadata of generated files; a field that contains a record passes its
# facts on to all options in that record.
IDENTITY = {"resume": "identity"}  # a resumed run must have the saved value
CHANGEABLE = {"resume": "identity", "resume_changed": True}  # unless --resume_changed is given
HABIT = {"resume": "habit"}  # a resumed run may change the value, with a warning
FREE = {"resume": "free"}  # a resumed run may change the value
HABIT_BY_NAME = {"resume": "names"}  # as HABIT, but files are compared by name
SECRET = {"secret": True}  # a key or token: shown and recorded nowhere
SETTING = {"record": "setting"}  # recorded as given; the default for options without this fact
DECODING_SETTING = {"record": "decoding"}  # recorded as given; a run that only decodes records its own value
# recorded with the value of this video, which a prompt line, an image or the task may decide
REQUEST_SETTING = {"record": "request"}
NO_PIXELS = {"record": "nothing"}  # not recorded: it changes no pixel
IN_IMAGE_FILES = {"image_files": True}  # image trainers' files record it even if it is not given
BETWEEN_BLOCKS = {"of_blocks": True}  # it acts between transformer blocks
SAMPLES_ONLY = {"acts_on": "samples"}  # in a training run, it affects only the samples
REFERENCES_ONLY = {"of_references": True}  # in a generation, it affects only reference images
NOT_COMPARED = {"typing": True}  # not an option's value: it is ignored when records are compared
BY_SCRIPT = {"by_script": True}  # set by the script, so it never counts as given by the user
# Effects of a value outside of the program; for most paths, `place` states them (`find_reach`).
# docs/new_and_run.md lists which of them somebody else's folder may use.
WRITES = {"reach": "writes"}  # it writes files; `run` allows that only in its folders
APPENDS = {"reach": "appends"}  # it appends to a file; an options file may do so only for logs
# data leaves this machine; `run` allows it only on the command line. Fact `stays`: values that send nothing;
# fact `permission`: the effect of all other values
SENDS = {"reach": "sends"}
ON_HARDWARE = {"of_hardware": True}  # it depends on the machine, so no recipe sets it
# a settings file of another library, which may send data; `run` allows it only on the command line
CONFIGURES = {"reach": "configures"}
# a program at an address that can make this one run its code; allowed only on the command line
CONNECTS = {"reach": "connects"}
STARTS = {"reach": "starts"}  # it starts a program; allowed only on the command line
IMPORTS_CLASS = {"reach": "imports class"}  # it names `package.module.Class`, whose module is imported
IMPORTS_MODULE = {"reach": "imports module"}  # it names a module, which is imported
IMPORTS = ("imports class", "imports module")
# facts that tables contain, for programs that read no record: the page, `run` and recipes
NOTED_FACTS = ("resume", "of_hardware", "of_run", "permission", "same_as", "record", "extra")
MADE_PLACES = ("new file", "new folder", "safetensors")  # values of `place` for paths that are written


def shared_with_run(help: str) -> dict[str, str]:
    """Return the `facts` of a training option that `run` has too, and passes on; `help` is for `run`."""
    return {"of_run": help}


def make_request_facts(name: str) -> dict[str, str]:
    """Return the `facts` of an option that belongs to a single request; the family gets its value as text.

    `name` is the option's key in `Request.extra`. A prompt line may set it too.
    """
    return {**REQUEST_SETTING, "extra": name}


TYPED = "typed_options"  # parsed attribute: names of typed arguments, even with default values

_UNSET: Any = object()
# field of a record -> type
resolve_type_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def option(
    help: str = "",
    *,
    default: Any = _UNSET,
    name: str = "",
    flags: tuple[str, ...] = (),
    often: bool = False,
    positional: bool = False,
    by_place: bool = False,
    title: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    one_of: Collection[str] = (),
    off: Collection[Any] = (),
    place: str = "",
    must_not_replace: str | tuple[str, ...] = (),
    hint: str = "",
    needs: str | tuple[str, ...] = (),
    excludes: str | tuple[str, ...] = (),
    why: str = "",
    ignored_without: str | tuple[str, ...] = (),
    acts_if: Mapping[str, Callable[[Any], bool]] | None = None,
    refused: Mapping[str, str] | None = None,
    known_as: tuple[str, ...] = (),
    facts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Return a field of an `Options` record, with all facts about its option.

    For a field that is a record itself, `facts` apply to all of its options, and `settings` are passed to
    `add_options`.

    Args:
        help: Help text.
        default: Default value; if left out, False for a switch and None for any other option.
        name: Public name of the option, if it differs from the name of the field.
        flags: Additional spellings.
        often: Whether the short help (-h) shows the option.
        positional: Whether the option is given by position, without a flag.
        by_place: Whether words that belong to no option are its value if its flag is not given.
        title: Heading of the option in the help, if it differs from the record's.
        minimum: Smallest allowed number; for a tuple, of each number.
        maximum: Largest allowed number.
        above: Exclusive lower limit.
        below: Exclusive upper limit.
        one_of: Allowed values, if the parser must not know them.
        off: Values that turn the option off, so that it does not count as given.
        place: What a path has to be, as `check_path` takes it; for a tuple, each path.
        must_not_replace: Options of the record whose files this option's file must not replace.
        hint: Advice that follows the message about a wrong value, or about `needs` or `excludes` if nothing
            limits the value; with `place`, the text that follows "Pass".
        needs: Option of the record that must be given too; for a tuple, one of the options.
        excludes: Options that cannot be given together with this one.
        why: Reason for `needs` or `excludes`, if `hint` is about the value.
        ignored_without: Like `needs`, but without the other option this one is ignored with a warning. In
            both cases a default value that is typed causes a warning.
        acts_if: Maps a reason why the option may have no effect to a function of the record that returns
            whether it has an effect.
        refused: Maps values of `choices` that are rejected to the reason.
        known_as: Names of the option in other programs, for the message about an unknown option.
        facts: Additional facts, such as FREE or NO_PIXELS.
        **settings: Additional arguments of `add_argument`.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    values = {"one_of": tuple(one_of), "off": tuple(off), "place": place, "hint": hint, "why": why}
    relations = {
        "needs": needs,
        "excludes": excludes,
        "ignored_without": ignored_without,
        "must_not_replace": must_not_replace,
    }
    metadata: dict[str, Any] = {**limits, **values, "option": name, "acts_if": acts_if}
    for relation, names in relations.items():
        metadata[relation] = (names,) if isinstance(names, str) else names
    metadata = {fact: value for fact, value in metadata.items() if value not in (None, "", ())}
    metadata |= facts or {}
    metadata["declared"] = Declared(
        help=help,
        default=default,
        flags=flags,
        often=often,
        positional=positional,
        by_place=by_place,
        title=title,
        refused=refused or {},
        known_as=known_as,
        settings=settings,
    )
    return dataclasses.field(metadata=metadata)


class Declared(NamedTuple):
    """Settings of an option that only the parser needs."""

    help: str
    default: Any
    flags: tuple[str, ...]
    often: bool
    positional: bool
    by_place: bool
    title: str
    refused: Mapping[str, str]
    known_as: tuple[str, ...]
    settings: Mapping[str, Any]


class Rejection(NamedTuple):
    """An option of another program that the parser recognizes: it is rejected, or accepted without effect."""

    help: str
    reason: str  # why it is rejected; "" if it is accepted
    instead: str  # why it is not needed, for the log line if it is given
    values: tuple[Any, ...]  # values that change nothing and are accepted silently, like the default
    settings: Mapping[str, Any]  # arguments of `add_argument`


def find_rejection(action: argparse.Action) -> Rejection | None:
    """Return why an argument is rejected or ignored; None for an ordinary argument."""
    return vars(action).get("rejection")


def unsupported(reason: str, help: str = "", *, values: tuple[Any, ...] = (), **settings: Any) -> Rejection:
    """Declare an option of other programs that --help lists, but that is rejected if it is used.

    `reason` completes "--flag is refused: ...". The option is a switch unless `settings` describe its value.
    """
    settings = settings or {"action": "store_true"}
    return Rejection(help=help, reason=reason, instead="", values=values, settings=settings)


def not_needed(instead: str, help: str = "", *, values: tuple[Any, ...] = (), **settings: Any) -> Rejection:
    """Declare an option of other programs that is accepted, but not needed; `instead` explains why."""
    settings = settings or {"action": "store_true"}
    return Rejection(help=help, reason="", instead=instead, values=values, settings=settings)


class KeyFile(NamedTuple):
    """A type of settings file, for the error message if one of its keys is typed as an option."""

    read_keys: Callable[[], Collection[str]]  # a function, because only error messages need its imports
    hint: str  # advice with the placeholder {key}


R = TypeVar("R", bound="Options")


@dataclass_transform(
    kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,)
)
class Options:
    """Base of option records: a frozen dataclass whose fields are options or nested records.

    The class argument `title` is the heading of the options in the help; records with the same title are
    listed together. With `dashed`, public names have - instead of _. When a record is created, declared
    limits and relations are checked first; then, if any of its options is given, `__post_init__` checks
    everything else. With `must_give`, it does so even if none is given, because the record requires one.
    """

    heading: ClassVar[str] = ""
    dashed: ClassVar[bool] = False
    must_give: ClassVar[bool] = False
    # files whose keys are likely to be typed as options of the script by mistake
    key_files: ClassVar[tuple[KeyFile, ...]] = ()
    __dataclass_fields__: ClassVar[dict[str, "dataclasses.Field[Any]"]]
    # collected when the class is created: fields by public option name, fields whose value is limited or
    # related to other options, and fields with paths
    fields_by_name: ClassVar[dict[str, "dataclasses.Field[Any]"]]
    limited_fields: ClassVar[tuple["dataclasses.Field[Any]", ...]]
    path_fields: ClassVar[tuple["dataclasses.Field[Any]", ...]]

    def __init_subclass__(cls, title: str = "", dashed: bool = False, must_give: bool = False) -> None:
        cls.heading, cls.dashed = title, dashed
        cls.must_give = must_give or cls.must_give  # inherited from base records
        # dataclass generates no methods, because compiling them takes longer than the rest of --help
        dataclasses.dataclass(init=False, repr=False, eq=False, match_args=False)(cls)
        fields = dataclasses.fields(cls)
        for field in fields if dashed else ():
            name = field.name.replace("_", "-")
            field.metadata = types.MappingProxyType({"option": name, **field.metadata})
        cls.fields_by_name = {option_name(field): field for field in fields}
        limits = {*LIMITS, "one_of", "excludes", "needs", "ignored_without"}
        cls.limited_fields = tuple(field for field in fields if not limits.isdisjoint(field.metadata))
        cls.path_fields = tuple(field for field in fields if "place" in field.metadata)

    def __init__(self, **values: Any) -> None:
        """Set the fields, with defaults for those that are not in `values`, and check them.

        Raises:
            OptionError: If a value is not allowed.
            TypeError: If a name is not a field.
        """
        fields = dataclasses.fields(self)
        unknown = values.keys() - {field.name for field in fields}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        for field in fields:
            value = values[field.name] if field.name in values else get_field_default(type(self), field)
            object.__setattr__(self, field.name, value)
        for field in self.limited_fields:
            _check_field(self, field)
        if is_started_by_file():  # options typed by the user may do everything
            for field in fields:
                _check_reach(self, field)
        # last, because errors that need no file are reported first
        for field in self.path_fields:
            prefix = "" if field.metadata["declared"].positional else "--"
            value = getattr(self, field.name)
            check_paths(f"{prefix}{option_name(field)}", value, field.metadata, self.get_value)
        # checks beyond the declared facts, if the record must be given or any of its options is
        if hasattr(self, "__post_init__") and (self.must_give or _has_set_option(self)):
            self.__post_init__()

    def get_value(self, name: str) -> Any:
        """Return the value of the option with this public name."""
        return getattr(self, self.fields_by_name[name].name)

    @classmethod
    def from_defaults(cls, **values: Any) -> Self:
        """Make the record from the given values, with defaults for all others."""
        return cls(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _list_values(self) == _list_values(other)

    def __hash__(self) -> int:
        return hash(tuple(_list_values(self).values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in _list_values(self).items())
        return f"{type(self).__name__}({shown})"


def _list_values(record: Options) -> dict[str, Any]:
    """Return a record's field values by name, without cached properties and fields marked `NOT_COMPARED`."""
    option_fields = (field for field in dataclasses.fields(record) if not field.metadata.get("typing"))
    return {field.name: getattr(record, field.name) for field in option_fields}


class NoOptions(Options):
    """The option record of a model family without options of its own."""


NO_OPTIONS = NoOptions()


def get_field_default(cls: type, field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a record's field.

    A field without a declared default has None, False or the default record, if its type allows that.

    Raises:
        TypeError: If the field has no default.
    """
    declared = field.metadata.get("declared")  # None for a field that `option` has not made
    if declared is not None and declared.default is not _UNSET:
        return declared.default
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    hint = resolve_type_hints(cls)[field.name]
    if isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint):
        return None
    if hint is bool:
        return False
    if find_record_type(hint) is not None:
        return hint()
    raise TypeError(f"{cls.__name__}.{field.name} must be given")


def is_set(record: Any, field: "dataclasses.Field[Any]") -> bool:
    """Return whether a record's field differs from its default value."""
    try:
        return bool(getattr(record, field.name) != get_field_default(type(record), field))
    except TypeError:  # the field has no default
        return True


def _has_set_option(record: Any) -> bool:
    """Return whether any option of a record or its nested records differs from its default."""
    hints = resolve_type_hints(type(record))
    for field in dataclasses.fields(record):
        if field.metadata.get("by_script"):
            continue
        # an optional record counts as given if it is not None, even with default values
        is_record = dataclasses.is_dataclass(hints[field.name])
        if _has_set_option(getattr(record, field.name)) if is_record else is_set(record, field):
            return True
    return False


def _check_field(record: Any, field: "dataclasses.Field[Any]") -> None:
    """Raise OptionError if a field's value violates its declared limits or relations."""
    info = field.metadata
    value = getattr(record, field.name)
    if value is None or info.get("declared") is None:
        return
    check_value(option_name(field), value, info)
    if is_set(record, field):
        check_relations(option_name(field), info, partial(_list_set, record))
        if info.get("ignored_without"):
            _warn_of_ignored_option(record, field)


def _warn_of_ignored_option(record: Any, field: "dataclasses.Field[Any]") -> None:
    """Warn if an option is ignored because none of the options in its `ignored_without` is given."""
    option = f"--{option_name(field)}"
    useful = field.metadata["ignored_without"]
    if not _list_set(record, useful):
        value = getattr(record, field.name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            option += f" {value}"
        reason = f"--{useful[0]} is not" if len(useful) == 1 else "none of --" + ", --".join(useful) + " is"
        logger.warning("%s is ignored because %s given", option, reason)


def list_idle(record: Any, written: Collection[str]) -> list[str]:
    """Return the public names of options that have their default value, and no effect without another option.

    `written` are the names of the arguments that the user typed.
    """
    idle = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            idle += list_idle(value, written)
        elif (
            get_argument_name(field) in written and not is_set(record, field) and not _can_act(record, field)
        ):
            idle.append(option_name(field))
    return idle


def _can_act(record: Any, field: "dataclasses.Field[Any]") -> bool:
    info = field.metadata
    relations = [info[fact] for fact in ("needs", "ignored_without") if info.get(fact)]
    return all(_list_set(record, names) for names in relations) and not list_idle_reasons(record, field)


def list_idle_reasons(record: Any, field: "dataclasses.Field[Any]") -> list[str]:
    """Return why an option has no effect, given the other values of its record, as its field declares."""
    acts_if = field.metadata.get("acts_if") or {}
    return [reason for reason, acts in acts_if.items() if not acts(record)]


def _list_set(record: Any, names: Collection[str]) -> list[str]:
    """Return which of these options (public names) are given and not turned off."""
    fields = record.fields_by_name
    given = [name for name in names if is_set(record, fields[name])]
    off = {name: fields[name].metadata.get("off", ()) for name in given}
    return [name for name in given if getattr(record, fields[name].name) not in off[name]]


def find_reach(facts: Mapping[str, Any]) -> str:
    """Return an option's effect outside of this program, such as "writes" or "sends"; "" if it has none."""
    return str(facts.get("reach", "writes" if facts.get("place") in MADE_PLACES else ""))


def _check_reach(record: Any, field: "dataclasses.Field[Any]") -> None:
    """Raise OptionError if a file sets an option with an effect that only a user may request."""
    value = getattr(record, field.name)
    reach = find_reach(field.metadata)
    name = option_name(field)
    if reach in ("writes", "appends"):
        for path in list_paths(value):
            reject_outside(name, path)
        return
    # only these options are compared with their defaults: some records have defaults that cannot be made
    if reach not in ("starts", "connects", "sends", "configures") or not is_set(record, field):
        return
    if reach == "starts":
        reject_starting(name)
    elif reach == "connects":
        reject_starting(name, "joins other programs, which may run code here")
    elif reach in ("sends", "configures"):
        sends_nothing = value in field.metadata.get("stays", ())
        if not sends_nothing:
            reject_sending(name, value, run_has_option="of_run" in field.metadata)
        if reach == "configures":
            reject_in_queue(name)


def read_options(cls: type[R], args: argparse.Namespace) -> R:
    """Build the option record `cls` from parsed arguments.

    Each field takes the argument of its name (or of its metadata "option"). A field whose type is an option
    record is read in the same way; if the type is `Record | None` and the parser has no argument for that
    record's first field, the field is None. Text becomes Path and lists become tuples according to the
    field's type. Logs a warning for options that are typed with their default values and have no effect.

    Raises:
        OptionError: If a text contains a forbidden character (`bad_character`), if a path is empty, or if a
            number is infinite or absurdly large.
        TypeError: If a field has no argument, which is a bug.
    """
    values: dict[str, Any] = {}
    records: set[str] = set()  # names of fields that contain a record
    for field in cls.fields_by_name.values():
        hint = resolve_type_hints(cls)[field.name]
        record = find_record_type(hint)
        if record is None:
            values[field.name] = _read_option(cls, field, args)
        else:
            records.add(field.name)
            is_declared = record is hint or hasattr(args, option_name(dataclasses.fields(record)[0]))
            values[field.name] = read_options(record, args) if is_declared else None
    options = cls(**values)  # first, because a record's own checks explain more
    typed: Collection[str] = getattr(args, TYPED, ())
    for option, field in cls.fields_by_name.items():
        is_typed = field.name not in records and option.replace("-", "_") in typed
        if is_typed and not is_set(options, field):
            # Warn if an option typed with its default value has no effect, because another option is missing
            # Values other than the default are rejected or reported by `_check_field`. Default values are
            # accepted,
            # because commands written for other programs contain them.
            flags = find_needed(field.metadata, partial(_list_set, options))
            if flags:
                logger.warning("--%s has no effect without %s", option_name(field), flags)
            if field.metadata.get("ignored_without"):
                _warn_of_ignored_option(options, field)
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            check_numbers(option_name(field), value)
    return options


def _read_option(cls: type[Options], field: "dataclasses.Field[Any]", args: argparse.Namespace) -> Any:
    """Return the value of one option, converted to the type of its field."""
    option = option_name(field)
    argument = option.replace("-", "_")
    declared = field.metadata.get("declared")
    if not hasattr(args, argument):
        # an option without help is not declared to every parser; its record then has the default
        if declared is None or declared.help:
            raise TypeError(f"{cls.__name__}.{field.name}: no argument --{option} was added to the parser")
        return get_field_default(cls, field)
    value = getattr(args, argument)
    if value is None or isinstance(value, bool):  # as in most options
        return value
    check_characters(option, value)
    is_positional = declared is not None and declared.positional
    return convert_value(
        value, resolve_type_hints(cls)[field.name], option if is_positional else f"--{option}"
    )


def option_values(options: Any) -> dict[str, Any]:
    """Return the values of an option record and its nested records, by public option name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values |= option_values(value) if dataclasses.is_dataclass(value) else {option_name(field): value}
    return values


def override_options(options: T, values: Mapping[str, Any]) -> T:
    """Return a copy of an option record with some values replaced, by public name, in nested records too.

    Unknown names are ignored. Raises OptionError if a value is not allowed.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        name = option_name(field)
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = override_options(value, values)
        elif name in values:
            check_numbers(name, values[name])
            changes[field.name] = values[name]
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


def _collect_info(cls: type) -> dict[str, dict[str, Any]]:
    """Return the settings of a record's options by public name, including options of nested records."""
    hints = resolve_type_hints(cls)
    info: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(cls):
        outer = {fact: value for fact, value in field.metadata.items() if fact not in {"option", "declared"}}
        record = find_record_type(hints[field.name])
        inner = {option_name(field): {}} if record is None else get_option_info(record)
        for name, info_inside in inner.items():
            info[name] = {**outer, **info_inside}
    return info


# cached for each record; callers must not change the result
get_option_info: Callable[[type], dict[str, dict[str, Any]]] = functools.cache(_collect_info)


def replace_synonyms(info: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace synonyms among values, such as "va" by "av", so that equivalent values compare equal.

    Args:
        info: Facts of options by public name; `same_as` maps each synonym to its replacement.
        values: Values by public name.
    """
    plain = dict(values)
    for name, value in values.items():
        same_as = info.get(name, {}).get("same_as", {})
        if isinstance(value, str):
            plain[name] = same_as.get(value, value)
    return plain


def options_with(cls: type, fact: str, value: Any) -> tuple[str, ...]:
    """Return the names of a record's options whose setting `fact` has this value."""
    return tuple(name for name, info in get_option_info(cls).items() if info.get(fact) == value)


def list_given_with(record: Any, fact: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the public names of given options whose declaration contains `fact`, also in nested records."""
    names: list[str] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            names += list_given_with(value, fact)
        elif field.metadata.items() >= fact.items() and is_set(record, field):
            names.append(option_name(field))
    return tuple(names)


def find_record_type(hint: Any) -> Any:
    """Return the option record class in a field's type (`Record` or `Record | None`); None otherwise."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def option_name(field: "dataclasses.Field[Any]") -> str:
    """Return the public name of a field's option, without --."""
    return str(field.metadata.get("option", field.name))


def get_argument_name(field: "dataclasses.Field[Any]") -> str:
    """Return the name of an option's value in the namespace of parsed arguments."""
    return option_name(field).replace("-", "_")
