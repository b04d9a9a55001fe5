"""Skip all blocks of a pass and add their residual from the last computed pass.

    cache = StepCache(lambda: MagCacheRule(...))  # of one section of a video
    with run_around(dit_at, cache.run) as cached_at:
        denoise(family, cached_at, section, ...)

Each pass of a step (positive, negative, one that skips layers) has its own rule and residual, by
`Turn.which`. A residual lies where the tokens lie. It is freed before the blocks of its pass run again, and
by `forget`.
"""
# Letters: B batch, L tokens, C width

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from modules.contract.steps import DitAt, Turn, Tweaks
from modules.offload.block_swap import swap_of
from modules.run_blocks import Hidden, Runner, runner_of, set_runner, spec_of

Signal = Callable[[], Tensor]  # the input of the first block's attention, B L C


class Rule(Protocol):
    """Decides for one pass of each step. It remembers what it needs between steps."""

    def skips(self, turn: Turn, signal: Signal) -> bool:
        """Return whether to skip the pass. Called once at every step that has this pass.

        The first answer is no: there is nothing to add yet.
        """
        ...


@dataclass(eq=False)
class Branch:
    """The rule and residual of one pass of a step."""

    rule: Rule
    residual: Tensor | None = None  # B L C


@dataclass(eq=False)
class StepCache:
    """The passes of one section of a video."""

    make_rule: Callable[[], Rule]
    passes: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        # by network, as each expert has residuals of its own; weak, so that one may be freed between steps
        self._branches = weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Branch]]()

    def run(self, inner: Runner, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        """Run the blocks by `inner`, or add the residual of their last run to `hidden.x`."""
        turn = tweaks.turn
        if turn is None:
            inner(dit, hidden, tweaks)
            return
        branches = self._branches.setdefault(dit, {})
        if turn.which not in branches:
            branches[turn.which] = Branch(self.make_rule())
        branch = branches[turn.which]
        self.passes += 1
        if branch.rule.skips(turn, functools.partial(first_input, dit, hidden, tweaks)):
            assert branch.residual is not None
            self.skipped += 1
            hidden.x = hidden.x + branch.residual
            return
        branch.residual = None  # room for the input, which is kept while the blocks run
        before = hidden.x
        inner(dit, hidden, tweaks)
        branch.residual = residual_of(dit, hidden.x, before)

    def forget(self) -> None:
        """Free all residuals, even if others still refer to the cache: the section is done."""
        self._branches.clear()


def residual_of(dit: nn.Module, after: Tensor, before: Tensor) -> Tensor:
    """Return the blocks' residual, B L C.

    It is kept in bfloat16 if the network computes in it, also if the residual stream is float32 (Wan): half
    the memory, and the rounding of 0.2 % is far below what changes between steps.
    """
    computes_in = getattr(dit, "compute_dtype", None)
    return (after - before).to(torch.bfloat16 if computes_in == torch.bfloat16 else after.dtype)


def first_input(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> Tensor:
    """Return the modulated input of the first block's attention, B L C, without running the block.

    If the block is swapped its weights are brought to the device: they usually are there already, since the
    pass before fetched ahead, and stay for the next pass.
    """
    spec = spec_of(dit)
    assert spec.modulated_input is not None
    swap = swap_of(dit)
    if swap is not None:
        swap.bring(0, tweaks.skip_blocks)
    first = next(iter(spec.blocks(dit)[spec.block_lists[0]]))
    signal: Tensor = getattr(first, spec.modulated_input)(hidden.x, hidden.tokens)
    return signal


@dataclass(frozen=True, eq=False)
class _Around:
    """A runner around another."""

    run: Callable[[Runner, nn.Module, Hidden, Tweaks], None]
    inner: Runner

    def __call__(self, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        self.run(self.inner, dit, hidden, tweaks)


@contextmanager
def run_around(dit_at: DitAt, run: Callable[[Runner, nn.Module, Hidden, Tweaks], None]) -> Iterator[DitAt]:
    """Yield `dit_at` whose networks have `run` around the runner of their blocks.

    run: is given that runner first. At the end, also after an exception, every network has its own runner
    again.
    """
    changed = weakref.WeakSet[nn.Module]()

    def at(timestep: float) -> nn.Module:
        dit = dit_at(timestep)
        if dit not in changed:
            changed.add(dit)
            set_runner(dit, _Around(run, runner_of(dit)))
        return dit

    try:
        yield at
    finally:
        for dit in changed:
            around = runner_of(dit)
            if isinstance(around, _Around):  # an interruption may come before it is set
                set_runner(dit, around.inner)
