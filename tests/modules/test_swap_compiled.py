"""Swapped blocks that are compiled: they are compiled once, and their numbers are those of compiled blocks
that stay.
"""

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from modules.offload.checkpointing import checkpoint_blocks
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, Case, gradients, same, swapped


def compiled(
    case: Case, blocks: int, device: FakeDevice | None, checkpointing: bool, backend: str
) -> tuple[nn.Module, nn.Module]:
    dit = case.make()
    network = case.network(dit)
    for name in case.spec.block_lists:
        for block in dit.get_submodule(name).children():
            block.forward = torch.compile(block.forward, backend=backend)
    if checkpointing:
        checkpoint_blocks(dit, case.spec)
    swapped(dit, case.spec, blocks, device)
    return dit.train(checkpointing), network


def run(
    case: Case, blocks: int, device: FakeDevice | None, checkpointing: bool, backend: str
) -> tuple[list[Tensor], list[int]]:
    """Gradients of a training pass and a sample, three times; and how many graphs there were after each
    time.
    """
    torch._dynamo.reset()
    counters.clear()
    dit, network = compiled(case, blocks, device, checkpointing, backend)
    found, graphs = [], []
    for seed in range(3):
        found += gradients(case, dit, network, seed)
        with torch.no_grad():
            found.append(dit(**case.inputs(seed)))
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moving_weights_compiles_nothing_again(case: Case, checkpointing: bool, backend: str) -> None:
    expected, usual = run(case, 0, None, checkpointing, backend)
    found, graphs = run(case, case.most, FakeDevice(), checkpointing, backend)

    assert same(found, expected)
    assert graphs == usual
    assert graphs[0] == graphs[-1] > 0
