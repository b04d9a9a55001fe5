"""The predicted peak of device and host memory by part: arithmetic, the table that shows it, and whether it
fits.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from modules.contract.family import DitSpec
from modules.errors import MemoryPlanError, OptionError, UserError
from modules.offload.options import SwapOptions
from modules.offload.swap_plan import SwapPlan, big_weights, most_blocks
from modules.planning.dry_run import (
    ATTENTION,
    BATCH,
    GRADIENTS,
    KEPT,
    NETWORK,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
    Moment,
    rounded,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
GIB = 1 << 30
# What a device holds beside the tensors that torch counts: the CUDA context with its kernels, a few hundred
# MB on every driver.
CONTEXT = 600 << 20
# Holes between tensors, and the monitor's share of the card. A prediction that leaves less than this does not
# count as fitting.
MARGIN = 0.03
# cuBLAS takes a workspace for every thread that multiplies: the main one, and autograd's in training. torch
# allocates it, so it is in `max_memory_allocated`. Source: CUDA semantics in torch's documentation,
# CUBLAS_WORKSPACE_CONFIG; NVIDIA's cublasSetWorkspace.
WORKSPACE, SMALL_WORKSPACE = 32 << 20, 8320 << 10  # from Hopper on, and before it
TOLERANCE = 0.07  # how far a prediction may be from what was measured before that is said


@dataclass(frozen=True)
class Part:
    """One line of the plan, in bytes."""

    name: str
    device: int
    host: int = 0
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is held at the worst moment of a part of the run."""

    name: str
    parts: tuple[Part, ...]

    @property
    def device(self) -> int:
        """Bytes that torch's allocator will say it had at most."""
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> int:
        return sum(part.host for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a run, one after the other; each is given its memory back by the one before."""

    title: str
    phases: tuple[Phase, ...]
    remarks: tuple[str, ...] = ()

    @property
    def worst(self) -> Phase:
        """The phase that the device has to be large enough for."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def device(self) -> int:
        return self.worst.device

    @property
    def host(self) -> int:
        return max(phase.host for phase in self.phases)


@dataclass(frozen=True)
class Room:
    """The memory of a device."""

    name: str
    total: int
    free: int

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: what is free, less the CUDA context and a margin."""
        return max(0, round(self.free * (1 - MARGIN)) - CONTEXT)


def room_on(device: torch.device, planned_gib: float | None = None) -> Room | None:
    """The room to plan for: `planned_gib` where it is given, else that of a CUDA device; None: there is
    nothing to compare with.
    """
    if planned_gib:
        size = round(planned_gib * GIB)
        return Room(f"a card of {planned_gib:g} GiB", size, size)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Room(torch.cuda.get_device_name(device), total, free + torch.cuda.memory_reserved(device))


def workspace(device: torch.device, is_training: bool) -> Part:
    """cuBLAS's workspaces. Where there is no CUDA device, those of a Hopper."""
    is_large = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    size = WORKSPACE if is_large else SMALL_WORKSPACE
    return Part("cuBLAS", (2 if is_training else 1) * size, note="workspace of matrix products")


@dataclass(frozen=True)
class Swapped:
    """What --blocks_to_swap does to the weights, in bytes."""

    away: int  # that leave the device
    ring: int  # places on the device through which they pass
    host: int

    @property
    def saved(self) -> int:
        return self.away - self.ring


def swapped(dit: nn.Module, plan: SwapPlan) -> Swapped:
    """The bytes behind a swap plan, from a network on any device.

    Raises OptionError where it has too few blocks.
    """
    if not plan:
        return Swapped(0, 0, 0)
    away = _weight_bytes(dit, plan.names(dit))
    ring = 0
    for each in plan.lists(dit):
        blocks = [_weight_bytes(dit, big_weights(dit, f"{each.name}.{index}")) for index in each.streamed]
        ring += each.slots * max(blocks, default=0)
    ring += max(
        (_weight_bytes(dit, big_weights(dit, name)) for name in plan.input_layer_names(dit)), default=0
    )
    return Swapped(away, ring, away)


def _weight_bytes(dit: nn.Module, names: Iterable[str]) -> int:
    return sum(rounded(dit.get_parameter(name).nbytes) for name in names)


def smallest_swap(device_bytes: Callable[[int], int], most: int, usable: int) -> int | None:
    """The smallest number of swapped blocks with which `device_bytes` is within `usable`; None where none is
    enough.
    """
    return next((count for count in range(most + 1) if device_bytes(count) <= usable), None)


def swaps_of(dit: nn.Module, spec: DitSpec, input_layers: bool) -> list[Swapped]:
    """What every possible --blocks_to_swap does."""
    totals = [len(blocks) for blocks in spec.blocks(dit).values()]
    return [
        swapped(dit, SwapPlan(spec, count, input_layers))
        for count in range(most_blocks(totals, spec.swap_counts) + 1)
    ]


def chosen_swap(device_bytes: Callable[[int], int], most: int, room: Room | None) -> tuple[int, str]:
    """The smallest --blocks_to_swap that fits the room, and why. Without a room it is 0; where none fits, the
    most.

    device_bytes: what the device holds with so many blocks swapped.
    """
    if room is None:
        return 0, "--blocks_to_swap auto: 0, as there is no CUDA device whose memory could be short."
    count, usable = (
        smallest_swap(device_bytes, most, room.usable),
        f"{gib(room.usable)} of {room.name} can be used",
    )
    if count is None:
        return (
            most,
            f"--blocks_to_swap auto: {most}, the most there can be; even so {gib(device_bytes(most))} GiB "
            f"are predicted; {usable}.",
        )
    reason = f"--blocks_to_swap auto: {count}. {gib(device_bytes(count))} GiB are predicted, {usable}"
    return count, reason + (
        f"; with {count - 1} it would be {gib(device_bytes(count - 1))}." if count else "."
    )


NAMES = {
    WEIGHTS: "weights of the transformer",
    NETWORK: "network (LoRA)",
    GRADIENTS: "gradients",
    OPTIMIZER: "optimizer",
    BATCH: "batch",
    KEPT: "kept activations",
    ATTENTION: "attention workspace",
    WORKING: "work on one block",
}


def parts_of(moment: Moment, swap: Swapped, notes: Mapping[str, str], waiting: int = 0) -> tuple[Part, ...]:
    """A moment as the lines of a plan. waiting: bytes of activations in host memory."""
    parts = []
    for kind, name in NAMES.items():
        size, host = moment.get(kind, 0), 0
        if kind == WEIGHTS:
            size, host = size - swap.saved, swap.host
        elif kind == KEPT:
            host = waiting
        if size or host:
            parts.append(Part(name, size, host, notes.get(kind, "")))
    return tuple(parts)


def dtypes_of(dit: nn.Module) -> str:
    """The bytes of a network's weights by dtype, largest first: `26.6 bfloat16, 0.3 float32`."""
    sizes: dict[str, int] = {}
    for tensor in [*dit.parameters(), *dit.buffers()]:
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + rounded(tensor.nbytes)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{gib(size)} {name}" for name, size in ordered if size >= GIB // 200 or name == ordered[0][0]
    )


