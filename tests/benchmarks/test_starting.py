"""Every benchmark starts as its page says: as a script, from any folder."""

import re
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run_program

FOLDER = ROOT / "benchmarks"
STARTED = [
    path for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")
]


def test_the_page_names_scripts_that_can_be_started() -> None:
    named = re.findall(r"^\| `(\w+\.py)`", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)

    assert named
    assert {*named} <= {path.name for path in STARTED}


@pytest.mark.long
@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.stem)
def test_a_benchmark_starts_from_another_folder(script: Path, tmp_path: Path) -> None:
    # in a process of its own: in this one the project is found already
    said = run_program(
        sys.executable, script, "--help", folder=tmp_path, environment={"PYTHONPATH": ""}
    ).stdout
    assert said.startswith("usage: ")
