"""What tests take, and which of them have a reason to take long."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
DURATIONS = TESTS / "durations.toml"
HEADER = """# Processor seconds of a case of each test that takes more than NOTED (tests/marks.py).
# Of several cases it is the middle one.
# `python -m pytest --measure-tests` measures the tests that it runs, and writes this table.
"""


def read_durations(path: Path = DURATIONS) -> dict[str, float]:
    """Return the seconds of the tests that take long, by their names without those of their cases."""
    return _parse(path) if path.is_file() else {}


def write_durations(durations: Mapping[str, float], path: Path = DURATIONS) -> None:
    """Write the table anew, sorted by name, without tests that are gone."""
    rows = [f'"{name}" = {seconds:.2f}\n' for name, seconds in sorted(durations.items()) if is_there(name)]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")


def read_heavy(path: Path = TESTS / "heavy.toml") -> dict[str, str]:
    """Return why tests of the default tier may take long, by their names."""
    return _parse(path)


def read_seam_tests(path: Path = TESTS / "seams.toml") -> set[str]:
    """Return the tests that go over the steps from one part to the next."""
    table = _parse(path)
    return {name for row in (*table["seam"], *table["way"]) for name in row.get("tests", ())}


def is_there(name: str) -> bool:
    """Return whether a file has the test of this name."""
    file, _, function = name.partition("::")
    return re.search(rf"^def {function}\(", _read_file(TESTS.parent / file), re.MULTILINE) is not None


@cache
def _read_file(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _parse(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
