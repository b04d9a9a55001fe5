"""The seam around the blocks: what stands there needs no change to a model, and stands together with other
things.

A toy step cache and a toy that skips blocks go through it on every family's transformer.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from protocols.steps import Overrides
from runtime.offload.checkpointing import checkpoint_blocks
from runtime.run_blocks import Hidden, get_runner, get_spec, set_runner
from tests.modules.swap_cases import CASES, Case, swapped

FAMILIES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def all_blocks(dit: nn.Module) -> list[nn.Module]:
    return [block for blocks in get_spec(dit).blocks(dit).values() for block in blocks]


def count_blocks(dit: nn.Module) -> list[int]:
    """The positions of blocks that were run, in a list that grows."""
    ran: list[int] = []
    for position, block in enumerate(all_blocks(dit)):
        block.register_forward_pre_hook(lambda _, __, position=position: ran.append(position))
    return ran


def leave_out(dit: nn.Module, positions: frozenset[int]) -> None:
    """Have every pass omit these blocks too."""
    inner = get_runner(dit)

    def run(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        inner(dit, hidden, Overrides(skip_blocks=overrides.skip_blocks | positions))

    set_runner(dit, run)


def run_beside_the_seam(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
    """What a model would do whose forward had a loop of its own."""
    for block in all_blocks(dit):
        hidden.x = block(hidden.x, hidden.tokens)


@FAMILIES
@torch.no_grad()
def test_blocks_are_skipped_by_a_runner_or_by_the_call_alike(case: Case) -> None:
    both, one = frozenset({0, 3}), frozenset({3})
    by_call, by_runner = case.make().eval(), case.make().eval()
    expected = by_call(**case.inputs(1), overrides=Overrides(skip_blocks=both))
    leave_out(by_runner, frozenset({0}))
    ran = count_blocks(by_runner)

    assert torch.equal(by_runner(**case.inputs(1), overrides=Overrides(skip_blocks=one)), expected)
    assert ran == [position for position in range(sum(case.blocks)) if position not in both]
    for dit in (by_call, by_runner):
        assert not torch.equal(dit(**case.inputs(1)), expected)
    set_runner(by_runner, run_beside_the_seam)
    assert not torch.equal(by_runner(**case.inputs(1), overrides=Overrides(skip_blocks=one)), expected)


DRESSES: dict[str, Callable[[nn.Module, Case], object]] = {
    "as it is": lambda dit, case: None,
    "swapped": lambda dit, case: swapped(dit, case.spec, 2),
    "checkpointed": lambda dit, case: checkpoint_blocks(dit, case.spec),
}


@FAMILIES
@pytest.mark.parametrize("dress", DRESSES)
@torch.no_grad()
def test_what_a_block_was_given_is_freed_when_it_is_done(case: Case, dress: str) -> None:
    """A name of it anywhere between `forward` and the loop would cost a tensor of all tokens during all
    blocks.
    """
    dit = case.make().eval()
    DRESSES[dress](dit, case)
    given: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(weakref.ref(inputs[0].untyped_storage()))
        alive.append(sum(each() is not None for each in given))

    for block in all_blocks(dit):
        block.register_forward_pre_hook(watch)

    dit(**case.inputs(1))

    assert alive == [1] * sum(case.blocks)
