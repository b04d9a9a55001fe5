"""Every fact of every declared option is kept: limits, choices, what an option needs, what it excludes."""

import importlib
import itertools
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError
from modules.option_values import check_numbers, to_path, value_argv
from modules.options import (
    BY_SCRIPT,
    Options,
    find_record_type,
    get_field_default,
    option,
    option_name,
    read_options,
    resolve_type_hints,
)
from modules.parser import Parser, add_options
from runtime.options import SwapOptions
from training.options import TrainingOptions

ROOT = Path(__file__).resolve().parent.parent.parent


def _records(base: type[Options] = Options) -> set[type[Options]]:
    own = {one for one in base.__subclasses__() if _is_of_product(one)}
    return own.union(*map(_records, base.__subclasses__()))


def _is_of_product(record: type[Options]) -> bool:
    """Return whether a class can be found under its name: what `slots` replaced lives on for a while."""
    module = sys.modules[record.__module__]
    return record.__module__ in MODULES and getattr(module, record.__name__, None) is record


def _list_modules() -> Iterator[str]:
    """Yield the modules of rooms that declare records of options."""
    for file in sorted(ROOT.glob("*/**/*.py")):
        path = file.relative_to(ROOT)
        is_product = path.parts[0] not in {"tests", "build", "docs", "benchmarks"} and path.parts[0][0] != "."
        if is_product and DECLARES.search(file.read_text(encoding="utf-8")):
            yield ".".join(path.with_suffix("").parts)


DECLARES = re.compile(r"^class \w+\(.*Options\b.*\):", re.MULTILINE)
MODULES = [*_list_modules()]
for name in MODULES:  # all, so that each worker has the same cases, whatever it has imported
    importlib.import_module(name)
RECORDS = sorted(_records(), key=lambda one: (one.__name__, one.__module__))


@pytest.mark.parametrize(
    "record", [one for one in RECORDS if hasattr(one, "__post_init__")], ids=lambda one: one.__name__
)
def test_a_record_without_given_options_has_nothing_to_reject(
    record: type[Options], caplog: pytest.LogCaptureFixture
) -> None:
    """Its rules are not asked then; a record that asks for an option says so."""
    try:
        made = record()
    except TypeError:  # one of its options has no default, so that some are always given
        return
    except OptionError:
        assert record.must_give
        return
    assert not record.must_give
    made.__post_init__()  # type: ignore[attr-defined]  # as if some were given
    assert not caplog.records


class _OfAScript(Options):
    """A record with one value of the user, and one that the script sets."""

    number: int = option("a number", default=0)
    of_script: int = option(default=0, facts=BY_SCRIPT)

    def __post_init__(self) -> None:
        raise OptionError("the rules are asked")


def test_a_value_of_the_script_does_not_ask_the_rules_of_a_record() -> None:
    assert _OfAScript(of_script=3).of_script == 3
    with pytest.raises(OptionError, match="the rules are asked"):
        _OfAScript(number=1, of_script=3)


def _with(*facts: str) -> list[Any]:
    return [
        pytest.param(record, field, id=f"{record.__name__}.{option_name(field)}")
        for record in RECORDS
        for field in fields(record)
        if {*facts} & {*field.metadata}
    ]


def _given(record: type[Options], name: str) -> Any:
    """A value of a field that is not its default, within its limits."""
    field = next(field for field in fields(record) if name in {field.name, option_name(field)})
    hint, place = resolve_type_hints(record)[field.name], field.metadata.get("place")
    kind = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))
    if kind is bool:
        return True
    if kind in (int, float):
        minimum = field.metadata.get("minimum", field.metadata.get("above", 0))
        default = field.metadata["declared"].default
        maximum = field.metadata.get("maximum", 1e9)
        return kind(
            min(max(2 if default == 1 else 1, minimum + 1), maximum if default != maximum else maximum / 2)
        )
    if "choices" in field.metadata["declared"].settings:
        declared = field.metadata["declared"]
        return next(choice for choice in declared.settings["choices"] if choice != declared.default)
    if kind is Path and place in ("there", "file", "folder"):
        return ROOT if place == "folder" else Path(__file__)
    if kind is Path or kind is str:
        words = field.metadata.get("one_of", ("x",))
        return kind(next(word for word in words if word != field.metadata["declared"].default))
    if place in ("there", "file"):
        return (Path(__file__),)
    kinds = typing.get_args(hint)
    inner = next(kind for kind in (*kinds, *typing.get_args(kinds[0])) if kind in (int, float, str, Path))
    return (inner("1"),)


