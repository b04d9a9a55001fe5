"""Compare the layouts in which a run can use several GPUs: `--plan 2x24`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from modules.command import LAUNCH, quote_command
from modules.control_codes import escape_control_codes
from modules.devices import GIB, format_gib
from modules.errors import OptionError
from modules.installation import find_script
from modules.option_values import option_argv
from modules.options import override_options
from runtime.options import Speed
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.memory_plan import MemoryPlan, OffloadedWeights, Swappable, show, smallest_swap
from runtime.ways.composing import divided_options
from runtime.ways.contract import Division

UNDIVIDED = divided_options(Division(1))
# options that a layout sets -> number of their values on the command line; --plan may have one
LAYOUT_OPTION_NARGS = {f"--{name}": 0 if value is False else 1 for name, value in UNDIVIDED.items()}
LAYOUT_OPTION_NARGS |= {"--blocks_to_swap": 1, "--plan": 1}


class Divided(Swappable, Protocol):
    """Memory prediction for one of the GPUs that share a run."""

    @property
    def swaps(self) -> Sequence[OffloadedWeights]:
        """The offloaded weights for each number of swapped blocks, from 0."""

    def plan(self, blocks: int, /) -> MemoryPlan:
        """Return the memory plan with this number of swapped blocks."""


@dataclass(frozen=True)
class SingleGpuRun:
    """A run tried with fake tensors on one GPU, and a function that predicts its memory on several."""

    extra_options: tuple[str, ...]  # options to add to the command
    heads: int  # number of attention heads, divided among cards that share tokens
    can_swap: bool
    # predicts the memory of one card of a division; raises OptionError if this division is impossible
    divide: Callable[[Division], Divided]


@dataclass(frozen=True)
class GpuLayout:
    """A division of a run over several GPUs: its memory plan, or in `rejection` why it is impossible."""

    extra_options: tuple[str, ...]  # options that it adds to the command
    division: Division
    num_parallel: int  # number of micro-batches, or of clips in a generation, that are computed at once
    memory: MemoryPlan | None = None
    host: int = 0  # bytes of host memory of all processes
    fits: bool = False
    rejection: str = ""


def with_division(speed: Speed, division: Division) -> Speed:
    """Return a copy of the options that divides the run as in `division`, without block swap."""
    return override_options(speed, {**divided_options(division), "blocks_to_swap": None})


def plan_layouts(
    single_gpu_run: SingleGpuRun, cards: int, device_memory: DeviceMemory, is_training: bool
) -> Iterator[GpuLayout]:
    """Yield the divisions of a run over equal GPUs; those whose GPUs wait least for each other come first.

    Args:
        single_gpu_run: The run on a single GPU.
        cards: Number of GPUs.
        device_memory: Memory of each GPU.
        is_training: Whether the run is a training run.
    """
    for division in _list_divisions(cards, is_training):
        extra_options = _make_division_argv(division)
        num_parallel = cards // division.num_context_parallel
        if division.shards_weights and not is_training:
            num_parallel = 1  # all processes generate the same clip
        layout = GpuLayout(extra_options, division, num_parallel)
        try:
            prediction = _divide(single_gpu_run, division)
        except OptionError as error:
            yield replace(layout, rejection=str(error))
            continue
        yield _plan_memory(layout, prediction, 0, device_memory=device_memory, is_training=is_training)
        is_undivided = not extra_options
        if is_undivided and single_gpu_run.can_swap:
            # The fewest blocks to swap so that the run fits; the most possible if it never fits
            fewest = smallest_swap(prediction, device_memory.usable)
            num_swapped = prediction.max_swapped_blocks if fewest is None else fewest
            if num_swapped:
                swapping = replace(layout, extra_options=("--blocks_to_swap", str(num_swapped)))
                yield _plan_memory(
                    swapping, prediction, num_swapped, device_memory=device_memory, is_training=is_training
                )


def _divide(run: SingleGpuRun, division: Division) -> Divided:
    """Predict the memory of one GPU of a division; raise OptionError if the division is impossible."""
    if run.heads % division.num_context_parallel:
        raise OptionError(
            f"{run.heads} heads of attention are not divisible by {division.num_context_parallel}"
        )
    return run.divide(division)


def _list_divisions(cards: int, is_training: bool) -> list[Division]:
    """Return the divisions of a run over GPUs; those whose GPUs wait least for each other come first."""
    # in generation, processes that share work make one clip at a time, so all of them share its tokens
    contexts = [count for count in range(2, cards + 1) if cards % count == 0] if is_training else [cards]
    split_blocks = [Division(cards, shards_weights=True)]
    split_tokens = [Division(cards, num_context_parallel=count) for count in contexts]
    split_both = [Division(cards, shards_weights=True, num_context_parallel=count) for count in contexts]
    if is_training:  # gathering blocks overlaps with computation, exchanging tokens does not
        divisions = [*split_blocks, *split_tokens, *split_both]
    else:  # unless tokens are split, each process computes all of them
        divisions = [*split_tokens, *split_blocks, *split_both]
    division_by_options: dict[tuple[str, ...], Division] = {(): Division(cards)}  # without options: undivided
    for division in divisions:  # equal options mean the same division
        division_by_options.setdefault(_make_division_argv(division), division)
    return list(division_by_options.values())


def _make_division_argv(division: Division) -> tuple[str, ...]:
    """Return the command-line arguments that request this division of a step."""
    values = divided_options(division)
    return tuple(
        option_argv({f"--{name}": value for name, value in values.items() if value != UNDIVIDED[name]})
    )


def _plan_memory(
    layout: GpuLayout, prediction: Divided, blocks: int, *, device_memory: DeviceMemory, is_training: bool
) -> GpuLayout:
    memory = prediction.plan(blocks)
    swapped = prediction.swaps[blocks]
    processes = layout.division.processes
    # the processes of a launcher share a copy of swapped blocks
    host = processes * memory.host - (processes - 1) * swapped.host_bytes * is_training
    return replace(layout, memory=memory, host=host, fits=memory.device <= device_memory.usable)


def print_layouts(
    runs: Iterable[SingleGpuRun], cards: int, device_memory: DeviceMemory, is_training: bool
) -> None:
    """Print how the run can use the GPUs (as options of the command), and the memory of the first that fits.

    Args:
        runs: Results of planning the run on fake tensors: first with the command's options, then each time
            with more options that save memory. A result is computed only if nothing fits with the previous
            ones.
        cards: Number of GPUs.
        device_memory: Memory of each GPU.
        is_training: Whether the run is a training run.
    """
    layouts: list[GpuLayout] = []
    added_options: tuple[str, ...] = ()
    for run in runs:
        layouts = list(plan_layouts(run, cards, device_memory, is_training))
        added_options = run.extra_options
        if any(layout.fits for layout in layouts):
            break  # options that save more memory are not needed
    plans = [layout.memory for layout in layouts if layout.memory is not None]
    if not plans:  # no layout is possible; the first one's reason stands for all
        raise OptionError(layouts[0].rejection)
    total = f"{device_memory.total / GIB:g}"
    output_lines = _compare_layouts(layouts, cards, device_memory, added_options)
    fitting = [layout for layout in layouts if layout.fits]
    if fitting:
        displayed_plan = fitting[0].memory
        assert displayed_plan is not None
        output_lines += _advise(fitting, added_options, is_training)
    else:
        displayed_plan = min(plans, key=lambda plan: plan.device)
        output_lines.append(
            f"No layout fits: {displayed_plan.worst.name} takes {format_gib(displayed_plan.device)} GiB at "
            f"least. Run with --plan {total} to see what makes it smaller, or use more or larger cards."
        )
    show(displayed_plan, escape_control_codes("\n".join(output_lines)))


def _compare_layouts(
    layouts: Sequence[GpuLayout], cards: int, device_memory: DeviceMemory, added_options: Sequence[str]
) -> list[str]:
    """Return the lines of a table of possible layouts, then the reason for each impossible one."""
    total = f"{device_memory.total / GIB:g}"
    with_added = f", with {' '.join(added_options)}, as nothing fits without" if added_options else ""
    lines = [
        f"\n{cards} cards of {total} GiB, {format_gib(device_memory.usable)} GiB of each for "
        f"tensors{with_added}:",
        *format_table(layouts),
    ]
    for layout in layouts:
        if layout.rejection:
            lines.append(f"{' '.join(layout.extra_options)} is not possible: {layout.rejection}")
    return lines


def _advise(fitting: Sequence[GpuLayout], added: Sequence[str], is_training: bool) -> list[str]:
    """Return lines with the cheapest layout's command, and with the one that finishes a clip soonest."""
    best = fitting[0]
    on_each = (
        "" if is_training or best.num_parallel == 1 else ", on each card with its own prompts (--device)"
    )
    lines = [
        f"The cheapest that fits{on_each}:",
        f"  {format_launch_command(best, added, sys.argv, is_training)}",
    ]
    # a clip is finished soonest if as many GPUs as possible share its tokens
    fastest = max(fitting, key=lambda layout: layout.division.num_context_parallel)
    if not is_training and fastest is not best:
        lines.append("A single clip is finished soonest by:")
        lines.append(f"  {format_launch_command(fastest, added, sys.argv, is_training)}")
    return lines


