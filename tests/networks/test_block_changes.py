"""Norms, angles and shared directions of LoRAs by block, against closed forms and full matrices."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from networks.block_changes import compute_overlaps, compute_shared_parts, list_block_changes
from networks.delta import Delta, read_deltas
from networks.module_factors import group_by_module


def read(**modules: tuple[Tensor, Tensor]) -> Mapping[str, Delta]:
    """Return the changes of a LoRA with these up and down matrices, scaled by 1."""
    tensors = {}
    for name, (up, down) in modules.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = up
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(len(down)))
    return read_deltas(group_by_module(tensors))


def random_pair(seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, rank, generator=generator), torch.randn(rank, 16, generator=generator)


def test_directions_of_rank_one_have_the_angles_of_their_vectors() -> None:
    up = torch.tensor([[1.0], [0.0]])
    turned = torch.tensor([[math.cos(0.5)], [math.sin(0.5)]])
    down, other_down = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    first, second = read(blocks_0_q=(up, down)), read(blocks_0_q=(-5 * turned, other_down))
    cosine = -math.cos(0.5) * 0.6
    assert compute_overlaps(first, second) == pytest.approx({"blocks_0": cosine})
    assert compute_shared_parts(first, second) == pytest.approx({"blocks_0": cosine**2})
    assert [change.squared_norm for change in list_block_changes(first)] == pytest.approx([4])


def test_blocks_of_several_modules_equal_full_matrices() -> None:
    first = read(blocks_0_q=random_pair(1), blocks_0_k=random_pair(2), blocks_1_q=random_pair(3))
    second = read(blocks_0_q=random_pair(4), blocks_0_k=random_pair(5), blocks_1_v=random_pair(6))
    changes = [
        {name: delta.compute_change(torch.device("cpu")).double() for name, delta in deltas.items()}  # type: ignore[union-attr]
        for deltas in (first, second)
    ]
    names = ["lora_unet_blocks_0_q", "lora_unet_blocks_0_k"]
    one, other = (torch.cat([change[name].flatten() for name in names]) for change in changes)
    assert compute_overlaps(first, second) == pytest.approx(
        {"blocks_0": float(one @ other / (one.norm() * other.norm()))}, rel=1e-5
    )
    shared = 0.0
    for name in names:
        left, _, right = torch.linalg.svd(changes[1][name])
        shared += float((left[:, :3].mT @ changes[0][name] @ right[:3].mT).square().sum())
    assert compute_shared_parts(first, second) == pytest.approx(
        {"blocks_0": shared / float(one.square().sum())}, rel=1e-5
    )


def test_a_lora_lies_within_its_own_directions_and_not_in_those_that_it_does_not_use() -> None:
    up, down = random_pair(1)
    first = read(blocks_0_q=(up, down))
    mixed = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 0.0, -1.0]])
    # the same directions, mixed differently
    assert compute_shared_parts(first, read(blocks_0_q=(up @ mixed, down))) == pytest.approx({"blocks_0": 1})
    unused = up.clone()
    unused[:, 1:] = 0  # two ranks of the second LoRA change nothing
    left, right = up[:, 0] / up[:, 0].norm(), down[0] / down[0].norm()
    part = float((left @ up @ down @ right) ** 2 / (up @ down).square().sum())
    assert part < 0.9
    assert compute_shared_parts(first, read(blocks_0_q=(unused, down))) == pytest.approx({"blocks_0": part})
    assert compute_shared_parts(first, read(blocks_0_q=(up * 0, down))) == {"blocks_0": 0}