def _make(record: type[Options], **values: Any) -> Options:
    """The record with these values, and something for each field that must be given."""
    for field in fields(record):
        if field.name in values or find_record_type(resolve_type_hints(record)[field.name]) is not None:
            continue
        try:
            get_field_default(record, field)
        except TypeError:
            values[field.name] = _given(record, field.name)
    for field in fields(record):
        inner = find_record_type(resolve_type_hints(record)[field.name])
        if inner is not None and inner is resolve_type_hints(record)[field.name] and field.name not in values:
            values[field.name] = _make(inner)
    return record(**values)


@pytest.mark.parametrize(("record", "field"), _with("minimum", "maximum", "above", "below"))
def test_a_number_out_of_its_limits_is_refused_by_name(record: type[Options], field: "Field[Any]") -> None:
    info = field.metadata
    wrong = {"minimum": -1, "above": 0, "maximum": 1, "below": 0}
    for fact, step in wrong.items():
        if fact not in info:
            continue
        is_tuple = "tuple" in str(resolve_type_hints(record)[field.name])
        value: Any = info[fact] + step
        with pytest.raises(OptionError, match=f"^--{option_name(field)} .*: use a number "):
            _make(record, **{field.name: (value,) if is_tuple else value})
    if resolve_type_hints(record)[field.name] in (float, float | None):
        with pytest.raises(OptionError, match=f"^--{option_name(field)} nan"):
            _make(record, **{field.name: float("nan")})


@pytest.mark.parametrize(("record", "field"), _with("one_of"))
def test_a_word_that_is_no_choice_is_refused_by_name(record: type[Options], field: "Field[Any]") -> None:
    for word in ("nothing", field.metadata["one_of"][0].swapcase()):  # case counts, as it does in the code
        with pytest.raises(OptionError, match=f"^--{option_name(field)} {word}: use "):
            _make(record, **{field.name: word})


@pytest.mark.parametrize(("record", "field"), _with("place"))
def test_a_path_that_cannot_be_meant_is_refused_by_name(
    record: type[Options], field: "Field[Any]", tmp_path: Path
) -> None:
    place, is_tuple = field.metadata["place"], "tuple" in str(resolve_type_hints(record)[field.name])
    wrong = {"there": tmp_path / "x", "file": tmp_path, "new folder": Path(__file__)}
    path = wrong.get(place, Path(__file__) / "x" if place.startswith(("new", "safe")) else Path(__file__))
    names = {option_name(one): one.name for one in fields(record)}
    needed = {names[name]: _given(record, names[name]) for name in field.metadata.get("needs", ())[:1]}
    with pytest.raises(OptionError, match=rf"^(--)?{option_name(field)} {path}: ") as raised:
        _make(record, **{**needed, field.name: (path,) if is_tuple else path})
    assert re.search(r"Pass|pass|Choose", str(raised.value))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30", "text", "", "1" + "0" * 30])
def test_no_option_takes_an_absurd_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add_options(parser, TrainingOptions)
    numbers = [action for action in parser._actions if action.type in (int, float) and action.dest != "seed"]
    assert len(numbers) > 40
    for action in numbers:
        action.required = False
        name = action.option_strings[-1].removeprefix("--")
        words = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
        typed = [f"--{name}", *words] if len(words) > 1 else [f"--{name}={value}"]
        with pytest.raises((OptionError, SystemExit)) as raised:
            check_numbers(name, getattr(parser.parse_args(typed), action.dest))
        assert f"--{name}" in f"{raised.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(("record", "field"), _with("must_not_replace"))
def test_a_file_that_is_read_is_not_replaced(
    record: type[Options], field: "Field[Any]", tmp_path: Path
) -> None:
    names = {option_name(one): one for one in fields(record)}
    file = tmp_path / "x.safetensors"
    file.touch()
    for other in field.metadata["must_not_replace"]:
        both = [field, names[other]]
        needed = [names[need] for one in both for need in one.metadata.get("needs", ())]
        values = {one.name: _given(record, one.name) for one in needed}
        values[names[other].name] = (
            (file,) if "tuple" in str(resolve_type_hints(record)[names[other].name]) else file
        )
        with pytest.raises(OptionError, match="would be lost. Pass a new name|exclude each other"):
            _make(record, **{**values, field.name: file})


