"""Casts inside a kernel round as casts of their own do, also under CUDA's autocast."""

import pytest
import torch
from torch import Tensor

from modules.layers.modulation import add_gated, modulate
from tests.gpu.measuring import equal_bits


@pytest.mark.parametrize("learns", [False, True])
def test_modulation_and_gated_sum_have_the_bits_of_separate_operators(
    device: torch.device, learns: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
        drawn = torch.randn(2, length, 256, generator=generator).to(device, dtype)
        return drawn.requires_grad_(requires_grad)

    x, normed, branch = draw(64), draw(64), draw(64, torch.bfloat16)
    shift, scale, gate = (draw(1, requires_grad=learns) for _ in range(3))
    weights = draw(64, requires_grad=False)

    with torch.autocast(device.type, torch.bfloat16):
        found = [modulate(normed, shift, scale, torch.bfloat16), add_gated(x, gate, branch)]
    expected = [
        torch.addcmul(shift, normed, 1 + scale).to(torch.bfloat16),
        torch.addcmul(x, gate, branch.float()),
    ]

    inputs = [each for each in (x, normed, branch, shift, scale, gate) if each.requires_grad]
    for ours in (found, expected):
        ours += torch.autograd.grad([ours[0], ours[1]], inputs, [weights.bfloat16(), weights])
    assert all(equal_bits(one, other) for one, other in zip(found, expected, strict=True))
