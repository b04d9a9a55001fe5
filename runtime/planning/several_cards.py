"""Compare the ways to use several cards: `--plan 2x24`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from modules.command import LAUNCH, as_typed
from modules.control_codes import escape_control_codes
from modules.devices import GIB, gib
from modules.errors import OptionError
from modules.installation import find_script
from modules.option_values import option_words
from modules.options import override_options
from runtime.options import Speed
from runtime.planning.device_memory import Room
from runtime.planning.memory_plan import MemoryPlan, Swappable, Swapped, show, smallest_swap
from runtime.ways.composing import divided_options
from runtime.ways.contract import Division

UNDIVIDED = divided_options(Division(1))
# options that a way sets -> number of values on the command line; --plan may have one
DECIDED = {f"--{name}": 0 if value is False else 1 for name, value in UNDIVIDED.items()}
DECIDED |= {"--blocks_to_swap": 1, "--plan": 1}


class Divided(Swappable, Protocol):
    """Memory prediction for one of the GPUs that share a run."""

    @property
    def swaps(self) -> Sequence[Swapped]:
        """Effect of swapping on the weights, by number of swapped blocks from 0 on."""

    def plan(self, blocks: int, /) -> MemoryPlan:
        """Return the memory plan with this number of swapped blocks."""


@dataclass(frozen=True)
class Rehearsed:
    """A run on one GPU that was tried on tensors without values, and a function that divides it over GPUs."""

    words: tuple[str, ...]  # options to add to the command
    heads: int  # number of attention heads, divided among cards that share tokens
    can_swap: bool
    # predicts the memory of one card of a division; raises OptionError if this division is impossible
    divide: Callable[[Division], Divided]


@dataclass(frozen=True)
class Way:
    """A way to use several GPUs. If it is not possible, it has the reason instead of a memory plan."""

    words: tuple[str, ...]  # options that it adds to the command
    division: Division
    at_once: int  # number of micro-batches, or of clips in a generation, that are computed at once
    memory: MemoryPlan | None = None
    host: int = 0  # bytes of host memory of all processes
    fits: bool = False
    rejection: str = ""


def with_division(speed: Speed, division: Division) -> Speed:
    """Return a copy of the options that divides the run as in `division`, without block swap."""
    return override_options(speed, {**divided_options(division), "blocks_to_swap": None})


def find_ways(rehearsed: Rehearsed, cards: int, room: Room, is_training: bool) -> Iterator[Way]:
    """Yield the ways to use equal GPUs; those in which the GPUs wait least for each other come first.

    Args:
        rehearsed: The rehearsed run.
        cards: Number of GPUs.
        room: Memory of each GPU.
        is_training: Whether the run is a training run.
    """
    for division in _list_divisions(cards, is_training):
        words = _words_of(division)
        at_once = cards // division.context
        if division.shards and not is_training:
            at_once = 1  # all processes generate the same clip
        way = Way(words, division, at_once)
        heads = rehearsed.heads
        try:
            if heads % division.context:
                raise OptionError(f"{heads} heads of attention are not divisible by {division.context}")
            prediction = rehearsed.divide(division)
        except OptionError as error:
            yield replace(way, rejection=str(error))
            continue
        yield _plan_way(way, prediction, 0, room=room, is_training=is_training)
        if words or not rehearsed.can_swap:  # blocks are swapped in the undivided run only
            continue
        # the undivided run with block swap: the fewest blocks that fit, or all if even that is too much
        fewest = smallest_swap(prediction, room.usable)
        if fewest != 0 and prediction.maximum:
            count = prediction.maximum if fewest is None else fewest
            way = replace(way, words=("--blocks_to_swap", str(count)))
            yield _plan_way(way, prediction, count, room=room, is_training=is_training)


def _list_divisions(cards: int, is_training: bool) -> list[Division]:
    """Return the divisions of a run over GPUs, in the order of how little the GPUs wait for each other."""
    # gathering blocks overlaps with computation, exchanging tokens does not. A generation whose processes
    # share anything makes one clip at a time, and each process computes all tokens unless tokens are shared
    contexts = [count for count in range(2, cards + 1) if cards % count == 0] if is_training else [cards]
    blocks = [Division(cards, shards=True)]
    tokens = [Division(cards, False, count) for count in contexts]
    both = [Division(cards, True, count) for count in contexts]
    divisions = [*blocks, *tokens, *both] if is_training else [*tokens, *blocks, *both]
    by_words: dict[tuple[str, ...], Division] = {(): Division(cards)}  # without options: undivided
    for division in divisions:
        by_words.setdefault(_words_of(division), division)  # equal options mean the same division
    return list(by_words.values())


def _words_of(division: Division) -> tuple[str, ...]:
    """Return the command-line arguments that divide a step in this way."""
    values = divided_options(division)
    return tuple(
        option_words({f"--{name}": value for name, value in values.items() if value != UNDIVIDED[name]})
    )


def _plan_way(way: Way, prediction: Divided, blocks: int, *, room: Room, is_training: bool) -> Way:
    memory = prediction.plan(blocks)
    swapped = prediction.swaps[blocks]
    processes = way.division.processes
    # the processes of a launcher share a copy of swapped blocks
    host = processes * memory.host - (processes - 1) * swapped.host * is_training
    return replace(way, memory=memory, host=host, fits=memory.device <= room.usable)


def print_ways(runs: Iterable[Rehearsed], cards: int, room: Room, is_training: bool) -> None:
    """Print the ways to use the GPUs (as options of the command), and the memory of the first one that fits.

    Args:
        runs: Results of planning the run on tensors without values: first with the command's options, then
            each time with more options that save memory. A result is computed only if nothing fits with the
            previous ones.
        cards: Number of GPUs.
        room: Memory of each GPU.
        is_training: Whether the run is a training run.
    """
    ways: list[Way] = []
    added: tuple[str, ...] = ()
    for run in runs:
        ways = list(find_ways(run, cards, room, is_training))
        added = run.words
        if any(way.fits for way in ways):
            break  # options that save more memory are not needed
    plans = [way.memory for way in ways if way.memory is not None]
    if not plans:  # no way is possible
        raise OptionError(ways[0].rejection)
    title = f"\n{cards} cards of {room.total / GIB:g} GiB, {gib(room.usable)} GiB of each for tensors"
    with_words = f", with {' '.join(added)}, as nothing fits without" if added else ""
    lines = [f"{title}{with_words}:", *format_table(ways)]
    lines += [f"{' '.join(way.words)} is not possible: {way.rejection}" for way in ways if way.rejection]
    fitting = [way for way in ways if way.fits]
    if fitting:
        memory = fitting[0].memory
        assert memory is not None
        lines += _advise(fitting, added, is_training)
    else:
        # nothing fits: show the plan that needs the least memory
        memory = min(plans, key=lambda plan: plan.device)
        lines.append(
            f"No way fits: {memory.worst.name} takes {gib(memory.device)} GiB at least. Run with --plan "
            f"{room.total / GIB:g} to see what makes it smaller, or use more or larger cards."
        )
    show(memory, escape_control_codes("\n".join(lines)))


def _advise(fitting: Sequence[Way], added: Sequence[str], is_training: bool) -> list[str]:
    """Return lines with the command of the cheapest way, and of the way that finishes one clip soonest."""
    best = fitting[0]
    on_each = "" if is_training or best.at_once == 1 else ", on each card with its own prompts (--device)"
    lines = [f"The cheapest that fits{on_each}:", f"  {command_of(best, added, sys.argv, is_training)}"]
    # a clip is finished soonest if as many GPUs as possible share its tokens
    fastest = max(fitting, key=lambda way: way.division.context)
    if not is_training and fastest is not best:
        lines.append("One clip is made soonest by:")
        lines.append(f"  {command_of(fastest, added, sys.argv, is_training)}")
    return lines


def format_table(ways: Sequence[Way]) -> list[str]:
    """Return the lines of a table, with a heading, of the ways to use several GPUs whose memory is known."""
    rows = [("options", "GiB per card", "host", "", "at once")]
    for way in ways:
        if way.memory is not None:
            rows.append(
                (
                    " ".join(way.words) or "the whole model on each",
                    gib(way.memory.device),
                    gib(way.host),
                    "fits" if way.fits else "no",
                    str(way.at_once),
                )
            )
    first_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for first, *words in rows:
        cells = [word.rjust(width) for word, width in zip(words, widths, strict=True)]
        line = "  ".join([first.ljust(first_width), *cells])
        lines.append(line.rstrip())
    return lines


def command_of(way: Way, added: Sequence[str], argv: Sequence[str], is_training: bool) -> str:
    """Return the command that runs the planned command in a way to use several GPUs.

    Args:
        way: Options and number of processes.
        added: Options that the planned command lacks.
        argv: Arguments of the planning command.
        is_training: Whether the run is a training run.
    """
    # arguments without the options that `way` decides, and without the values of these options
    other_arguments: list[str] = []
    num_values = 0  # number of the following words that are values of a removed option
    for word in argv[1:]:
        name, equals_sign, _ = word.partition("=")
        if num_values and not word.startswith("--"):
            num_values -= 1
            continue
        # DECIDED: option that `way` decides -> number of its values; with `=` none is a word of its own
        num_values = 0 if equals_sign else DECIDED.get(name, 0)
        if name not in DECIDED:
            other_arguments.append(word)
    script = Path(argv[0]).name
    words = [str(find_script(script) or script), *other_arguments, *added, *way.words]
    if not is_training and way.at_once > 1:  # separate generations, each a process without a launcher
        return as_typed(["python", *words])
    # LAUNCH ends with N, a placeholder for the number of processes
    return as_typed([*LAUNCH.split()[:-1], str(way.division.processes), *words])
