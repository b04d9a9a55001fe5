"""How much a reader of a function must hold in mind, the ways through the house, and names.

A function above the limits is on the list of exceptions, which only shrinks.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
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


def crowded_functions() -> set[str]:
    """Functions of the product above a limit, as the list of exceptions names them."""
    return {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}"
        for room, path in product_files()
        if room not in NOT_PRODUCT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, Function) and measure_function(node, path.name).is_crowded
    }


def test_no_further_function_asks_too_much_of_a_reader() -> None:
    exceptions = set(CROWDED.read_text(encoding="utf-8").splitlines())
    crowded = crowded_functions()

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
    for room, path in product_files():
        if room in NOT_PRODUCT or path.name == "run_tests.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))  # one at a time: all of them take 1.5 GB
        classes.update(node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        bare_functions += [(path, name) for name in functions if name.lstrip("_") in BARE]

    assert [name for name, count in classes.items() if count > 1] == []
    assert bare_functions == []
