from typing import Any

import pytest
import torch
from torch import nn

from modules.layers.convolution import conv3d

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
