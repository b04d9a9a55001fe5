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
from runtime.run_blocks import Hidden, get_runner, set_runner

NUM_EXCHANGE_BUFFERS = 3  # tensors of an attention's exchange: reordered, sent, received


class TokenCounter(TorchDispatchMode):
    """Record the sizes of queries and tokens that several GPUs would share, from all operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.query_bytes = 0  # bytes of the queries of one self-attention
        self.token_bytes = 0  # bytes of the tokens of a pass when they leave the blocks
        self.heads = 0  # the largest number that divides the heads of every self-attention

    def watch(self, dit: nn.Module) -> Extrapolate:
        """Count the tokens in passes of a network; return `extrapolate`, which then also counts queries."""
        inner = get_runner(dit)

        def run(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
            inner(dit, hidden, overrides)
            self.token_bytes = max(self.token_bytes, hidden.x.nbytes)

        def extrapolate_and_count(
            measure: Callable[[Counts], Mapping[str, BytesByKind]], counts: Counts
        ) -> dict[str, BytesByKind]:
            with self:
                return extrapolate(measure, counts)

        set_runner(dit, run)
        return extrapolate_and_count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "planned::attention":
            query, key = args[:2]
            if query.shape[1] == key.shape[1]:  # only self-attention; attention to a text is not shared
                self.query_bytes = max(self.query_bytes, query.nbytes)
                self.heads = math.gcd(self.heads, query.shape[2])
        return func(*args, **(kwargs or {}))


def divide_tokens(
    peaks_by_phase: Mapping[str, BytesByKind], num_gpus: int, counter: TokenCounter
) -> dict[str, BytesByKind]:
    """Return the memory of a dry run, by phase, for one of several GPUs that share the tokens in the blocks.

    Outside the blocks the GPU works on all tokens, which are gathered after the blocks. Tokens that no GPU
    divides, such as text tokens used only as keys and values, are few and counted as divided.

    Args:
        peaks_by_phase: Bytes by kind in each phase of the dry run.
        num_gpus: Number of GPUs that share the tokens.
        counter: Bytes of queries and of tokens, counted in the undivided dry run.
    """
    exchange_bytes = NUM_EXCHANGE_BUFFERS * counter.query_bytes // num_gpus
    divided: dict[str, BytesByKind] = {}
    for phase, bytes_by_kind in peaks_by_phase.items():
        if phase.startswith(IN_BLOCKS):
            bytes_per_gpu = {
                kind: bytes_by_kind.get(kind, 0) // num_gpus for kind in (ACTIVATIONS, ATTENTION, TEMPORARY)
            }
            bytes_per_gpu[TEMPORARY] += exchange_bytes
        else:
            # what the blocks keep for the backward pass is divided; the gathered tokens are complete
            bytes_per_gpu = {ACTIVATIONS: bytes_by_kind.get(ACTIVATIONS, 0) // num_gpus + counter.token_bytes}
        divided[phase] = {**bytes_by_kind, **bytes_per_gpu}
    return divided
