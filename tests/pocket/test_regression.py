"""Generation against latents that the pocket model made when it was finished: a changed shift, sigma grid or
solver shows here.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pocket.regression import CASES, FILE, latents, write_float32_dit


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float32_dit(tmp_path_factory.mktemp("dit") / "dit.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_latents_are_what_they_were(dit: Path, tmp_path: Path, case: str) -> None:
    assert torch.allclose(latents(dit, tmp_path, case), load_file(FILE)[case], atol=2e-3)