def gib(size: int) -> str:
    """Bytes as GiB with two digits."""
    return f"{size / GIB:.2f}"


def verdict(plan: MemoryPlan, room: Room | None, advice: Sequence[str] = ()) -> str:
    """The last line: whether the plan fits; and what to change where it does not."""
    needed = f"{gib(plan.device)} GiB of tensors and about {gib(CONTEXT)} of CUDA itself"
    if room is None:
        return (
            f"Needs {needed}. There is no CUDA device to compare with; --plan 24 plans for a card of 24 GiB."
        )
    free = f"{room.name}: {gib(room.free)} of {gib(room.total)} GiB are free"
    if plan.device <= room.usable:
        return f"Fits: {needed}. {free}."
    lines = "\n".join(f"  {line}" for line in advice)
    return f"Does not fit: {needed}. {free}." + (
        f"\nWhat to change, the cheapest first:\n{lines}" if lines else ""
    )


def rows_of(plan: MemoryPlan) -> list[tuple[str, str, str, str]]:
    """The plan as lines of a table: part, device, host, note."""
    rows = []
    for phase in plan.phases:
        marked = f"{phase.name} (largest)" if phase is plan.worst and len(plan.phases) > 1 else phase.name
        rows.append((marked, gib(phase.device), gib(phase.host) if phase.host else "", ""))
        rows += [
            (f"  {part.name}", gib(part.device), gib(part.host) if part.host else "", part.note)
            for part in phase.parts
        ]
    return rows


