"""Checkpoints that several files read and none changes."""

from functools import cache

import pytest

from tests.parity.stable_diffusion import Files, FilesOf, write_files


@pytest.fixture(scope="session")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> FilesOf:
    """Tiny checkpoints of Stable Diffusion: sd1, sd2, sdxl; with `painter` behind it one for inpainting."""

    @cache
    def files(kind: str) -> Files:
        name, _, painter = kind.partition(" ")
        return write_files(name, tmp_path_factory.mktemp(kind), channels=9 if painter else 4)

    return files
