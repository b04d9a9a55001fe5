from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from modules.layers.convolution import conv3d, repeat_pixels

OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding": (0, 1, 1)},
    {"stride": (2, 1, 1), "bias": False},
    {"groups": 2, "dilation": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_small_clips_give_what_the_layer_gives(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 6, 3, **options).to(dtype)
    x = torch.randn(1, 4, 7, 9, 8, dtype=dtype)

    torch.testing.assert_close(conv3d(layer, x), layer(x))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_pixels_are_repeated_however_many_there_are(
    layout: torch.memory_format, factor: int, mode: str
) -> None:
    x = torch.randn(2, 5, 6, 7).to(memory_format=layout)
    expected = interpolate(x, scale_factor=factor, mode=mode)

    for most in (expected.numel(), expected.numel() - 1):
        made = repeat_pixels(x, factor, most)
        assert torch.equal(made, expected)
        assert made.is_contiguous(memory_format=layout)
