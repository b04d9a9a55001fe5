"""The device that the tests in this folder run on: always the CPU, and CUDA with `-m gpu`."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.measuring import chosen, settings_restored


@pytest.fixture(autouse=True, scope="session")
def _equal_sums() -> None:
    """cuBLAS and torch read it once, at the first product of a process: set it before any test."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on Hopper the size that is usual


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return the device as a run chooses it. Whatever a test changes in torch's settings is changed back."""
    with chosen(request.param) as where:
        yield where


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """Return the CUDA device, for tests of what no CPU has; mark these `gpu`."""
    with chosen("cuda") as where:
        yield where


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Make torch compute the same bits at each run, and raise if an operation cannot."""
    with settings_restored():
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        yield
