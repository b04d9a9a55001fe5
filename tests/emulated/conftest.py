"""The emulated device needs a compiler and a torch without CUDA."""

import shutil
import sys

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _can_be_emulated() -> None:
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulated device is compiled with g++, on Linux")
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this torch has kernels for CUDA itself: run the tests marked gpu")
