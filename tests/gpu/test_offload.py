"""Swapped blocks, activations in host memory and networks that take turns give the bits of those that stay.

tests/modules/offload shows it on a fake device. On CUDA copies run beside the computation; to make races
show, either side is made late.
"""

import gc
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.contract.family import DitSpec
from modules.contract.steps import Tweaks
from modules.offload import host_memory
from modules.offload.block_swap import move_network, settle_all, swap_blocks, swap_of
from modules.offload.checkpointing import checkpoint_blocks, offload_to_host
from modules.offload.host_memory import CudaTransfer, Pairs, Transfer
from modules.offload.swap_plan import SwapPlan, host_weights
from modules.offload.turns import HostCopy
from modules.planning.memory_plan import plan_swapped_bytes
from modules.run_blocks import Hidden, run_blocks
from tests.gpu.measuring import equal_bits, poison, sent
from tests.modules.swap_cases import CASES, Case, gradients, learner, same, step_in_backward, swapped

pytestmark = pytest.mark.gpu

CYCLES = 1_000_000  # of the device's clock: most of a millisecond
CHECKPOINTS = ("kept", "checkpointed", "offloaded")


class LateCopies(CudaTransfer):
    """Begins each copy late: what does not wait for it reads old memory."""

    def copy(self, pairs: Pairs, after: Any) -> Any:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(CYCLES)
        return super().copy(pairs, after)


def transfer_to(device: torch.device, late: str) -> Transfer | None:
    """What copies to the device; None for the usual one."""
    return LateCopies(device) if late == "copies" else None


