"""The seam around the blocks: what stands there needs no change to a model, and stands together with other
things.

A toy step cache and a toy that skips blocks go through it on every family's transformer.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.contract.steps import NO_TWEAKS, Tweaks
from modules.offload.checkpointing import checkpoint_blocks
from modules.run_blocks import Hidden, Runner, run_blocks, runner_of, set_runner, spec_of
from tests.modules.swap_cases import CASES, Case, swapped

FAMILIES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def all_blocks(dit: nn.Module) -> list[nn.Module]:
    return [block for blocks in spec_of(dit).blocks(dit).values() for block in blocks]


def count_blocks(dit: nn.Module) -> list[int]:
    """The positions of blocks that were run, in a list that grows."""
    ran: list[int] = []
    for position, block in enumerate(all_blocks(dit)):
        block.register_forward_pre_hook(lambda _, __, position=position: ran.append(position))
    return ran


class StepCache:
    """Makes every second pass of what the blocks added in the one before."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self._added: Tensor | None = None

    def __call__(self, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        if self._added is not None:
            hidden.x, self._added = hidden.x + self._added, None
            return
        before = hidden.x
        self._inner(dit, hidden, tweaks)
        self._added = hidden.x - before


def cache_steps(dit: nn.Module) -> None:
    set_runner(dit, StepCache(runner_of(dit)))


def leave_out(dit: nn.Module, positions: frozenset[int]) -> None:
    """Have every pass leave out these blocks too."""
    inner = runner_of(dit)
    set_runner(
        dit,
        lambda dit, hidden, tweaks: inner(dit, hidden, Tweaks(skip_blocks=tweaks.skip_blocks | positions)),
    )


def run_beside_the_seam(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
    """What a model would do whose forward had a loop of its own."""
    for block in all_blocks(dit):
        hidden.x = block(hidden.x, hidden.tokens)


def states(dit: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """A pass's tokens before the blocks and behind them, and what belongs to them."""
    seen: list[Tensor | Any] = []
    inner = runner_of(dit)

    def look(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        before = hidden.x
        inner(dit, hidden, tweaks)
        seen.extend((before, hidden.x, hidden.tokens))

    set_runner(dit, look)
    dit(**inputs)
    set_runner(dit, inner)
    before, after, tokens = seen
    return before, after, tokens


def unembedded(dit: Any, x: Tensor, tokens: Any) -> Tensor:
    return dit.unembed(x, tokens)


@FAMILIES
@torch.no_grad()
def test_a_step_cache_needs_no_change_to_a_model(case: Case) -> None:
    plain, dit = case.make().eval(), case.make().eval()
    before, after, _ = states(plain, case.inputs(1))
    second, run, tokens = states(plain, case.inputs(2))
    cache_steps(dit)
    ran = count_blocks(dit)

    first = dit(**case.inputs(1))

    assert torch.equal(first, plain(**case.inputs(1)))
    assert ran == list(range(sum(case.blocks)))
    cached = dit(**case.inputs(2))
    assert torch.equal(cached, unembedded(plain, second + (after - before), tokens))
    assert len(ran) == sum(case.blocks)
    assert not torch.equal(cached, unembedded(plain, run, tokens))


@FAMILIES
@torch.no_grad()
def test_blocks_are_skipped_by_a_runner_or_by_the_call_alike(case: Case) -> None:
    both, one = frozenset({0, 3}), frozenset({3})
    by_call, by_runner = case.make().eval(), case.make().eval()
    expected = by_call(**case.inputs(1), tweaks=Tweaks(skip_blocks=both))
    leave_out(by_runner, frozenset({0}))
    ran = count_blocks(by_runner)

    assert torch.equal(by_runner(**case.inputs(1), tweaks=Tweaks(skip_blocks=one)), expected)
    assert ran == [position for position in range(sum(case.blocks)) if position not in both]
    for dit in (by_call, by_runner):
        assert not torch.equal(dit(**case.inputs(1)), expected)
    set_runner(by_runner, run_beside_the_seam)
    assert not torch.equal(by_runner(**case.inputs(1), tweaks=Tweaks(skip_blocks=one)), expected)


def _as_it_is(dit: nn.Module, case: Case) -> None: ...


def _with_swap(dit: nn.Module, case: Case) -> None:
    swapped(dit, case.spec, 2)


def _with_checkpoints(dit: nn.Module, case: Case) -> None:
    checkpoint_blocks(dit, case.spec)


@FAMILIES
@pytest.mark.parametrize("dress", [_as_it_is, _with_swap, _with_checkpoints])
@torch.no_grad()
def test_what_a_block_was_given_is_freed_when_it_is_done(
    case: Case, dress: Callable[[nn.Module, Case], None]
) -> None:
    """A name of it anywhere between `forward` and the loop would cost a tensor of all tokens during all
    blocks.
    """
    dit = case.make().eval()
    dress(dit, case)
    given: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(weakref.ref(inputs[0].untyped_storage()))
        alive.append(sum(each() is not None for each in given))

    for block in all_blocks(dit):
        block.register_forward_pre_hook(watch)

    dit(**case.inputs(1))

    assert alive == [1] * sum(case.blocks)


def test_runners_stack_up_the_last_one_outermost() -> None:
    case, order = CASES[0], list[str]()
    dit = case.make().eval()

    def note(name: str, inner: Runner, dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        order.append(name)
        inner(dit, hidden, tweaks)

    for name in ("inner", "outer"):
        set_runner(dit, functools.partial(note, name, runner_of(dit)))
    with torch.no_grad():
        dit(**case.inputs(1))

    assert order == ["outer", "inner"]


def test_a_network_without_a_spec_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no DitSpec"):
        run_blocks(nn.Linear(1, 1), Hidden(torch.zeros(1), None), NO_TWEAKS)