@pytest.mark.parametrize(("record", "field"), _with("needs"))
def test_an_option_without_what_it_needs_is_refused(record: type[Options], field: "Field[Any]") -> None:
    with pytest.raises(OptionError, match=f"^--{option_name(field)} needs --"):
        _make(record, **{field.name: _given(record, field.name)})


def test_a_value_that_turns_an_option_off_is_none_that_another_one_needs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Scripts have defaults of their own: 0 blocks are swapped in generation."""
    for blocks, is_ignored in ((None, True), (0, True), (2, False)):
        caplog.clear()
        SwapOptions(blocks_to_swap=blocks, block_swap_ring_size=3)
        assert ("--block_swap_ring_size 3 is ignored because" in caplog.text) == is_ignored


def _default(record: type[Options], field: "Field[Any]") -> Any:
    """The default of a field; None: it has none or is a switch, so that what is typed differs from it."""
    try:
        default = get_field_default(record, field)
    except TypeError:
        return None
    return None if default is False else default


def _stands_alone(record: type[Options]) -> bool:
    """Whether the record can be made without anything that is typed."""
    try:
        record()
    except (TypeError, OptionError):
        return False
    return True


WITH_DEFAULT_VALUES = [
    case
    for case in _with("needs", "ignored_without")
    if _default(*case.values) is not None and _stands_alone(case.values[0])
]


@pytest.mark.parametrize(("record", "field"), WITH_DEFAULT_VALUES)
def test_a_usual_value_that_is_typed_alone_is_told(
    record: type[Options], field: "Field[Any]", caplog: pytest.LogCaptureFixture
) -> None:
    name = option_name(field)
    parser = Parser()
    add_options(parser, record)
    args = parser.parse_args([f"--{name}", *value_argv(_default(record, field))])

    read_options(record, args)

    (line,) = caplog.messages
    reason = r"(--\w+ is not|none of --\w+(, --\w+)* is) given"
    assert re.fullmatch(rf"--{name}(( \S+)? is ignored because {reason}| has no effect without --.*)", line)
    # one that nobody typed says nothing
    caplog.clear()
    read_options(record, parser.parse_args([]))
    assert not caplog.messages


@pytest.mark.parametrize(("record", "field"), _with("excludes"))
def test_an_option_beside_what_it_excludes_is_refused(record: type[Options], field: "Field[Any]") -> None:
    names = {option_name(one): one.name for one in fields(record)}
    for other in field.metadata["excludes"]:
        both = [one for one in fields(record) if one.name in (field.name, names[other])]
        needed = [names[need] for one in both for need in one.metadata.get("needs", ())]
        values = {name: _given(record, name) for name in (*needed, field.name, names[other])}
        with pytest.raises(OptionError, match=f"--{option_name(field)} and --{other} exclude each other"):
            _make(record, **values)


def test_facts_name_options_of_their_record() -> None:
    for record in RECORDS:
        names = {option_name(field) for field in fields(record)}
        for field in fields(record):
            for fact in ("needs", "excludes", "ignored_without", "must_not_replace"):
                assert {*field.metadata.get(fact, ())} <= names, record


def test_a_typographic_dash_is_named_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add_options(parser, TrainingOptions)
    flags = [action.option_strings[-1] for action in parser._actions if action.option_strings[-1] != "-h"]
    for flag, dash in zip(flags, itertools.cycle(("\u2013-", "\u2014", "-\u2011", "\u2212\u2212"))):
        with pytest.raises(SystemExit):
            parser.parse_args([dash + flag.removeprefix("--"), "x"])
        assert f"begins with a typographic dash, not with --. Write {flag}" in capsys.readouterr().err


def test_dashes_and_capital_letters_of_guides_are_understood() -> None:
    parser = Parser()
    parser.add_argument("--no_metadata", action="store_true")
    parser.add_argument("--save-path")
    parser.add_argument("--v2v_noise_mode", choices=("traditional", "direct"))

    found = parser.parse_args(["--no-metadata", "--save_path=a-b_c", "--v2v-noise-mode", "Traditional"])

    typed = {"no_metadata": True, "save_path": "a-b_c", "v2v_noise_mode": "traditional"}
    assert vars(found) == {**typed, "typed_options": {*typed}}


def test_quotes_around_a_path_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "my model.safetensors").touch()
    (tmp_path / "'odd'").touch()

    for text in (f'"{tmp_path}/my model.safetensors"', f"'{tmp_path}/my model.safetensors'"):
        assert to_path("--dit", text) == tmp_path / "my model.safetensors"
    assert to_path("--dit", f"{tmp_path}/'odd'") == tmp_path / "'odd'"
