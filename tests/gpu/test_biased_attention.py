"""Attention with something added to its scores, which few of CUDA's kernels take."""

import math

import pytest
import torch
from torch import Tensor

from encoders.t5_network import T5Config, T5Network, relative_bucket
from modules.attention.attend import attend
from modules.attention.sdpa import attend_with_bias
from modules.speed_options import SDPA
from tests.gpu.measuring import relative_error

HALVES = (torch.bfloat16, torch.float16)


def drawn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("keys", [7, 64, 77])  # with and without whole groups of 8 and 16
def test_keys_that_stand_for_several_count_as_often(
    device: torch.device, dtype: torch.dtype, keys: int
) -> None:
    query = drawn(device, dtype, 2, 300, 2, 128)
    key, value = (drawn(device, dtype, 2, keys, 2, 128, seed=seed) for seed in (1, 2))
    repeats = torch.ones(keys, device=device)
    repeats[-1] = 40
    many = torch.cat([torch.arange(keys - 1), torch.full((40,), keys - 1)]).to(device)

    found = attend(query, key, value, SDPA, repeats=repeats)

    assert relative_error(found, attend(query, key[:, many], value[:, many])) < 0.02


def test_gradients_with_a_bias_are_numbers_for_every_length(device: torch.device) -> None:
    """cuDNN's kernel makes NaN of such scores if 64 keys are left over (pytorch/pytorch#196678)."""
    for length in (64, 704, 640):
        q, k = (drawn(device, torch.bfloat16, 1, 2, length, 64, seed=seed) * 0.1 for seed in (1, 2))
        q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
        inputs = [each.requires_grad_() for each in (q, k, drawn(device, torch.bfloat16, 1, 2, length, 64))]
        bias = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device=device)

        out = attend_with_bias(*inputs, bias, 0.125)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)

        assert all(bool(each.isfinite().all()) for each in (out, *gradients)), length


def test_positions_fall_into_the_same_buckets_on_every_device(device: torch.device) -> None:
    distances = torch.arange(-512, 513)

    assert torch.equal(relative_bucket(distances.to(device), 32).cpu(), relative_bucket(distances, 32))


@pytest.mark.parametrize("shares_positions", [True, False])
def test_t5_encodes_texts_of_any_length_in_16_bits(device: torch.device, shares_positions: bool) -> None:
    config = T5Config(
        vocabulary=50,
        dim=128,
        attention_dim=128,
        ffn_dim=256,
        num_heads=2,
        num_layers=2,
        num_buckets=32,
        shares_positions=shares_positions,
    )
    torch.manual_seed(0)
    exact = T5Network(config).requires_grad_(False)
    t5 = T5Network(config).requires_grad_(False)
    t5.load_state_dict(exact.state_dict())
    t5.to(device, torch.bfloat16)
    texts = [torch.arange(length) % 50 for length in (1, 13, 64, 300)]

    found = t5([text.to(device) for text in texts], visible=[1, 9, 64, 200])

    for ours, theirs in zip(found, exact(texts, visible=[1, 9, 64, 200]), strict=True):
        assert relative_error(ours, theirs) < 0.03
