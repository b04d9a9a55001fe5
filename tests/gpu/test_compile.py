"""Tiny transformers and random numbers on a device against the CPU. Compiled blocks on a device: numbers
of uncompiled ones, one compilation for all blocks and all steps.

On CUDA inductor compiles, for the CPU Dynamo alone: what it captures runs with torch's own kernels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from checkpoints.stored.forms import attach
from checkpoints.stored.fp8 import Fp8
from checkpoints.stored.fp8_products import select_product, supports_fp8
from generation.denoise import SeededNoise
from modules.compile_options import Compilation
from modules.layers.modulation import add_gated, modulate
from modules.speed_options import Quantization
from networks.lora_layer import keep_mask
from runtime.compile import check_compilation, compile_blocks
from runtime.offload.block_swap import move_network
from runtime.offload.checkpointing import checkpoint_blocks
from tests.gpu.measuring import equal_bits, relative_error, sent
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, same, swapped
from tests.modules.swap_cases import gradients as case_gradients
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit, gradients
from training.optimizers.stepping import stochastic_bfloat16

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
    for blocks in (0, case.maximum):
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
    quantization, found = Quantization("rows", product=select_product(cuda)), []
    inputs = sent(tiny.inputs((2, 8, 8, 32), 1), cuda)
    for compiled in (False, True):
        dit = tiny.make(2).to(cuda, torch.bfloat16)
        for layer in [part for name in tiny.spec.block_lists for part in dit.get_submodule(name).modules()]:
            if isinstance(layer, nn.Linear):
                attach(layer, Fp8(quantization).quantize(layer.weight.data))
        if compiled:
            compile_blocks(dit, tiny.spec, choice_on(cuda))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found.append(dit(**inputs))
    assert relative_error(found[1], found[0]) < 0.06  # a number near the middle may round to either side
    assert compilations() > 0


@pytest.mark.gpu
def test_a_gpu_has_all_that_inductor_needs(cuda: torch.device) -> None:
    check_compilation(Compilation(), cuda)


CPU = torch.device("cpu")
SEED = (0x9E3779B9, 0x7F4A7C15)  # low and high half


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tiny", DITS, ids=lambda tiny: tiny.name)
def test_transformers_and_their_gradients_are_those_of_the_cpu(
    cuda: torch.device, tiny: TinyDit, autocast: bool
) -> None:
    """Of a LoRA's gradients as one vector; in bf16 some dozens of roundings add up."""
    inputs, results = tiny.inputs((2, 6, 8, 11), 2), []
    for where in (CPU, cuda):
        dit, network = tiny.with_lora(blocks=2)
        velocity, grown = gradients(
            dit.to(where).train(), network.to(where), sent(inputs, where), autocast=autocast and where == cuda
        )
        results.append((velocity, torch.cat([one.flatten() for one in grown])))
    (velocity, grown), (found, found_grown) = results
    assert relative_error(found, velocity) < (0.03 if autocast else 1e-4)
    assert relative_error(found_grown, grown) < (0.06 if autocast else 1e-3)


@pytest.mark.gpu
def test_casts_inside_a_kernel_round_as_casts_of_their_own(cuda: torch.device) -> None:
    """Also under CUDA's autocast."""

    def draw(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(2, length, 256, device=cuda, dtype=dtype).requires_grad_()

    x, normed, branch = draw(64), draw(64), draw(64, torch.bfloat16)
    shift, scale, gate = draw(1), draw(1), draw(1)
    weights = torch.randn(2, 64, 256, device=cuda)

    with torch.autocast("cuda", torch.bfloat16):
        found = [modulate(normed, shift, scale, torch.bfloat16), add_gated(x, gate, branch)]
    expected = [
        torch.addcmul(shift, normed, 1 + scale).to(torch.bfloat16),
        torch.addcmul(x, gate, branch.float()),
    ]

    for ours in (found, expected):
        inputs = [x, normed, branch, shift, scale, gate]
        ours += torch.autograd.grad([ours[0], ours[1]], inputs, [weights.bfloat16(), weights])
    assert all(equal_bits(one, other) for one, other in zip(found, expected, strict=True))


def hash_32(x: int) -> int:
    """Mix the bits of a 32-bit number: lowbias32, in Python's own numbers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_dropout_mask_is_a_function_of_the_seed_alone(device: torch.device, share: float) -> None:
    low, high = SEED
    expected = [
        hash_32((hash_32(index ^ low) + high) & 0xFFFFFFFF) >= int(share * 2**32) for index in range(231)
    ]
    mask = keep_mask((3, 7, 11), share, SEED, device)
    assert mask.device.type == device.type
    assert mask.flatten().tolist() == expected
    assert keep_mask((1 << 20,), share, SEED, device).double().mean().item() == pytest.approx(
        1 - share, abs=2e-3
    )


def test_noise_made_on_the_cpu_has_the_same_bits_on_every_device(device: torch.device) -> None:
    expected = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(77))
    noise = SeededNoise(77, device, cpu_noise=True)
    assert equal_bits(noise.draw((2, 3, 5)), expected)
    assert not equal_bits(noise.draw((2, 3, 5)), expected)  # it goes on


def test_rounding_is_right_on_average_and_keeps_what_is_no_number(device: torch.device) -> None:
    values = torch.full((1 << 16,), 1.0 + 2.0**-10, device=device)  # an eighth of a step of bf16
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], device=device)

    rounded = stochastic_bfloat16(values, torch.Generator(device).manual_seed(0))
    kept = stochastic_bfloat16(special, torch.Generator(device).manual_seed(0))

    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    share = float((rounded.float() > 1).double().mean())
    assert abs(share - 0.125) < 4 * (0.125 * 0.875 / len(values)) ** 0.5
    assert bool(kept[0].isnan())
    assert torch.equal(kept[1:].float(), special[1:])
