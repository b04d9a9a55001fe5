"""Each step from one part to the next has a test, or a reason why there is none: `tests/seams.toml`."""

import itertools
import tomllib
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from starlette.applications import Starlette

from browser.core.server import Gate, make_app
from browser.runs.runs import Runs
from package.reelsmith.commands import find_commands
from project.foreign.reading import PROGRAMS
from project.kinds.composing import KINDS, list_kinds
from project.options import find_models
from protocols.families import with_scripts
from tests.commands import ROOT
from tests.durations import is_there, read_seam_tests
from tests.test_every_kind_of_run import CELLS

TABLE = tomllib.loads((ROOT / "tests" / "seams.toml").read_text(encoding="utf-8"))
PARTS: dict[str, dict[str, list[str]]] = TABLE["parts"]
SEAMS: list[dict[str, Any]] = TABLE["seam"]
MIN_WORDS = 6  # of a reason

Seam = tuple[str, str, str]  # what is handed on, the part that makes it, the part that takes it


def list_items() -> set[str]:
    """Return what the product consists of, from its own lists."""
    scripts = {f"script:{command.path.relative_to(ROOT).as_posix()}" for command in find_commands(ROOT)}
    return {
        *scripts,
        *(f"family:{name}" for name in with_scripts()),
        *(f"kind:{kind.name}" for kind in KINDS),
        *(f"program:{program.title}" for program in PROGRAMS),
        *(f"page:{name}" for name in list_pages()),
        "package:reelsmith",
    }


def list_pages() -> set[str]:
    """Return the first words of the page's addresses."""
    gate = make_app(Runs([ROOT / "tests"]), read_only=True)
    assert isinstance(gate, Gate)
    assert isinstance(gate.app, Starlette)
    return {str(getattr(route, "path", "")).split("/")[1] for route in gate.app.routes}


def parts_of(item: str) -> list[str]:
    """Return the parts that an item belongs to: those that name it, else those whose pattern fits."""
    named = [name for name, part in PARTS.items() if item in part["is"]]
    fitting = [
        name for name, part in PARTS.items() if any(fnmatchcase(item, pattern) for pattern in part["is"])
    ]
    return named or fitting


def needed_seams() -> set[Seam]:
    """Return each thing that one part makes and another takes."""
    pairs = itertools.product(PARTS.items(), PARTS.items())
    return {
        (thing, maker, taker)
        for (maker, made), (taker, taken) in pairs
        for thing in set(made.get("makes", ())) & set(taken.get("takes", ()))
    }


def seams_of(row: dict[str, Any]) -> set[Seam]:
    """Return the seams that a row stands for; of several things, those that its parts hand on."""
    return needed_seams() & set(itertools.product(row["of"], row["from"], row["to"]))


@pytest.mark.parametrize("item", sorted(list_items()))
def test_each_thing_of_the_product_belongs_to_one_part(item: str) -> None:
    assert len(parts_of(item)) == 1, f"{item}: give it a place in tests/seams.toml"


def test_parts_name_what_there_is() -> None:
    items = list_items()
    names = {name for part in PARTS.values() for name in part["is"]}
    assert [name for name in sorted(names) if not any(fnmatchcase(item, name) for item in items)] == []


def test_each_seam_has_a_row() -> None:
    covered = set().union(*(seams_of(row) for row in SEAMS))
    assert sorted(needed_seams() - covered) == []


@pytest.mark.parametrize("row", SEAMS, ids=lambda row: f"{row['of'][0]} {row['from'][0]} {row['to'][0]}")
def test_a_row_is_needed_and_has_a_test_or_a_reason(row: dict[str, Any]) -> None:
    seams = seams_of(row)
    assert {maker for _, maker, _ in seams} == {*row["from"]}
    assert {taker for *_, taker in seams} == {*row["to"]}
    assert {thing for thing, *_ in seams} == {*row["of"]}
    assert bool(row.get("tests")) != bool(row.get("reason"))
    assert "tests" in row or len(row["reason"].split()) >= MIN_WORDS


@pytest.mark.parametrize("name", sorted(read_seam_tests()))
def test_the_test_of_a_row_exists(name: str) -> None:
    assert is_there(name)


def test_no_seam_stands_in_two_rows_by_mistake() -> None:
    counts = Counter(seam for row in SEAMS for seam in seams_of(row))
    assert [seam for seam, count in counts.items() if count > 2] == []


def test_each_family_with_each_kind_that_it_trains_is_a_cell() -> None:
    """A family is that whose script trains a model; of its models one has to be tiny in the tests."""
    by_script = {f"{entry.training_script}.py": name for name, entry in with_scripts().items()}
    needed, had = set(), set()
    for model in find_models():
        script = next(word for word in model.commands["train"].split() if word.endswith(".py"))
        for kind in list_kinds(model):
            needed.add((by_script[script], kind.name))
            if (f"{model.family} {model.task}", kind.name) in CELLS:
                had.add((by_script[script], kind.name))
    assert {family for family, _ in needed} == {*with_scripts()}
    assert sorted(needed - had) == []
