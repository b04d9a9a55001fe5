"""One tiny project for all tests of faults: models, clips, caches. Tests read it and damage copies of what is in it."""

from pathlib import Path

import pytest

from tests.commands import run_script
from tests.faults.runs import CACHE_LATENTS, CACHE_TEXTS, write_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of `tests.faults.runs` works."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    run_script(*CACHE_LATENTS, folder=folder)
    run_script(*CACHE_TEXTS, folder=folder)
    return folder