def format_table(layouts: Sequence[GpuLayout]) -> list[str]:
    """Return the lines of a table, with a heading, of all layouts that are possible."""
    rows = [("options", "GiB per card", "host", "", "at once")]
    for layout in layouts:
        if layout.memory is not None:
            rows.append(
                (
                    " ".join(layout.extra_options) or "the whole model on each",
                    format_gib(layout.memory.device),
                    format_gib(layout.host),
                    "fits" if layout.fits else "no",
                    str(layout.num_parallel),
                )
            )
    first_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for first, *other_cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(other_cells, widths, strict=True)]
        line = "  ".join([first.ljust(first_width), *cells])
        lines.append(line.rstrip())
    return lines


def format_launch_command(
    layout: GpuLayout, added: Sequence[str], argv: Sequence[str], is_training: bool
) -> str:
    """Return the command that runs the planned command on several GPUs.

    Args:
        layout: Options and number of processes.
        added: Options that the planned command lacks.
        argv: Arguments of the planning command.
        is_training: Whether the run is a training run.
    """
    script = Path(argv[0]).name
    # Arguments without the options that a layout sets, and without the values of these options
    arguments = argv[1:]
    kept: list[str] = []
    num_values_left = 0  # of a removed option, among the next arguments
    for argument in arguments:
        name, equals_sign, _ = argument.partition("=")
        if num_values_left and not argument.startswith("--"):
            num_values_left -= 1
            continue
        num_values_left = 0 if equals_sign else LAYOUT_OPTION_NARGS.get(name, 0)
        if name not in LAYOUT_OPTION_NARGS:
            kept.append(argument)
    other_arguments = kept
    command = [str(find_script(script) or script), *other_arguments, *added, *layout.extra_options]
    if not is_training and layout.num_parallel > 1:  # separate generations, each a process without a launcher
        return quote_command(["python", *command])
    # LAUNCH ends with N, a placeholder for the number of processes
    return quote_command([*LAUNCH.split()[:-1], str(layout.division.processes), *command])
