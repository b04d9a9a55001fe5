"""Swapped blocks, activations in host memory and networks that take turns give the bits of those that stay.

tests/runtime/offload shows it on a fake device. On CUDA copies run beside the computation; to make races
show, either side is made late.
"""

import gc
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blissful_tuner.latent_preview import copy_to_host
from checkpoints.filling import load_module
from checkpoints.opening import list_tensor_sources, open_checkpoint
from encoders.frame_groups import FrameCache
from modules.devices import send_ahead
from modules.layers.convolution import memory_formats, repeat_pixels, set_memory_format
from protocols.family import DitSpec
from protocols.loading import Placement, TensorInfo
from protocols.steps import Overrides
from runtime.offload import host_memory
from runtime.offload.block_swap import move_network, swap_blocks, write_back_all
from runtime.offload.checkpointing import checkpoint_blocks, offload_to_host
from runtime.offload.host_memory import PIN_CHUNK, CudaTransfer, Pairs, allocate
from runtime.offload.swap_plan import SwapPlan, host_weights
from runtime.offload.turns import HostCopy
from runtime.planning.memory_plan import plan_swapped_bytes
from runtime.run_blocks import Hidden, run_blocks
from tests.gpu.measuring import equal_bits, no_waits, peak_of, poison, sent
from tests.modules.making import write
from tests.modules.swap_cases import CASES, same, step_in_backward, swapped
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit
from wan.spec import DIT
from wan.vae_blocks import WanCausalConv, WanFrameAttention, WanResidualBlock

pytestmark = pytest.mark.gpu

CYCLES = 1_000_000  # of the device's clock: most of a millisecond


class LateCopies(CudaTransfer):
    """Begins each copy late: what does not wait for it reads old memory."""

    def copy(self, pairs: Pairs, after: Any) -> Any:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(CYCLES)
        return super().copy(pairs, after)


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

    def forward(self, x: Tensor, overrides: Overrides = Overrides()) -> Tensor:  # noqa: B008
        hidden = Hidden(x, None)
        run_blocks(self, hidden, overrides)
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
    transfer = LateCopies(device) if late == "copies" else None
    swapped(stack, stack.spec, blocks, transfer, slots=slots, where=device)
    move_network(stack, device)
    return stack.train()


def passes(stack: Stack, device: torch.device, repeats: int, spoil: bool, count: int = 2) -> list[Tensor]:
    """Training passes with samples between them: outputs, and gradients of the input.

    count: of the passes before each backward pass.
    """
    found: list[Tensor] = []
    for seed in range(repeats):
        if spoil:
            poison(device, 1 << 26)
        x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
        # with two passes slots hold other blocks in the backward passes than in either pass
        outputs = [stack((1 + index) * x) for index in range(count)]
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        assert x.grad is not None
        with torch.no_grad():
            sample = stack(x.detach(), overrides=Overrides(skip_blocks=frozenset({1, 2})))
        found += [outputs[0].detach(), x.grad, sample]
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
    """Stepped inside the backward pass, read after `settle`.

    Targets with two passes that learn refuse --fused_backward_pass: torch makes a new accumulator of
    gradients for a weight that has changed its device, and each would step it.
    """
    results = []
    for blocks in (0, 4):
        stack = stack_on(cuda, blocks, late=late, learns=True)
        step_in_backward(stack)
        passes(stack, cuda, 3, spoil=False, count=1)
        write_back_all([stack])
        results.append([weight.detach().cpu().clone() for weight in stack.parameters()])
    assert same(*results)
    untrained = next(stack_on(cuda, learns=True).parameters())
    assert not equal_bits(results[0][0], untrained.detach().cpu())


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
            copies[1 - turn].free_device_memory()
            poison(cuda, 1 << 22)
            copies[turn].to_device()
            assert copies[turn].is_on_device
            assert same([dits[turn](**inputs)], expected)


def test_a_network_that_left_has_freed_its_memory(cuda: torch.device) -> None:
    stack = Stack(8, 1024)
    stack.requires_grad_(False)
    before = torch.cuda.memory_allocated()
    copy = HostCopy(stack, cuda)
    assert all(weight.is_pinned() for weight in stack.parameters())
    for _ in range(2):
        copy.to_device()
        assert torch.cuda.memory_allocated() - before == copy.size_bytes == 8 << 22
        copy.free_device_memory()
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
    assert held == pytest.approx((12 << 22) - planned.saved_device_bytes, rel=0.01)


