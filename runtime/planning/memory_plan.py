"""Predict the peak of device and host memory by part, show it as a table, and decide whether it fits."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, TypeVar

import torch
from torch import nn

from modules.control_codes import escape_control_codes
from modules.devices import GIB, format_gib
from modules.errors import MemoryPlanError, OptionError, UserError
from modules.speed_options import SMALL_FORMS
from protocols.family import DitSpec
from runtime.offload.joining import launched_processes
from runtime.offload.swap_plan import SwapPlan, big_weights, max_blocks
from runtime.options import (
    GenerationSpeedOptions,
    Speed,
    SwapOptions,
    TrainingSpeedOptions,
    set_blocks_to_swap,
)
from runtime.planning import dry_run
from runtime.planning.device_memory import CONTEXT, DeviceMemory

# cuBLAS needs a workspace for every thread that multiplies: the main one, and autograd's in training. torch
# allocates it, so it is in `max_memory_allocated`. Source: CUDA semantics in torch's documentation,
# CUBLAS_WORKSPACE_CONFIG; NVIDIA's cublasSetWorkspace.
WORKSPACE, SMALL_WORKSPACE = 32 << 20, 8320 << 10  # Hopper and later; older GPUs


@dataclass(frozen=True)
class MemoryPart:
    """One line of a memory plan: a kind of memory, with its bytes on the device and on the host."""

    name: str
    device: int
    host: int = 0
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """Memory in use at the peak of one phase of the run."""

    name: str
    parts: tuple[MemoryPart, ...]

    @property
    def device(self) -> int:
        """Return the peak that torch's allocator will report, in bytes."""
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> int:
        """Bytes of host memory of the phase."""
        return sum(part.host for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a run in order; each frees its memory before the next one starts."""

    phases: tuple[Phase, ...]
    remarks: tuple[str, ...] = ()

    @property
    def worst(self) -> Phase:
        """The phase of the run that needs the most device memory."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def device(self) -> int:
        """Bytes of device memory at the peak of the run."""
        return self.worst.device

    @property
    def host(self) -> int:
        """Bytes of host memory at the peak of the run."""
        return max(phase.host for phase in self.phases)


def workspace(device: torch.device, is_training: bool) -> MemoryPart:
    """Return the memory of cuBLAS's workspaces; without a CUDA device, the size on a Hopper GPU."""
    is_large = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    size = WORKSPACE if is_large else SMALL_WORKSPACE
    return MemoryPart("cuBLAS", (2 if is_training else 1) * size, note="workspace of matrix products")


@dataclass(frozen=True)
class OffloadedWeights:
    """Bytes of weights that leave the device if blocks are swapped or split over processes."""

    host_bytes: int  # bytes of weights that move to host memory
    slot_bytes: int  # bytes of device slots for streaming weights or gathering blocks
    on_other_processes: int = 0  # bytes of weights that other processes keep
    processes: int = 1  # number of processes that share the weights

    @property
    def saved_device_bytes(self) -> int:
        """Bytes of device memory that the swap saves: the moved weights minus the slots for streaming."""
        return self.host_bytes + self.on_other_processes - self.slot_bytes

    def describe(self, blocks: int, slot_note: str) -> str:
        """Return the note of a memory plan about the swapped or split weights.

        Args:
            blocks: Number of swapped blocks.
            slot_note: Text that follows the size of the slots.
        """
        if self.processes > 1:
            buffer = format_gib(self.slot_bytes)
            return f"; blocks split over {self.processes} processes, {buffer} to gather them"
        return (
            f"; {blocks} blocks swapped, {format_gib(self.slot_bytes)} {slot_note}" if self.host_bytes else ""
        )


def plan_swapped_bytes(dit: nn.Module, plan: SwapPlan) -> OffloadedWeights:
    """Return the byte counts of a swap plan for a network on any device.

    Raises:
        OptionError: If the network has too few blocks.
    """

    def size(names: Iterable[str]) -> int:
        return sum(dry_run.round_up_bytes(dit.get_parameter(name).nbytes) for name in names)

    # input layers move one at a time; each list of blocks has slots of the size of its largest block
    slot_bytes = max((size(big_weights(dit, name)) for name in plan.input_layer_names(dit)), default=0)
    for list_plan in plan.lists(dit):
        blocks = [size(big_weights(dit, f"{list_plan.name}.{index}")) for index in list_plan.streamed]
        slot_bytes += list_plan.slots * max(blocks, default=0)
    return OffloadedWeights(size(plan.names(dit)), slot_bytes)


GATHERED = 3  # blocks on the device: one computes, one is gathered, one is the receive buffer


def sharing_processes(speed: TrainingSpeedOptions | GenerationSpeedOptions) -> int:
    """Return the number of processes that share the transformer; with --plan and no launcher, at least 2."""
    if not speed.modes.splits_weights:
        return 1
    launched = launched_processes()
    if launched == 1 and speed.plan.is_planning:
        return max(2, speed.plan.cards[0])
    return launched


def predict_swaps(
    dit: nn.Module, spec: DitSpec, swap: SwapOptions, processes: int = 1
) -> list[OffloadedWeights]:
    """Return what each possible --blocks_to_swap, from 0, moves off the device, given the options in `swap`.

    Args:
        dit: The transformer.
        spec: Names of the network's blocks.
        swap: Options of block swap.
        processes: Number of processes that share the blocks; if there are several, no blocks can be swapped.
    """
    if processes > 1:
        return [share_blocks(weights_by_block(dit, spec), processes)]
    totals = [len(blocks) for blocks in spec.blocks(dit).values()]
    moves_layers = swap.img_in_txt_in_offloading
    slots = swap.block_swap_ring_size
    max_swapped_blocks = max_blocks(totals, spec.swap_counts, spec.num_unswapped)
    return [
        plan_swapped_bytes(dit, SwapPlan(spec, count, moves_layers, slots))
        for count in range(max_swapped_blocks + 1)
    ]


BlockWeights = tuple[tuple[int, int], ...]  # rows and bytes of each weight of a block that can be split


def weights_by_block(dit: nn.Module, spec: DitSpec) -> tuple[BlockWeights, ...]:
    """Return the weights of each block that can be split, in the order in which the blocks run.

    Only one of a block's vectors (biases, norm weights) is split: they are small, but gloo gathers 8-bit
    weights only next to another dtype.
    """
    by_block: list[BlockWeights] = []
    for block in chain.from_iterable(spec.blocks(dit).values()):
        weights = sorted(block.parameters(), key=lambda weight: weight.ndim < 2)  # vectors last
        matrices = sum(weight.ndim > 1 for weight in weights)
        split = weights[: matrices + 1]  # all matrices, and one vector
        by_block.append(tuple((len(weight) if weight.ndim else 1, weight.nbytes) for weight in split))
    return tuple(by_block)


def share_blocks(blocks: Sequence[BlockWeights], processes: int) -> OffloadedWeights:
    """Return the bytes of weights that leave each device if blocks are split over processes."""
    block_bytes = [sum(dry_run.round_up_bytes(size) for _, size in block) for block in blocks]
    total = sum(block_bytes)
    return OffloadedWeights(0, GATHERED * max(block_bytes, default=0), total - total // processes, processes)


PART_NAMES = {
    dry_run.WEIGHTS: "weights of the transformer",
    dry_run.TEXTS: "weights of text encoders",
    dry_run.ADAPTER: "LoRA in training steps only",
    dry_run.NETWORK: "network",
    dry_run.GRADIENTS: "gradients",
    dry_run.OPTIMIZER: "optimizer",
    dry_run.BATCH: "batch",
    dry_run.ACTIVATIONS: "kept activations",
    dry_run.ATTENTION: "attention workspace",
    dry_run.TEMPORARY: "work on one block",
}


def list_memory_parts(
    bytes_by_kind: dry_run.BytesByKind,
    swap: OffloadedWeights,
    notes: Mapping[str, str],
    waiting: int = 0,
    network: str = "LoRA",
) -> tuple[MemoryPart, ...]:
    """Return the lines of a memory plan for the peak of one phase.

    Args:
        bytes_by_kind: Device bytes at the peak, with all weights on the device.
        swap: Bytes of weights that leave the device by swapping.
        notes: Notes by kind.
        waiting: Bytes of activations that wait in host memory.
        network: Name of what is trained or added to the transformer.
    """
    plan_lines = []
    for kind, name in PART_NAMES.items():
        size = bytes_by_kind.get(kind, 0)
        host = 0
        if kind == dry_run.WEIGHTS:
            size -= swap.saved_device_bytes
            host = swap.host_bytes
        elif kind == dry_run.ACTIVATIONS:
            # some of them wait in host memory for the backward pass
            host = waiting
        elif kind == dry_run.NETWORK:
            name = f"{name} ({network})"
        if size or host:
            plan_lines.append(MemoryPart(name, size, host, notes.get(kind, "")))
    return tuple(plan_lines)


def format_dtype_sizes(dit: nn.Module) -> str:
    """Return the GiB of a network's weights by dtype, largest first: `26.60 bfloat16, 0.30 float32`."""
    sizes: dict[str, int] = {}
    for tensor in [*dit.parameters(), *dit.buffers()]:
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + dry_run.round_up_bytes(tensor.nbytes)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    # sizes below 0.005 GiB, which round to 0.00, are left out, unless there is nothing else
    listed = [(name, size) for name, size in ordered if size >= GIB // 200] or ordered[:1]
    return ", ".join(f"{format_gib(size)} {name}" for name, size in listed)


def verdict(plan: MemoryPlan, device_memory: DeviceMemory | None, advice: Sequence[str] = ()) -> str:
    """Return the last line of a plan: whether it fits, and if not, what to change."""
    needed = f"{format_gib(plan.device)} GiB of tensors and about {format_gib(CONTEXT)} of CUDA itself"
    if device_memory is None:
        return (
            f"Needs {needed}. There is no CUDA device to compare with; --plan 24 plans for a card of 24 GiB."
        )
    free_gib, total_gib = format_gib(device_memory.free), format_gib(device_memory.total)
    free = f"{device_memory.name}: {free_gib} of {total_gib} GiB are free"
    if device_memory.is_planned:  # a card of the size given to --plan, not the one in this machine
        free = f"{device_memory.name}, all of it free; a screen and other programs take 0.5 to 1.5 GiB of one"
    if plan.device <= device_memory.usable:
        return f"Fits: {needed}. {free}."
    lines = "\n".join(f"  {line}" for line in advice)
    return f"Does not fit: {needed}. {free}." + (
        f"\nWhat to change, the cheapest first:\n{lines}" if lines else ""
    )


def show(plan: MemoryPlan, last_line: str) -> None:
    """Print the plan as a table in GiB, followed by its notes and `last_line`."""
    rows = [("GiB", "device", "host", "")]
    for phase in plan.phases:
        is_marked = phase is plan.worst and len(plan.phases) > 1  # a single phase is always the largest
        name = f"{phase.name} (largest)" if is_marked else phase.name
        rows.append(_make_row(MemoryPart(name, phase.device, phase.host)))
        for part in phase.parts:
            rows.append(_make_row(replace(part, name=f"  {part.name}")))
    columns = list(zip(*rows, strict=True))
    name_width, device_width, host_width, _ = (max(map(len, column)) for column in columns)
    lines = []
    for name, device, host, note in rows:
        line = f"{name:<{name_width}}  {device:>{device_width}}  {host:>{host_width}}  {note}"
        lines.append(line.rstrip())
    text = "\n".join(["Memory plan", *lines, *plan.remarks, last_line])
    sys.stdout.write(f"{escape_control_codes(text)}\n")


def _make_row(part: MemoryPart) -> tuple[str, str, str, str]:
    """Return name, device bytes, host bytes and note of a part as strings."""
    host = format_gib(part.host) if part.host else ""
    return part.name, format_gib(part.device), host, part.note


class Swappable(Protocol):
    """Predicts device memory for each number of swapped blocks, from 0 to `max_swapped_blocks`."""

    @property
    def max_swapped_blocks(self) -> int:
        """Largest number of blocks that can be swapped."""

    def device_bytes(self, blocks: int, /) -> int:
        """Return the bytes of device memory with this number of swapped blocks."""


def smallest_swap(prediction: Swappable, usable: int) -> int | None:
    """Return the smallest number of swapped blocks that fits into `usable` bytes; None if no number does."""
    return next(
        (
            count
            for count in range(prediction.max_swapped_blocks + 1)
            if prediction.device_bytes(count) <= usable
        ),
        None,
    )


def swap_for(
    prediction: Swappable, swap: SwapOptions, device_memory: DeviceMemory | None
) -> tuple[int, str | None]:
    """Return the number of blocks to swap, and its reason if --blocks_to_swap is `auto`.

    With `auto`, the number is the smallest that fits the device, or the largest possible if none fits. It is
    0 if the memory of the device is not known.

    Raises:
        OptionError: If there are too few blocks.
    """
    maximum = prediction.max_swapped_blocks
    if not swap.is_auto:
        if swap.number > maximum:
            raise OptionError(
                f"--blocks_to_swap {swap.number}: at most {maximum} of this transformer's blocks can be "
                f"swapped. Use {maximum} or less"
            )
        return swap.number, None
    if device_memory is None:
        return 0, "--blocks_to_swap auto: 0, because there is no CUDA device to fit."
    count = smallest_swap(prediction, device_memory.usable)
    usable = f"{format_gib(device_memory.usable)} of {device_memory.name} can be used"
    if count is None:
        return maximum, (
            f"--blocks_to_swap auto: {maximum}, the largest possible number; even so "
            f"{format_gib(prediction.device_bytes(maximum))} GiB are predicted; {usable}."
        )
    fewer = (
        f"; with {count - 1} it would be {format_gib(prediction.device_bytes(count - 1))}" if count else ""
    )
    return count, (
        f"--blocks_to_swap auto: {count}. {format_gib(prediction.device_bytes(count))} GiB are predicted, "
        f"{usable}{fewer}."
    )


def print_plan(
    prediction: Swappable,
    swap: SwapOptions,
    device_memory: DeviceMemory | None,
    make_plan: Callable[[int, Sequence[str]], MemoryPlan],
    advice: Callable[[DeviceMemory], Sequence[str]],
) -> None:
    """Print the memory plan of a run, and whether it fits into the available memory.

    Args:
        prediction: Prediction of the device bytes.
        swap: Options of block swap.
        device_memory: Available memory.
        make_plan: Makes the plan from the number of swapped blocks and a list of notes.
        advice: Returns lines of advice if the plan does not fit.
    """
    blocks, reason = swap_for(prediction, swap, device_memory)
    plan = make_plan(blocks, [] if reason is None else [reason])
    fits = device_memory is None or plan.device <= device_memory.usable
    advice_lines = () if fits or device_memory is None else advice(device_memory)
    show(plan, verdict(plan, device_memory, advice_lines))


logger = logging.getLogger(__name__)

Predicted = TypeVar("Predicted", bound=Swappable)


def resolve_swap(
    speed: Speed, device_memory: DeviceMemory | None, predict: Callable[[], Predicted]
) -> tuple[Speed, Predicted | None]:
    """Replace --blocks_to_swap auto by a number; return the options and the prediction.

    The prediction is None without a device to plan for, or if the rehearsal (a run on fake tensors)
    failed; a failure is only logged, because a run works without a plan too.

    Args:
        speed: Options of memory and speed.
        device_memory: Memory of a CUDA device; without one nothing is rehearsed, and auto becomes 0.
        predict: Rehearses the run.

    Raises:
        UserError: If the rehearsal raises it.
        MemoryPlanError: If the rehearsal fails and auto depends on it.
        OptionError: If the network has fewer blocks than are to be swapped.
    """
    if device_memory is None:
        return (set_blocks_to_swap(speed, 0) if speed.swap.is_auto else speed), None
    try:
        prediction = predict()
    except UserError:
        raise
    except Exception as error:
        if speed.swap.is_auto:
            raise MemoryPlanError(
                f"--blocks_to_swap auto: no plan can be made ({error}). Use a number of blocks."
            ) from error
        logger.warning("The memory of this run cannot be predicted (%s: %s).", type(error).__name__, error)
        return speed, None
    blocks, reason = swap_for(prediction, speed.swap, device_memory)
    if reason is not None:
        logger.info(reason)
        speed = set_blocks_to_swap(speed, blocks)
    return speed, prediction


def advise(
    prediction: Predicted,
    memory_savers: Sequence[tuple[str, Callable[[], Predicted]]],
    usable: int,
    swapped: int = 0,
    can_swap: bool = True,
    phase: str = "",
) -> tuple[list[str], Predicted | None]:
    """Suggest options that make a run fit, cheapest first; each line adds to the previous ones.

    Args:
        prediction: The prediction with the current options.
        memory_savers: Unused options, each with a function that predicts a run with it and all before it.
        usable: Usable bytes of the device.
        swapped: Number of blocks that the options swap.
        can_swap: Whether blocks can be swapped.
        phase: Text after the bytes, such as " while denoising".

    Returns:
        The lines, and the last prediction if even that one does not fit, else None.
    """
    lines: list[str] = []
    for name, predict in memory_savers:
        prediction = predict()
        needed = prediction.device_bytes(swapped)
        if needed <= usable:
            return [*lines, f"{name}: {format_gib(needed)} GiB{phase} fits"], None
        remark = SMALL_FORMS if "fp8" in name else ""
        lines.append(f"{name}: {format_gib(needed)} GiB{phase}{remark}")
        fitting_swap = _describe_fitting_swap(prediction, usable, phase) if can_swap else None
        if fitting_swap is not None:
            return [*lines, fitting_swap], None
    if not memory_savers and can_swap:  # swapping blocks is the only remedy
        fitting_swap = _describe_fitting_swap(prediction, usable, phase)
        if fitting_swap is not None:
            return [fitting_swap], None
    return lines, prediction


def _describe_fitting_swap(prediction: Swappable, usable: int, phase: str) -> str | None:
    """Return a line on the smallest --blocks_to_swap with which a run fits; None if no number fits."""
    count = smallest_swap(prediction, usable)
    if count is None:
        return None
    return f"--blocks_to_swap {count}: {format_gib(prediction.device_bytes(count))} GiB{phase} fits"