HEADINGS = ("GiB", "device", "host", "")


def as_text(plan: MemoryPlan) -> str:
    """The table as plain text."""
    rows = [HEADINGS, *rows_of(plan)]
    widths = [max(len(row[index]) for row in rows) for index in range(3)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    return "\n".join([plan.title, *lines, *plan.remarks])


def show(plan: MemoryPlan, last_line: str) -> None:
    """Print table and verdict; with colour on a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.write(f"{as_text(plan)}\n{last_line}\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plan.title, title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index in {1, 2} else "left")
    for row in rows_of(plan):
        table.add_row(*row, style=None if row[0].startswith("  ") else "bold")
    console = Console(highlight=False)
    console.print(table)
    console.print("\n".join([*plan.remarks, last_line]), markup=False)


class Swappable(Protocol):
    """A prediction: what the device holds with so many blocks swapped, of which there can be `most`."""

    @property
    def most(self) -> int: ...

    def device(self, blocks: int, /) -> int: ...


def swap_for(prediction: Swappable, swap: SwapOptions, room: Room | None) -> tuple[int, str | None]:
    """How many blocks to swap, and why so many where that was left to `auto`.

    Raises OptionError where there are too few blocks.
    """
    if swap.is_auto:
        return chosen_swap(prediction.device, prediction.most, room)
    if swap.number > prediction.most:
        most = prediction.most
        raise OptionError(
            f"--blocks_to_swap {swap.number}: at most {most} of this transformer's blocks can be. Use {most} "
            "or less"
        )
    return swap.number, None


def present(
    prediction: Swappable,
    swap: SwapOptions,
    room: Room | None,
    plan_of: Callable[[int, Sequence[str]], MemoryPlan],
    advice: Callable[[Room], Sequence[str]],
) -> None:
    """Print a plan and whether it fits.

    plan_of: blocks swapped and remarks -> plan; advice: asked for where it does not fit.
    """
    blocks, reason = swap_for(prediction, swap, room)
    plan = plan_of(blocks, [] if reason is None else [reason])
    fits = room is None or plan.device <= room.usable
    show(plan, verdict(plan, room, () if fits or room is None else advice(room)))


def predicted_before_run(predict: Callable[[], Result], swap: SwapOptions) -> Result | None:
    """What a rehearsal before a run finds; None, with a warning, where it fails: a plan is an aid, without
    one a run is as good.

    Raises UserErrors as they come, and MemoryPlanError where --blocks_to_swap auto waits for the plan.
    """
    try:
        return predict()
    except UserError:
        raise
    except Exception as error:
        if swap.is_auto:
            raise MemoryPlanError(
                f"--blocks_to_swap auto: no plan can be made ({error}). Give a number of blocks."
            ) from error
        logger.warning("The memory of this run cannot be planned (%s: %s).", type(error).__name__, error)
        return None


def too_little(error: torch.OutOfMemoryError, afterwards: str) -> MemoryPlanError:
    """What to tell where the device ran out of memory in the middle. afterwards: how things stand now."""
    return MemoryPlanError(
        f"the device has too little memory for this run: {str(error).partition('. ')[0]}.\n"
        "  The same command with --plan says what to change: fp8, --blocks_to_swap auto, smaller clips, and "
        "in training\n"
        f"  --gradient_checkpointing. {afterwards}"
    )


def comparison(predicted: int, measured: int) -> str:
    """One line for the log: what was predicted, what torch measured, and by how much they differ."""
    difference = (predicted - measured) / measured
    line = f"Memory: predicted {gib(predicted)} GiB, measured {gib(measured)} GiB ({difference:+.1%})."
    if abs(difference) > TOLERANCE:
        line += f" That is more than {TOLERANCE:.0%} off: please report it with this line and your options."
    return line
