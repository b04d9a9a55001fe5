"""Compiled blocks on a device: numbers of uncompiled ones, one compilation for all blocks and all steps.

On CUDA inductor compiles, for the CPU Dynamo alone: what it captures runs with torch's own kernels.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from modules.compile import check_compilation, compile_blocks
from modules.compile_options import Compilation
from modules.fp8.products import choose_product, supports_fp8
from modules.fp8.weights import attach, quantise
from modules.offload.block_swap import move_network
from modules.offload.checkpointing import checkpoint_blocks
from modules.speed_options import Quantisation
from tests.gpu.measuring import relative_error, sent
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, same, swapped
from tests.modules.swap_cases import gradients as case_gradients
from tests.tiny.dits import ONE_OF_EACH

WAN = ONE_OF_EACH[0]


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def choice_on(device: torch.device) -> Compilation:
    return Compilation(fullgraph=True) if device.type == "cuda" else Compilation("eager", fullgraph=True)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_swapped_blocks_are_compiled_once_and_give_the_same_bits(
    device: torch.device, deterministic: None, case: Any, checkpointing: bool
) -> None:
    results, graphs = [], []
    for blocks in (0, case.most):
        torch.compiler.reset()
        counters.clear()
        dit = case.make()
        network = case.network(dit).to(device)
        compile_blocks(dit, case.spec, choice_on(device))
        if checkpointing:
            checkpoint_blocks(dit, case.spec)
        transfer = FakeDevice() if blocks and device.type == "cpu" else None
        swapped(dit, case.spec, blocks, transfer, where=device)
        move_network(dit, device)
        dit.train(checkpointing)
        seen = []
        for seed in range(2):
            seen += case_gradients(case, dit, network, seed, device)
            with torch.no_grad():
                seen.append(dit(**sent(case.inputs(seed), device)))
        results.append(seen)
        graphs.append(compilations())
    assert same(*results)
    assert graphs[0] == graphs[1] > 0


@pytest.mark.gpu
def test_compiled_blocks_with_fp8_products(cuda: torch.device) -> None:
    tiny = WAN
    if not supports_fp8(cuda):
        pytest.skip("this GPU has no fp8 units")
    quantisation, found = Quantisation("rows", product=choose_product(cuda)), []
    inputs = sent(tiny.inputs((2, 8, 8, 32), 1), cuda)
    for compiled in (False, True):
        dit = tiny.make(2).to(cuda, torch.bfloat16)
        for layer in [part for name in tiny.spec.block_lists for part in dit.get_submodule(name).modules()]:
            if isinstance(layer, nn.Linear):
                attach(layer, *quantise(layer.weight.data, quantisation), quantisation)
        if compiled:
            compile_blocks(dit, tiny.spec, choice_on(cuda))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found.append(dit(**inputs))
    assert relative_error(found[1], found[0]) < 0.06  # a number near the middle may round to either side
    assert compilations() > 0


@pytest.mark.gpu
def test_a_gpu_has_all_that_inductor_needs(cuda: torch.device) -> None:
    check_compilation(Compilation(), cuda)
