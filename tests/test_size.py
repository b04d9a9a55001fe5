"""The size of the house: lines and files of each room, and the two ways through it.

A change that needs more raises its row in the same commit, and says why in its message.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.marks import SLOW_CASES

ROOT = Path(__file__).resolve().parent.parent

# room -> lines and files of Python at most; `scripts` are the files of the root
BUDGET = {
    "blissful_tuner": (3530, 21),
    "browser": (3060, 14),
    "data_tools": (6150, 30),
    "dataset": (13510, 61),
    "downloads": (760, 6),
    "encoders": (4020, 17),
    "flux": (2020, 15),
    "flux_2": (1130, 9),
    "frame_pack": (2740, 16),
    "generation": (5740, 23),
    "hunyuan_image": (1250, 9),
    "hunyuan_model": (2990, 17),
    "krea2": (1200, 7),
    "ltx_2": (5430, 27),
    "lumina": (1330, 10),
    "modules": (22660, 119),
    "networks": (8600, 41),
    "package": (380, 6),
    "post": (7490, 38),
    "project": (1390, 7),
    "qwen_image": (1140, 8),
    "scripts": (1610, 73),
    "stable_diffusion": (7100, 30),
    "tools": (410, 14),
    "training": (12340, 55),
    "wan": (4240, 21),
    "z_image": (650, 7),
}
TESTS = 100110  # lines
# files, functions and kinds of records of ours on each way, as `python benchmarks/way.py` prints them
WAYS = {"one clip, cache and train": (144, 944, 105), "one prompt with a LoRA": (89, 595, 54)}
LONGEST, LONG = 60, 4  # lines of a function, without decorators; how many may be longer
LARGEST, LARGE = 400, 9  # lines of a file; how many may be longer
GROWTH = 1.05
NOT_PRODUCT = {"tests", "benchmarks", "docs", "pocket"}
NAMED = re.compile(r"^(\w+/?): (.+)$", re.MULTILINE)  # a file or room, and what it is for


def product_files() -> list[tuple[str, Path]]:
    """Rooms and their files of Python. Folders without Python, and those that are not ours, do not count."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    found = [("scripts", path) for path in ROOT.glob("*.py")]
    return [*found, *((folder.name, path) for folder in folders for path in folder.rglob("*.py"))]


def sizes() -> tuple[Counter[str], Counter[str]]:
    """Lines and files by room."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for room, path in product_files():
        lines[room] += path.read_bytes().count(b"\n")
        files[room] += 1
    return lines, files


def test_no_room_is_larger_than_its_budget() -> None:
    lines, files = sizes()
    rooms = set(lines) - NOT_PRODUCT
    assert rooms == set(BUDGET)
    over = {room: (lines[room], files[room]) for room in rooms if lines[room] > BUDGET[room][0]}
    over |= {room: (lines[room], files[room]) for room in rooms if files[room] > BUDGET[room][1]}
    assert over == {}
    assert lines["tests"] <= TESTS


def long_functions() -> list[str]:
    """Functions of the product that are longer than LONGEST lines, with what they have."""
    return [
        f"{path.relative_to(ROOT).as_posix()}: {node.name} ({length})"
        for room, path in product_files()
        if room not in NOT_PRODUCT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]


def large_files() -> list[str]:
    """Files of the product that are longer than LARGEST lines, with what they have."""
    return [
        f"{path.relative_to(ROOT).as_posix()} ({length})"
        for room, path in product_files()
        if room not in NOT_PRODUCT and (length := path.read_bytes().count(b"\n")) > LARGEST
    ]


def test_few_functions_and_files_are_long() -> None:
    functions, files = long_functions(), large_files()

    assert len(functions) <= LONG, functions
    assert len(files) <= LARGE, files


def test_the_ways_through_the_house_do_not_grow() -> None:
    done = subprocess.run([sys.executable, "benchmarks/way.py"], cwd=ROOT, capture_output=True, text=True)
    told = re.findall(r"(.+): (\d+) files, (\d+) functions, (\d+) kinds of records", done.stdout)
    found = {name: tuple(map(int, counts)) for name, *counts in told}

    assert set(found) == set(WAYS), done.stderr
    for name, counts in found.items():
        assert all(count <= most * GROWTH for count, most in zip(counts, WAYS[name], strict=True)), counts


def test_a_class_name_occurs_once_and_a_function_says_what_it_does() -> None:
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for room, path in product_files()
        if room not in NOT_PRODUCT and path.name != "run_tests.py"
    }
    named = Counter(
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in named.items() if count > 1] == []
    bare = {"run", "of", "make", "read"}
    assert [
        (path, node.name)
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.lstrip("_") in bare
    ] == []


def unnamed_files(folder: Path) -> list[str]:
    """What is wrong with the list of files in a room's docstring, a line for each."""
    there = {path.stem for path in folder.glob("*.py") if path.name != "__init__.py"}
    there |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = dict(NAMED.findall(text))
    place = folder.relative_to(ROOT).as_posix()
    lines = [f"{place}: {name} is not named" for name in sorted(there - set(named))]
    lines += [f"{place}: {name} is named and not there" for name in sorted(set(named) - there)]
    return lines + [
        f"{place}: {name}: say it in four to ten words"
        for name in named
        if not 4 <= _words(named[name]) <= 10
    ]


def _words(text: str) -> int:
    return len(text.split())


def rooms_with_files() -> list[Path]:
    """All rooms of the product and the rooms in them."""
    return sorted(path.parent for room in BUDGET for path in (ROOT / room).rglob("__init__.py"))


def test_each_room_names_its_files() -> None:
    assert [line for room in rooms_with_files() for line in unnamed_files(room)] == []


if __name__ == "__main__":
    print("\n".join(line for room in rooms_with_files() for line in unnamed_files(room)))  # noqa: T201


def test_slow_cases_are_cases_of_tests_that_are_there() -> None:
    for line in SLOW_CASES.read_text(encoding="utf-8").splitlines():
        file, _, name = line.partition("[")[0].partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), line
