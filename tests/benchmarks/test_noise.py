"""Benchmarks give models of real size weights that look like weights."""

import torch
from torch import nn

from benchmarks.noise import fill_with_noise


def test_noise_fills_weights_of_16_and_of_8_bits() -> None:
    network = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64))
    network[1].weight = nn.Parameter(torch.zeros(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
    network[1].register_buffer("scale_weight", torch.ones(64, 1))

    fill_with_noise(network)

    wide, narrow = network[0].weight.float(), network[1].weight.float() * network[1].scale_weight
    assert 0.018 < wide.std() < 0.022
    assert 0.018 < narrow.std() < 0.022
