"""Residual blocks with fewer kernels: equal results."""

import copy

import pytest
import torch

from benchmarks.launches import Operators, make_unet, make_unet_inputs
from stable_diffusion.resnets import use_fewer_kernels


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_results_are_equal_to_the_bit_with_fewer_kernels(kind: str) -> None:
    unet = make_unet(kind).train()
    changed = copy.deepcopy(unet)
    use_fewer_kernels(changed)
    inputs = make_unet_inputs(kind)
    inputs["sample"].requires_grad_()
    results, counts = [], []
    for network in (unet, changed):
        with Operators() as operators:
            output = network(**inputs).sample
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs["sample"])
        results.append((output, gradient))
        counts.append(operators.counts)

    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    blocks = sum(type(module).__name__ == "ResnetBlock2D" for module in unet.modules())
    assert counts[0]["aten::div.Tensor"] - counts[1]["aten::div.Tensor"] == blocks
    assert counts[0]["aten::silu"] - counts[1]["aten::silu"] == blocks - 1


def test_a_unet_with_other_blocks_stays_as_it_is() -> None:
    unet = make_unet("sd1")
    unet.mid_block.resnets[0].output_scale_factor = 2.0  # type: ignore[union-attr,index]

    use_fewer_kernels(unet)

    assert unet.time_embed_act is None
    assert "forward" not in vars(unet.mid_block.resnets[1])  # type: ignore[union-attr,index]
