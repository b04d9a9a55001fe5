"""Predict the memory of a GPU that shares a step with others, from the memory of a single GPU."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from modules.private_torch import TorchDispatchMode
from protocols.steps import Overrides
from runtime.planning.dry_run import (
    ACTIVATIONS,
    ATTENTION,
    IN_BLOCKS,
    TEMPORARY,
    BytesByKind,
    Counts,
    Extrapolate,
    extrapolate,
)
from runtime.run_blocks import Hidden, runner_of, set_runner

EXCHANGED = 3  # tensors of an attention's exchange: reordered, sent, received


class TokenCounter(TorchDispatchMode):
    """Record sizes of the tensors that several GPUs would divide, from operators run in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # bytes of the queries of one self-attention
        self.tokens = 0  # bytes of the tokens of a pass when they leave the blocks
        self.heads = 0  # the largest number that divides the heads of every self-attention

    def watch(self, dit: nn.Module) -> Extrapolate:
        """Count the tokens of a network's passes; return the function that extrapolates its memory."""
        inner = runner_of(dit)

        def run(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
            inner(dit, hidden, overrides)
            self.tokens = max(self.tokens, hidden.x.nbytes)

        def watched(
            measure: Callable[[Counts], Mapping[str, BytesByKind]], counts: Counts
        ) -> dict[str, BytesByKind]:
            with self:
                return extrapolate(measure, counts)

        set_runner(dit, run)
        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "planned::attention":
            query, key = args[:2]
            if query.shape[1] == key.shape[1]:  # only self-attention; attention to a text is not shared
                self.largest = max(self.largest, query.nbytes)
                self.heads = math.gcd(self.heads, query.shape[2])
        return func(*args, **(kwargs or {}))


def divide_tokens(
    peaks_by_phase: Mapping[str, BytesByKind], context: int, undivided: TokenCounter
) -> dict[str, BytesByKind]:
    """Return the memory of a dry run, by phase, for a GPU that has 1 / `context` of the tokens in the blocks.

    Outside the blocks the GPU works on all tokens, which are gathered after the blocks. Tokens that no GPU
    divides, such as those of a text used only as keys and values, are few and counted as divided.

    Args:
        peaks_by_phase: Bytes by kind in each phase of the dry run.
        context: Number of GPUs that share the tokens.
        undivided: Bytes of queries and of tokens in the dry run, which divided nothing.
    """
    # the GPUs exchange parts of a self-attention's queries through this many buffers
    exchange_buffers = EXCHANGED * undivided.largest // context
    divided: dict[str, BytesByKind] = {}
    for phase, bytes_by_kind in peaks_by_phase.items():
        if phase.startswith(IN_BLOCKS):
            parts = {
                kind: bytes_by_kind.get(kind, 0) // context for kind in (ACTIVATIONS, ATTENTION, TEMPORARY)
            }
            parts[TEMPORARY] += exchange_buffers
        else:
            # what the blocks keep for the backward pass is divided; the gathered tokens are complete
            parts = {ACTIVATIONS: bytes_by_kind.get(ACTIVATIONS, 0) // context + undivided.tokens}
        divided[phase] = {**bytes_by_kind, **parts}
    return divided
