"""Count what a step computes and what processes send each other for it, and estimate the time of both.

The bytes of a collective are those of the tensor that it gathers, sums or deals out anew, in one process;
docs/speed.md has the same arithmetic in words.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from modules.contract.steps import Tweaks
from modules.planning.dry_run import (
    ATTENTION,
    IN_BLOCKS,
    KEPT,
    WORKING,
    Counts,
    Extrapolate,
    Moment,
    extrapolate,
)
from modules.planning.memory_plan import BlockWeights, Swapped
from modules.private_torch import TorchDispatchMode
from modules.run_blocks import Hidden, runner_of, set_runner

# What ways are compared with, not measured: a fast consumer card in 16 bits, and PCIe 4 x16
OPERATIONS_A_SECOND = 100e12
BYTES_A_SECOND = 25e9
EXCHANGED = 3  # tensors of an attention: one is in order for the others, one is sent, one arrives

WORK = "work"  # the place in a rehearsal's moments that holds no bytes of memory, but these amounts:
OPERATIONS, ATTENDED, JOINED, PASSES = "operations", "attended", "joined", "passes"


@dataclass(frozen=True)
class Division:
    """How processes, each with a card, divide a step."""

    processes: int
    shards: bool = False  # the weights of the blocks: --shard_base
    context: int = 1  # cards that share the tokens of a clip: --context_parallel


@dataclass(frozen=True)
class Work:
    """Work of one process that has the whole model and all tokens of its clips."""

    operations: int  # floating-point operations of a micro-batch
    # bytes that the self-attentions of a micro-batch read and write: queries, keys, values and results, once
    # more where they are computed again, and the gradients of the four
    attended: int
    largest: int  # bytes of the queries of one attention
    tokens: int  # bytes of the tokens of a pass as they leave the blocks
    heads: int  # the largest number that divides the heads of every self-attention
    joined: int  # the same of all passes of a micro-batch
    passes: int  # of a micro-batch through all blocks; the way back is one
    blocks: tuple[BlockWeights, ...]
    gradients: int = 0  # bytes that are summed over the processes once a step
    micro_batches: int = 1  # of a step


class WorkCounter(TorchDispatchMode):
    """Count the work of a rehearsal: while active, of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.tokens, self.heads = 0, 0, 0
        self.amounts: Mapping[str, int] = {}  # of the rehearsed step with all blocks
        self._counted: Counter[str] = Counter()

    def watch(self, dit: nn.Module) -> Extrapolate:
        """Count a network's work from now on. Returns the function to extrapolate its rehearsal with."""
        inner = runner_of(dit)

        def run(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
            inner(dit, hidden, tweaks)
            self.tokens = max(self.tokens, hidden.x.nbytes)
            self._counted.update({PASSES: 1, JOINED: hidden.x.nbytes})

        set_runner(dit, run)
        return self._extrapolate

    def _extrapolate(
        self, measure: Callable[[Counts], Mapping[str, Moment]], counts: Counts
    ) -> dict[str, Moment]:

        def count(numbers: Counts) -> Mapping[str, Moment]:
            self._counted.clear()
            with self:
                found = measure(numbers)
            return {**found, WORK: dict(self._counted)}

        found = extrapolate(count, counts)
        self.amounts = found.pop(WORK)
        return found

    def work(
        self, blocks: Sequence[BlockWeights], backward: int = 0, gradients: int = 0, micro_batches: int = 1
    ) -> Work:
        """Return the work that was counted. backward: passes back through the blocks."""
        counted = self.amounts
        return Work(
            operations=counted[OPERATIONS],
            attended=counted.get(ATTENDED, 0),
            largest=self.largest,
            tokens=self.tokens,
            heads=self.heads,
            joined=counted[JOINED],
            passes=counted[PASSES] + backward,
            blocks=tuple(blocks),
            gradients=gradients,
            micro_batches=micro_batches,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._counted[OPERATIONS] += round(count_operations(func, args, kwargs, result))
        if func.name() == "planned::attention":
            self._note_attention(args[0], args[1], (*args, result[0]))
        elif func.name() == "planned::attention_backward":
            self._note_attention(args[1], args[2], (args[0], *result))
        return result

    def _note_attention(self, query: Tensor, key: Tensor, tensors: Sequence[Tensor]) -> None:
        if query.shape[1] == key.shape[1]:  # to a text each token looks on its own card
            self._counted[ATTENDED] += sum(each.nbytes for each in tensors)
            self.largest, self.heads = max(self.largest, query.nbytes), math.gcd(self.heads, query.shape[2])


def count_operations(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> float:
    """Return the floating-point operations of a product or an attention; 0 for other operators."""
    name = func.name()
    if name in {"planned::attention", "planned::attention_backward"}:
        query, key = args[1:3] if "backward" in name else args[:2]
        batch, length, heads, width = query.shape
        # backward: the products q k and p v again as five; arXiv 2307.08691
        return (10.0 if "backward" in name else 4.0) * batch * length * key.shape[1] * heads * width
    aten = torch.ops.aten
    in_place = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # which torch does not count
    packet = func._overloadpacket
    count = flop_registry.get(in_place.get(packet, packet))
    return float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0


def gathered_bytes(blocks: Sequence[BlockWeights], processes: int) -> int:
    """Return the bytes of all blocks as processes gather them: each has an equal number of rows of a weight,
    the last ones with padding.
    """
    weights = (weight for block in blocks for weight in block)
    return sum(-(-rows // processes) * processes * (size // rows) for rows, size in weights)


def estimate_time(work: Work, division: Division, swapped: Swapped) -> tuple[float, float]:
    """Return the seconds of a micro-batch on the cards that share it, and the bytes that each card receives.

    Weights come while blocks compute, so that the longer of both counts; for all else the card waits. A ring
    brings each process (N - 1) / N of what is gathered or dealt out, and twice that of what is summed.
    """
    processes, context = division.processes, division.context
    others, peers = (processes - 1) / processes, (context - 1) / context
    weights = float(work.passes * swapped.host)
    if division.shards:
        weights += others * work.passes * gathered_bytes(work.blocks, processes)
    waited = (
        peers * (work.attended / context + work.joined) + 2 * others * work.gradients / work.micro_batches
    )
    computing = work.operations / context / OPERATIONS_A_SECOND
    seconds = max(computing, weights / BYTES_A_SECOND) + waited / BYTES_A_SECOND
    return seconds, weights + waited


def divide_tokens(moments: Mapping[str, Moment], context: int, work: Work) -> dict[str, Moment]:
    """Return a rehearsal's moments for a card that has 1 / `context` of the tokens inside the blocks.

    Outside the blocks it works on all tokens, which are gathered behind them. Tokens that stay whole inside,
    such as those of a text that is only looked at, count as divided: they are few.
    """
    buffers = EXCHANGED * work.largest // context

    def part(place: str, moment: Moment) -> Moment:
        if not place.startswith(IN_BLOCKS):
            return {**moment, KEPT: moment.get(KEPT, 0) // context + work.tokens}
        parted = {kind: moment.get(kind, 0) // context for kind in (KEPT, ATTENTION, WORKING)}
        return {**moment, **parted, WORKING: parted[WORKING] + buffers}

    return {place: part(place, moment) for place, moment in moments.items()}
