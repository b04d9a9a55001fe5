"""Weights that are NaN or infinite are found in every dtype, and named when a file is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.checkpoints.filling import load_module
from modules.checkpoints.finite import is_finite
from modules.checkpoints.opening import open_checkpoint, plain_sources
from modules.errors import CheckpointError

CPU = torch.device("cpu")
WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("place", [0, 500, 1023])
def test_a_single_value_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[7], tensor[8] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert is_finite(tensor)
    tensor[place] = value
    assert not is_finite(tensor.view(32, 32))
    assert not is_finite(tensor.view(32, 32).T)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_of_fp8_is_known(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for code in codes.split(1):
        assert bool(is_finite(code.view(1, 1))) == bool(code.float().isfinite())


class Linear(nn.Module):
    """Two linear layers, one weight of which may be bad."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


def file_with(path: Path, name: str, value: float, dtype: torch.dtype) -> Path:
    state: dict[str, Tensor] = {
        key: tensor.detach().to(dtype) for key, tensor in Linear().state_dict().items()
    }
    state[name].view(-1)[1] = value
    save_file(state, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_bad_weight_is_named_with_its_file(tmp_path: Path, kept: torch.dtype, value: float) -> None:
    path = file_with(tmp_path / "model.safetensors", "second.weight", value, torch.float32)
    with torch.device("meta"):
        module = Linear()
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(
            CheckpointError,
            match=r"model.safetensors has .* NaN or infinite: second.weight \(1 of 16 values\)",
        ),
    ):
        load_module(
            module, checkpoint, plain_sources(checkpoint), device=CPU, dtype=lambda name, stored: kept
        )
