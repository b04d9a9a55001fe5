"""Half precision gives way to float32 where it is not enough, and is said once."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.errors import CheckpointError
from post.options import ToolNetworkOptions
from post.tiling import Guarded, network_dtype

CPU = torch.device("cpu")


def options(dtype: str = "fp32", compile: bool = False) -> ToolNetworkOptions:
    return ToolNetworkOptions(model=Path("x.pth"), dtype=dtype, compile=compile)


def squared(images: Tensor) -> Tensor:
    """Too large for float16 from 256 on."""
    return images * images


def test_only_pictures_that_overflow_are_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loads = []

    def exact() -> object:
        loads.append(1)
        return squared

    guarded = Guarded(squared, torch.float16, exact, "SwinIR")
    images = torch.rand(3, 3, 4, 5)
    images[1, 0, 0, 0] = 300.0

    made = [guarded(images), guarded(images)][1]

    assert made.dtype == torch.float32
    assert torch.equal(made[1], squared(images[1]))
    for index in (0, 2):
        assert torch.equal(made[index], squared(images[index].half()).float())
    assert (len(loads), len(caplog.records)) == (1, 1)
    assert "SwinIR in float16 is not finite" in caplog.text


def test_a_result_that_is_not_finite_in_float32_either_is_an_error() -> None:
    guarded = Guarded(squared, torch.bfloat16, lambda: squared, "SwinIR")
    with pytest.raises(CheckpointError, match="NaN or infinite, in float32 too"):
        guarded(torch.full((1, 3, 2, 2), 1e30))


def test_float16_is_float32_on_a_cpu() -> None:
    assert network_dtype(options("fp16"), CPU, "x") == torch.float32
    assert network_dtype(options("fp16"), torch.device("cuda"), "x") == torch.float16
    assert network_dtype(options("bf16"), CPU, "x") == torch.bfloat16
