"""Benchmarks load models of real size from files that hold nothing."""

from pathlib import Path

import torch
from torch import nn

from benchmarks.sparse_file import fill_with_noise, write_sparse
from modules.checkpoint import open_checkpoint


def test_a_sparse_file_is_read_as_zeros_and_takes_no_room(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = nn.Linear(4096, 4096)
    path = write_sparse(tmp_path / "model.safetensors", network, torch.bfloat16)

    with open_checkpoint(path) as checkpoint:
        weight, bias = checkpoint.read("weight"), checkpoint.read("bias")
    assert (weight.shape, weight.dtype, bias.shape) == ((4096, 4096), torch.bfloat16, (4096,))
    assert weight.count_nonzero() == 0


def test_noise_fills_weights_of_16_and_of_8_bits() -> None:
    network = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64))
    network[1].weight = nn.Parameter(torch.zeros(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
    network[1].register_buffer("scale_weight", torch.ones(64, 1))

    fill_with_noise(network)

    wide, narrow = network[0].weight.float(), network[1].weight.float() * network[1].scale_weight
    assert 0.018 < wide.std() < 0.022
    assert 0.018 < narrow.std() < 0.022
