"""How much a reader of a function must hold in mind, the ways through the house, and names.

A function above the limits is on the list of exceptions, which only shrinks.
"""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.house import Function, measure_function

ROOT = Path(__file__).resolve().parent.parent

# Files and functions of ours on each way. A commit that adds no feature may not raise them, and a feature
# that is off adds none. `python benchmarks/way.py` prints kinds of records too.
WAYS = {
    "one clip, cache and train": {"files": 180, "functions": 1185},
    "one prompt with a LoRA": {"files": 102, "functions": 644},
}
# functions that were above a limit when the limits were made: `file: name`, one a line
CROWDED = ROOT / "tests" / "data" / "crowded_functions.txt"
NOT_PRODUCT = {"tests", "benchmarks", "docs", "pocket"}
BARE = {"run", "of", "make", "read"}  # names of functions that say nothing


def product_files() -> list[tuple[str, Path]]:
    """Rooms and their files of Python. Folders without Python, and those that are not ours, do not count."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    found = [("scripts", path) for path in ROOT.glob("*.py")]
    return [*found, *((folder.name, path) for folder in folders for path in folder.rglob("*.py"))]


@dataclass(frozen=True)
class FileNames:
    """Names of what a file defines."""

    path: Path
    classes: tuple[str, ...]
    functions: tuple[str, ...]  # at its top
    crowded: tuple[str, ...]  # functions above a limit


@functools.cache
def read_product() -> list[FileNames]:
    """Read each file of the product once; one at a time, as all trees take 1.5 GB."""
    found = []
    for room, path in product_files():
        if room in NOT_PRODUCT:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | Function)]
        functions = [node for node in nodes if isinstance(node, Function)]
        found.append(
            FileNames(
                path,
                classes=tuple(node.name for node in nodes if isinstance(node, ast.ClassDef)),
                functions=tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef)),
                crowded=tuple(
                    node.name for node in functions if measure_function(node, path.name).is_crowded
                ),
            )
        )
    return found


def test_no_further_function_asks_too_much_of_a_reader() -> None:
    exceptions = set(CROWDED.read_text(encoding="utf-8").splitlines())
    crowded = {
        f"{file.path.relative_to(ROOT).as_posix()}: {name}"
        for file in read_product()
        for name in file.crowded
    }

    assert crowded - exceptions == set(), "unfold these: one statement, one thought"
    assert exceptions - crowded == set(), "these are below the limits now: take them off the list"


@pytest.mark.slow
def test_the_ways_through_the_house_do_not_grow() -> None:
    done = subprocess.run([sys.executable, "benchmarks/way.py"], cwd=ROOT, capture_output=True, text=True)
    lines = re.findall(r"(.+): (\d+) files, (\d+) functions, \d+ kinds of records", done.stdout)
    found = {name: {"files": int(files), "functions": int(functions)} for name, files, functions in lines}

    assert set(found) == set(WAYS), done.stderr
    over = [
        f"{name}: {count} {what}, {WAYS[name][what]} before"
        for name, counts in found.items()
        for what, count in counts.items()
        if count > WAYS[name][what]
    ]
    assert over == []


def test_a_class_name_occurs_once_and_a_function_says_what_it_does() -> None:
    classes: Counter[str] = Counter()
    bare_functions = []
    for file in read_product():
        if file.path.name == "run_tests.py":
            continue
        classes.update(file.classes)
        bare_functions += [(file.path, name) for name in file.functions if name.lstrip("_") in BARE]

    assert [name for name, count in classes.items() if count > 1] == []
    assert bare_functions == []
