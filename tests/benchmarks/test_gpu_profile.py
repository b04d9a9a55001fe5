"""A profile's kernels come into groups: made-up lists of kernels, and a real profile of a CPU."""

import torch
from torch import nn

from benchmarks.gpu_profile import ATTENTION, ELEMENTWISE, PRODUCTS, THIN, group_of, profile_calls, report


def test_a_real_profile_of_a_cpu_has_all_groups() -> None:
    """A frozen layer with a LoRA beside it, attention, a norm."""
    wide, down, up = nn.Linear(256, 768), nn.Linear(256, 16), nn.Linear(16, 768)
    x = torch.randn(1, 200, 256)

    def step() -> None:
        q, k, v = (wide(x) + up(down(x))).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        nn.functional.layer_norm(seen, seen.shape[-1:]).square().mean().backward()

    step()
    found = profile_calls(step, 2, torch.device("cpu"))

    groups = {group_of(kernel) for kernel in found.kernels}
    assert {ATTENTION, PRODUCTS, THIN, ELEMENTWISE} <= groups
    assert 0 < found.busy <= found.wall
    thin = [kernel for kernel in found.kernels if group_of(kernel) == THIN]
    assert all(16 in {side for shape in kernel.shapes for side in shape} for kernel in thin)
    assert "| attention | " in report(found, 2)
