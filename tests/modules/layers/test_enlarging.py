"""Frames with too many values for torch's kernel are enlarged to the same bits."""

import pytest
import torch
from torch.nn.functional import interpolate

from modules.layers.convolution import repeat_pixels


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