class Layer(nn.Module):
    """A block that computes quickly and has much to copy. cycles: how long a GPU idles before it."""

    def __init__(self, width: int, cycles: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.cycles = cycles

    def forward(self, x: Tensor, _: Any) -> Tensor:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return x + self.linear(x).tanh()


class Stack(nn.Module):
    """A transformer without anything else."""

    spec = DitSpec(("blocks",))

    def __init__(self, blocks: int, width: int, cycles: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(width, cycles) for _ in range(blocks))
        generator = torch.Generator().manual_seed(5)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * width**-0.5

    def forward(self, x: Tensor, tweaks: Tweaks = Tweaks()) -> Tensor:  # noqa: B008
        hidden = Hidden(x, None)
        run_blocks(self, hidden, tweaks)
        return hidden.x


def stack_on(
    device: torch.device,
    blocks: int = 0,
    slots: int = 2,
    late: str = "neither",
    checkpoints: str = "kept",
    learns: bool = False,
) -> Stack:
    """A stack on a device, its blocks swapped and checkpointed. A block has 16 MiB to copy."""
    stack = Stack(12, 2048, CYCLES if late == "computation" else 0).requires_grad_(learns)
    if checkpoints != "kept":
        offload = offload_to_host(device) if checkpoints == "offloaded" else None
        checkpoint_blocks(stack, stack.spec, offload=offload)
    swapped(stack, stack.spec, blocks, transfer_to(device, late), slots=slots, where=device)
    move_network(stack, device)
    return stack.train()


def passes(stack: Stack, device: torch.device, repeats: int, spoil: bool) -> list[Tensor]:
    """Training passes with samples between them: outputs, and gradients of the input."""
    found: list[Tensor] = []
    for seed in range(repeats):
        if spoil:
            poison(device, 1 << 26)
        x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
        # two passes before the backward passes: slots hold other blocks then than in either pass
        output = stack(x)
        (output.square().sum() + stack(2 * x).square().sum()).backward()
        assert x.grad is not None
        with torch.no_grad():
            sample = stack(x.detach(), tweaks=Tweaks(skip_blocks=frozenset({1, 2})))
        found += [output.detach(), x.grad, sample]
    return found


LATE = pytest.mark.parametrize("late", ["neither", "computation", "copies"])


@LATE
@pytest.mark.parametrize(("slots", "checkpoints"), [(3, "kept"), (2, "checkpointed"), (2, "offloaded")])
def test_many_quick_blocks_never_meet_weights_that_are_not_there(
    cuda: torch.device, deterministic: None, checkpoints: str, slots: int, late: str
) -> None:
    expected = passes(stack_on(cuda, checkpoints=checkpoints), cuda, 6, spoil=False)
    found = passes(stack_on(cuda, 11, slots, late, checkpoints), cuda, 6, spoil=True)

    assert same(found, expected)


@LATE
def test_weights_that_learn_are_copied_back(cuda: torch.device, deterministic: None, late: str) -> None:
    """Stepped inside the backward pass, read after `settle`."""
    results = []
    for blocks in (0, 4):
        stack = stack_on(cuda, blocks, late=late, learns=True)
        step_in_backward(stack)
        passes(stack, cuda, 3, spoil=False)
        settle_all([stack])
        results.append([weight.detach().cpu().clone() for weight in stack.parameters()])
    assert same(*results)
    untrained = next(stack_on(cuda, learns=True).parameters())
    assert not equal_bits(results[0][0], untrained.detach().cpu())


def several_steps(
    case: Case, device: torch.device, blocks: int, slots: int, checkpoints: str, late: str = "neither"
) -> list[Tensor]:
    """Steps of a LoRA with samples between them."""
    is_checkpointed = checkpoints != "kept"
    transfer = transfer_to(device, late)
    dit, network = learner(
        case,
        blocks,
        is_checkpointed,
        transfer,
        where=device,
        slots=slots,
        offload=checkpoints == "offloaded",
    )
    optimizer, seen = torch.optim.AdamW(network.parameters(), lr=1e-2), []
    for step in range(2):
        seen += gradients(case, dit, network, step, device)
        optimizer.step()
        dit.eval()
        with torch.no_grad():
            seen.append(
                dit(**sent(case.inputs(90 + step), device), tweaks=Tweaks(skip_blocks=frozenset({1})))
            )
        dit.train(is_checkpointed)
        if (swap := swap_of(dit)) is not None:
            swap.park()
    return [*seen, *(weight.detach().clone() for weight in network.parameters())]


@pytest.mark.parametrize("late", ["neither", "copies"])
@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_with_swapped_blocks(
    cuda: torch.device, deterministic: None, case: Case, checkpoints: str, late: str
) -> None:
    expected = several_steps(case, cuda, 0, 2, "checkpointed" if checkpoints == "offloaded" else checkpoints)
    for blocks, slots in ((1, 2), (case.most - 1, 3), (case.most, 2)):
        assert same(several_steps(case, cuda, blocks, slots, checkpoints, late), expected)


@pytest.mark.parametrize("blocks", [0, 3])
def test_networks_that_take_turns(cuda: torch.device, deterministic: None, blocks: int) -> None:
    case = CASES[0]
    inputs = sent(case.inputs(1), cuda)
    with torch.no_grad():
        expected = [case.make().eval().to(cuda)(**inputs)]
        dits, copies = [], []
        for _ in range(2):
            dit, transfer = case.make().eval(), LateCopies(cuda)
            swapped(dit, case.spec, blocks, transfer, where=cuda)
            copies.append(HostCopy(dit, cuda, None, transfer))
            dits.append(dit)
        for turn in (0, 1, 0, 1):
            copies[1 - turn].leave()
            poison(cuda, 1 << 22)
            copies[turn].bring()
            assert copies[turn].is_here
            assert same([dits[turn](**inputs)], expected)


def test_a_network_that_left_has_freed_its_memory(cuda: torch.device) -> None:
    stack = Stack(8, 1024)
    stack.requires_grad_(False)
    before = torch.cuda.memory_allocated()
    copy = HostCopy(stack, cuda)
    assert all(weight.is_pinned() for weight in stack.parameters())
    for _ in range(2):
        copy.bring()
        assert torch.cuda.memory_allocated() - before == copy.size_bytes == 8 << 22
        copy.leave()
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(("blocks", "slots"), [(3, 2), (9, 3), (11, 2)])
def test_the_device_holds_what_the_plan_says(cuda: torch.device, blocks: int, slots: int) -> None:
    stack = Stack(12, 1024)
    stack.requires_grad_(False)
    x = torch.ones(1, 1024, device=cuda)
    with torch.no_grad():
        x @ torch.ones(1024, 1024, device=cuda)  # cuBLAS's workspace
        planned = plan_swapped_bytes(stack, SwapPlan(stack.spec, blocks, slots=slots))
        before = torch.cuda.memory_allocated()
        swapped(stack, stack.spec, blocks, slots=slots, where=cuda)
        move_network(stack, cuda)
        for _ in range(3):
            stack(x)
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx((12 << 22) - planned.saved, rel=0.01)


def test_host_memory_is_pinned_for_as_long_as_it_is_used(cuda: torch.device) -> None:
    size, mapping = 1 << 24, mmap.mmap(-1, 1 << 24)
    whole, unlocked = host_memory._as_tensor(mapping, [range(size // 2), range(size // 2, size)])
    part, address = whole[4096:8192], whole.data_ptr()
    assert unlocked == 0
    assert part.is_pinned()
    assert whole[-4096:].is_pinned()
    del whole
    gc.collect()
    assert part.is_pinned()
    del part
    gc.collect()
    assert host_memory._register(address, size)  # it would be refused if it still were
    assert not host_memory._register(address, size)
    assert torch.ones(3, device=cuda).sum().item() == 3  # what was refused is not held against a later call
    host_memory._unregister([address])


def test_swapped_weights_and_waiting_inputs_are_in_pinned_memory(cuda: torch.device) -> None:
    stack = Stack(6, 64)
    stack.requires_grad_(False)
    host = host_weights(SwapPlan(stack.spec, 4), cuda)
    assert host is not None
    swap_blocks(stack, host, cuda)
    assert all(weight.is_pinned() for weight in host.adopt(stack).values())
    offload = offload_to_host(cuda)
    piece = offload.memory.take(5000)
    assert piece.is_pinned()


def test_a_copy_to_the_host_arrives_before_its_source_is_used_again(cuda: torch.device) -> None:
    """Inputs that leave late, of a computation that goes on writing into freed memory."""
    x = torch.randn(64, 2048, device=cuda, requires_grad=True)
    results = []
    for late in (False, True):
        offload = offload_to_host(cuda)
        if late:
            offload._transfer = LateCopies(cuda)
        stack = Stack(12, 2048).requires_grad_(False)
        checkpoint_blocks(stack, stack.spec, offload=offload)
        move_network(stack.train(), cuda)
        for _ in range(3):
            x.grad = None
            poison(cuda, 1 << 26)
            stack(x).square().sum().backward()
        assert x.grad is not None
        results.append(x.grad.clone())
    assert equal_bits(*results)