def test_host_memory_is_pinned_for_as_long_as_it_is_used(cuda: torch.device) -> None:
    size, mapping = 1 << 24, mmap.mmap(-1, 1 << 24)
    full, unlocked = host_memory._pin_as_tensor(mapping, [range(size // 2), range(size // 2, size)])
    part, address = full[4096:8192], full.data_ptr()
    assert unlocked == 0
    assert part.is_pinned()
    assert full[-4096:].is_pinned()
    del full
    gc.collect()
    assert part.is_pinned()
    del part
    gc.collect()
    assert host_memory._register(address, size)  # it would be refused if it still were
    assert not host_memory._register(address, size)
    assert not host_memory._register(1 << 46, 1 << 40)  # a terabyte that is not there
    assert torch.ones(3, device=cuda).sum().item() == 3  # what was refused is not held against a later call
    torch.cuda.synchronize(cuda)
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


MB = 1 << 20


def test_tensors_of_several_pieces_are_copied_both_ways(cuda: torch.device) -> None:
    infos = {name: TensorInfo(torch.int32, (PIN_CHUNK // 16,)) for name in "abcdef"}
    held = allocate(infos, pinned=True)

    assert held.unpinned_bytes == 0
    for number, host in enumerate(held.tensors.values()):
        assert host.is_pinned()
        there = torch.full(host.shape, number, dtype=torch.int32, device=cuda)
        host.copy_(there, non_blocking=True)
        back = host.to(cuda, non_blocking=True)
        assert torch.equal(back, there)


@pytest.mark.parametrize("size", [1000, 8 * MB])
def test_what_is_sent_ahead_does_not_wait_for_the_queue(cuda: torch.device, size: int) -> None:
    source = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    send_ahead(source, cuda)  # pinned memory is there from now on
    torch.cuda.synchronize(cuda)

    start = time.perf_counter()
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    sent = send_ahead(source, cuda)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize(cuda)

    assert time.perf_counter() - start > 0.2, "the queue was empty: the test shows nothing"
    assert seconds < 0.1
    assert torch.equal(sent.cpu(), source)


def test_loading_leaves_no_pinned_memory_behind(cuda: torch.device, tmp_path: Path) -> None:
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip(f"torch {torch.__version__} does not count pinned memory")
    with torch.device("meta"):
        module = nn.Linear(1100, 1000, bias=False)
    path = write(tmp_path / "model.safetensors", {"weight": torch.ones(1000, 1100)})

    def pinned() -> int:
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    before = pinned()
    with open_checkpoint(path) as checkpoint:
        sources = list_tensor_sources(checkpoint)
        load_module(module, checkpoint, sources, device=cuda, dtype=lambda name, stored: stored)

    assert pinned() <= before
    assert module.weight.sum().item() == 1_100_000


@pytest.mark.parametrize("target", [None, torch.float32], ids=["as stored", "float32"])
@pytest.mark.parametrize("dialect", ["safetensors", "pth", "fp8_scaled"])
def test_a_device_and_memory_for_copies_to_it_get_the_bytes_of_the_file(
    cuda: torch.device, tmp_path: Path, dialect: str, target: torch.dtype | None
) -> None:
    """Through one pinned buffer for all tensors."""
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=3), dialect)
    poison(cuda, 1 << 24)
    expected = load_dit(path, Placement(torch.device("cpu"), compute_dtype=target)).state_dict()
    for host in (None, host_weights(SwapPlan(DIT, 0), cuda, all_weights=True)):
        found = load_dit(path, Placement(cuda, compute_dtype=target, host_weights=host)).state_dict()
        assert found.keys() == expected.keys()
        assert all(equal_bits(found[name], each) for name, each in expected.items())
        if host is None:
            assert all(each.is_cuda for each in found.values())
        else:
            assert all(found[name].data_ptr() == each.data_ptr() for name, each in host.tensors.items())
            assert all(each.is_pinned() for each in host.tensors.values())


def clip(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, dtype, memory_format=memory_formats(device)[0])


def test_a_preview_is_brought_home_without_a_wait(cuda: torch.device) -> None:
    x = torch.arange(1 << 22, device=cuda)
    expected = (x * 3).cpu()

    with no_waits(cuda):
        torch.cuda._sleep(100_000_000)
        home = copy_to_host(x * 3)
        noise = [torch.full_like(x, -1) for _ in range(4)]  # would take the memory of the product

    assert equal_bits(home(), expected)
    assert len(noise) == 4


@pytest.mark.parametrize("size", [(17, 256, 512, 512), (1, 256, 2176, 2048)])  # many frames, large ones
def test_pixels_are_repeated_beyond_what_32_bits_count(cuda: torch.device, size: tuple[int, ...]) -> None:
    """torch's kernel leaves zeros there, without an error (pytorch/pytorch#141831)."""
    x = torch.ones(size, dtype=torch.bfloat16, device=cuda).to(memory_format=torch.channels_last)
    x[-1, :, -1, -1] = 2

    large = repeat_pixels(x, 2)

    assert large.numel() > 1 << 31
    assert bool((large[-1, :, -2:, -2:] == 2).all())
    assert all(bool((frame[:, :-2] == 1).all()) for frame in large)


def test_chunks_kept_in_host_memory_give_the_bits_of_those_on_the_device(cuda: torch.device) -> None:
    block = WanResidualBlock(32, 32).to(cuda, torch.bfloat16).requires_grad_(False)
    set_memory_format(block, cuda)
    x = clip(cuda, torch.bfloat16, 1, 32, 13, 24, 16)

    def made(on_cpu: bool) -> Tensor:
        memory = FrameCache(on_cpu)
        return torch.cat([block(part, memory) for part in x.split([1, 4, 4, 4], dim=2)], dim=2)

    assert equal_bits(made(True), made(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_convolution_needs_no_column_for_each_pixel(cuda: torch.device, dtype: torch.dtype) -> None:
    """cuDNN computes it, also the versions that torch keeps from clips that are not channels last
    (pytorch/pytorch#166643): torch's own kernel would write out 27 values for each.
    """
    layer = WanCausalConv(96, 96).to(cuda, dtype).requires_grad_(False)
    set_memory_format(layer, cuda)
    x = clip(cuda, dtype, 1, 96, 4, 480, 832)
    layer(x, None)  # chooses its kernel

    _, peak, _ = peak_of(cuda, lambda: layer(x, None))

    assert peak < 4 * x.nbytes  # padded clip, result, workspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_a_wide_head_keeps_no_table_of_scores(cuda: torch.device, dtype: torch.dtype) -> None:
    """FlashAttention takes heads of up to 256 channels, the VAE's only one has 384."""
    layer = WanFrameAttention(384).to(cuda, dtype).requires_grad_(False)
    x = clip(cuda, dtype, 1, 384, 1, 60, 104)
    layer(x, None)

    _, peak, _ = peak_of(cuda, lambda: layer(x, None))

    assert peak < (60 * 104) ** 2 * x.itemsize
