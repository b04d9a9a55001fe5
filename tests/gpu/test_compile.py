"""Compiled blocks on a device: numbers of uncompiled ones, one compilation for all blocks and all steps.

On CUDA inductor compiles, for the CPU Dynamo alone: what it captures runs with torch's own kernels.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from modules.attention.attend import attend
from modules.attention.sdpa import kernels
from modules.compile import check_compilation, compile_blocks
from modules.compile_options import Compilation
from modules.fp8.products import choose_product, supports_fp8
from modules.fp8.weights import attach, quantise
from modules.offload.block_swap import move_network
from modules.offload.checkpointing import checkpoint_blocks, offload_to_host
from modules.speed_options import Quantisation
from tests.gpu.measuring import no_waits, relative_error, sent
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, same, swapped
from tests.modules.swap_cases import gradients as case_gradients
from tests.tiny.dits import ONE_OF_EACH, TinyDit, gradients

SIZES = ((1, 4, 4, 7), (2, 4, 6, 9), (3, 6, 8, 11), (2, 8, 6, 5))
NEAR = {False: 1e-4, True: 0.03}  # with autocast: relative error of outputs; of gradients twice that
CPU = torch.device("cpu")
WAN, HUNYUAN, FRAMEPACK = ONE_OF_EACH


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def choice_on(device: torch.device) -> Compilation:
    return Compilation(fullgraph=True) if device.type == "cuda" else Compilation("eager", fullgraph=True)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def learner_on(
    tiny: TinyDit,
    device: torch.device,
    compiled: bool,
    offload: bool = False,
    keep: bool = False,
    **arguments: Any,
) -> tuple[nn.Module, Any]:
    dit, network = tiny.with_lora(blocks=3, **arguments)
    dit, network = dit.to(device), network.to(device)
    if compiled:
        compile_blocks(dit, tiny.spec, choice_on(device))
    checkpoint_blocks(dit, tiny.spec, keep, offload_to_host(device) if offload else None)
    return dit.train(), network


def assert_near(found: Sequence[tuple[Tensor, list[Tensor]]], share: float) -> None:
    """The first of two results is the uncompiled one."""
    (velocity, grown), (ours, our_grown) = found
    assert relative_error(ours, velocity) < share
    joined = [torch.cat([one.flatten() for one in each]) for each in (our_grown, grown)]
    assert relative_error(*joined) < 2 * share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny", "autocast"),  # few, as inductor takes some 20 seconds for a block that learns
    [
        pytest.param(WAN, False, id="wan"),
        pytest.param(WAN, True, id="wan autocast", marks=pytest.mark.gpu),
        pytest.param(HUNYUAN, True, id="hunyuan autocast", marks=pytest.mark.gpu),
    ],
)
def test_numbers_are_those_of_uncompiled_blocks_and_the_next_step_compiles_nothing(
    device: torch.device, tiny: TinyDit, autocast: bool
) -> None:
    inputs, found = sent(tiny.inputs(SIZES[1], 2), device), []
    for compiled in (False, True):
        dit, network = learner_on(tiny, device, compiled)
        found.append(gradients(dit, network, inputs, autocast))
    assert_near(found, NEAR[autocast])
    first = compilations()
    assert first > 0
    with no_waits(device):
        gradients(dit, network, inputs, autocast)
    assert compilations() == first
    assert counters["graph_break"] == {}


@pytest.mark.slow
def test_blocks_are_compiled_twice_at_most_for_many_sizes(device: torch.device) -> None:
    tiny = WAN
    results: list[list[Tensor]] = []
    for compiled in (False, True):
        dit = tiny.make(3).to(device)
        if compiled:
            compile_blocks(dit, tiny.spec, choice_on(device))
        with torch.no_grad():
            results.append([dit(**sent(tiny.inputs(size, 1), device)) for size in SIZES])
    for plain, ours in zip(*results, strict=True):
        assert relative_error(ours, plain) < NEAR[False]
    assert compilations() == 2 * len(tiny.spec.block_lists)


@pytest.mark.slow
def test_dropout_is_that_of_uncompiled_blocks_for_every_seed(device: torch.device) -> None:
    tiny, dropout, results = WAN, {"neuron_dropout": 0.3}, []
    inputs = sent(tiny.inputs(SIZES[0], 2), device)
    for compiled in (False, True):
        dit, network = learner_on(tiny, device, compiled, **dropout)
        results.append([])
        for seed in (1, 2, 1):
            network.set_dropout_seed(seed)
            results[-1].append(gradients(dit, network, inputs))
    for plain, ours in zip(*results, strict=True):
        assert_near([plain, ours], NEAR[False])
    first, second = (torch.cat([one.flatten() for one in each[1]]) for each in results[1][:2])
    assert relative_error(second, first) > 0.05
    assert compilations() == 2  # the first block and the others: not one for each seed


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
@pytest.mark.parametrize(
    ("tiny", "offload", "keep"), [(WAN, True, True), (FRAMEPACK, True, False)], ids=["wan", "framepack"]
)
def test_compiled_blocks_with_checkpoints_of_all_kinds(
    cuda: torch.device, tiny: TinyDit, offload: bool, keep: bool
) -> None:
    inputs, found = sent(tiny.inputs(SIZES[1], 2), cuda), []
    for compiled in (False, True):
        dit, network = learner_on(tiny, cuda, compiled, offload, keep, neuron_dropout=0.2)
        network.set_dropout_seed(3)
        found.append(gradients(dit, network, inputs, autocast=True))
    assert_near(found, NEAR[True])
    with no_waits(cuda):
        gradients(dit, network, inputs, autocast=True)


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


@pytest.mark.gpu
def test_compiled_attention_takes_the_kernel_that_uncompiled_attention_takes(cuda: torch.device) -> None:
    inputs = [
        torch.randn(1, 1000, 2, 128, device=cuda, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    capability, cudnn = torch.cuda.get_device_capability(), torch.backends.cudnn.version()
    first = kernels(capability, torch.bfloat16, 128, False, cudnn)[0].name.removesuffix("_ATTENTION").lower()
    compiled = torch.compile(attend, fullgraph=True)
    compiled(*inputs).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*inputs).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any(f"{first}_attention" in name and "backward" not in name for name in names), names
    assert any(f"{first}_attention_backward" in name for name in names), names
