"""Loading what a dialect has found: the network is built from the plan's dimensions and filled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modules.checkpoints.dialects import LoadPlan, load_planned
from modules.checkpoints.opening import open_checkpoint, plain_sources

CPU = torch.device("cpu")
DtypeOf = Callable[[str, torch.dtype], torch.dtype]  # name and dtype in the file -> dtype to keep


class Network(nn.Module):
    """Two layers, one of them with a dropout that eval mode has to silence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.norm = nn.LayerNorm(2)
        self.dropout = nn.Dropout(0.5)


def loaded(path: Path, width: int = 3, dtype: torch.dtype | DtypeOf = torch.float32) -> Network:
    with open_checkpoint(path) as checkpoint:
        plan = LoadPlan(width, checkpoint, plain_sources(checkpoint), ignore=("unused",))
        return load_planned(plan, Network, CPU, dtype, "a network (--network)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    state = {**Network(3).state_dict(), "unused": torch.ones(1)}
    save_file(state, tmp_path / "network.safetensors")
    return tmp_path / "network.safetensors"


def test_a_planned_network_is_ready_to_be_asked(path: Path) -> None:
    network = loaded(path)

    assert not network.training
    assert not network.dropout.training
    assert not any(weight.requires_grad for weight in network.parameters())
