"""The device of whole runs: CUDA, as all tests here are marked `gpu`; or what REELSMITH_TEST_DEVICE says.

pytest -m gpu tests/gpu/runs                                on a machine with a GPU
REELSMITH_TEST_DEVICE=cpu pytest -m gpu tests/gpu/runs      the same without one: do they run at all?
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from modules.attention import sdpa
from modules.devices import make_deterministic
from tests.gpu.measuring import chosen
from tests.gpu.runs.project import TEST_DEVICE, Project, write_project


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device to test. Whatever a run changes in torch's settings is changed back."""
    with chosen(os.environ.get(TEST_DEVICE, "cuda")) as where:
        yield where


@pytest.fixture
def repeatable(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal runs give equal bits, where torch has operations for it; others warn.

    While they only warn, the backward passes of torch's fused attention sum in any order
    (pytorch/pytorch#101847): it is computed by plain products.
    """
    make_deterministic()
    monkeypatch.setattr(sdpa, "list_kernels", lambda *facts, **of_call: [SDPBackend.MATH])


@pytest.fixture(scope="session")
def project_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Return the project of a family by its name; it is written once."""
    projects: dict[str, Project] = {}

    def find(name: str) -> Project:
        if name not in projects:
            projects[name] = write_project(name, tmp_path_factory.mktemp("project"))
        return projects[name]

    return find
