"""One tiny project for all tests of faults: models, clips, caches, a training. Tests read it and damage copies of what is in it."""

import json
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python, run_script
from tests.faults.runs import CACHE_LATENTS, CACHE_TEXTS, DYING, TRAIN, Undisturbed, assert_whole, write_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of `tests.faults.runs` works."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    run_script(*CACHE_LATENTS, folder=folder)
    run_script(*CACHE_TEXTS, folder=folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A training that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    run_python(DYING, "count", folder / "passed.json", ROOT / TRAIN[0], *TRAIN[1:], "--output_dir", folder / "out", folder=project)
    seconds = time.monotonic() - started
    assert_whole(folder / "out")
    return Undisturbed(folder / "out", json.loads((folder / "passed.json").read_text(encoding="utf-8")), seconds)
