"""A skipped pass adds what the blocks added last; each pass of a step by itself; swapped blocks stay away."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.contract.steps import Turn, Tweaks
from modules.offload.block_swap import swap_of
from modules.run_blocks import Hidden, run_in_order, runner_of, set_runner
from modules.step_cache import MagCacheRule, Signal, StepCache, TeaCacheRule, first_input, run_around
from tests.modules.fake_device import FakeDevice
from tests.modules.step_cache.turns import turn
from tests.modules.swap_cases import CASES, Case, swapped
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit

SIZE = (2, 4, 4, 6)
STEPS = 6


@dataclass
class Skips:
    """Skips the steps named."""

    steps: frozenset[int]

    def skips(self, turn: Turn, signal: Signal) -> bool:
        return turn.step in self.steps


def at(step: int, which: str = "positive", **tweaks: Any) -> Tweaks:
    return Tweaks(turn=turn(step, STEPS, which), **tweaks)


def steps_of(tiny: TinyDit, count: int = STEPS) -> list[dict[str, Any]]:
    inputs = tiny.inputs(SIZE, 1)
    return [{**inputs, "noisy": inputs["noisy"] * (1 - 0.1 * step)} for step in range(count)]


def blocks_residual(dit: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What all blocks add in a pass."""
    found: list[Tensor] = []

    def note(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        before = hidden.x
        run_in_order(dit, hidden, tweaks)
        found.append(hidden.x - before)

    set_runner(dit, note)
    dit(**inputs)
    set_runner(dit, run_in_order)
    return found[0]


@contextlib.contextmanager
def cached(dit: nn.Module, *skipped: int) -> Iterator[StepCache]:
    cache = StepCache(lambda: Skips(frozenset(skipped)))
    with torch.no_grad(), run_around(lambda _: dit, cache.run) as dit_at:
        assert dit_at(1000.0) is dit
        yield cache


@pytest.mark.parametrize("tiny", DITS, ids=lambda each: each.name)
def test_a_cache_that_skips_nothing_gives_the_same_bits(tiny: TinyDit) -> None:
    dit = tiny.make(2).eval()
    with torch.no_grad():
        expected = [dit(**inputs) for inputs in steps_of(tiny)]
    with cached(dit) as cache:
        found = [dit(**inputs, tweaks=at(step)) for step, inputs in enumerate(steps_of(tiny))]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (cache.passes, cache.skipped) == (STEPS, 0)


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda each: each.name)
def test_a_skipped_pass_adds_the_residual_of_the_last_one_computed(tiny: TinyDit) -> None:
    dit = tiny.make(2).eval()
    first, second, *_ = steps_of(tiny)
    with torch.no_grad():
        residual, plain = blocks_residual(dit, first), dit(**second)
    with cached(dit, 1) as cache:
        dit(**first, tweaks=at(0))
        found = dit(**second, tweaks=at(1))

    def add(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        hidden.x = hidden.x + residual

    set_runner(dit, add)
    with torch.no_grad():
        assert torch.equal(found, dit(**second))
    assert not torch.equal(found, plain)
    assert cache.skipped == 1


def test_the_passes_of_a_step_have_their_own_residuals() -> None:
    tiny = ONE_OF_EACH[0]
    dit = tiny.make(2).eval()
    first, second, *_ = steps_of(tiny)
    other = {**first, "text": [rows * -2 for rows in first["text"]]}
    with cached(dit, 1):
        alone = [dit(**first, tweaks=at(0)), dit(**second, tweaks=at(1))]
    with cached(dit, 1):
        dit(**first, tweaks=at(0))
        dit(**other, tweaks=at(0, "negative"))
        dit(**other, tweaks=at(0, "skipping", skip_blocks=frozenset({0})))
        found = dit(**second, tweaks=at(1))
        negative = dit(**second, tweaks=at(1, "negative"))

    assert torch.equal(found, alone[1])
    assert not torch.equal(negative, found)


def test_another_network_has_its_own_residuals() -> None:
    tiny = ONE_OF_EACH[0]
    high, low = tiny.make(2).eval(), tiny.make(2).eval()
    first, second, third, *_ = steps_of(tiny)
    cache = StepCache(lambda: Skips(frozenset({1})))
    with torch.no_grad(), run_around(lambda t: high if t > 500 else low, cache.run) as dit_at:
        dit_at(900.0)(**first, tweaks=at(0))
        dit_at(100.0)(**second, tweaks=at(0))
        found = dit_at(100.0)(**third, tweaks=at(1))
    with cached(low, 1):
        low(**second, tweaks=at(0))
        assert torch.equal(found, low(**third, tweaks=at(1)))
    assert runner_of(high) is runner_of(low) is run_in_order


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda each: each.name)
def test_teacache_compares_what_the_first_attention_gets(tiny: TinyDit) -> None:
    dit = tiny.make(1).eval()
    expected: list[Tensor] = []
    first = next(iter(dit.spec.blocks(dit)[dit.spec.block_lists[0]]))
    attention = next(
        module
        for name in ("self_attn.q", "img_attn_qkv", "attn.to_q")
        for module in [dict(first.named_modules()).get(name)]
        if module is not None
    )
    attention.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    found: list[Tensor] = []

    def note(dit: nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        found.append(first_input(dit, hidden, tweaks))
        run_in_order(dit, hidden, tweaks)

    set_runner(dit, note)
    with torch.no_grad():
        dit(**steps_of(tiny)[0])
    assert torch.equal(found[0], expected[0])


def sent_by(dit: nn.Module) -> list[int]:
    """The positions of the blocks that are copied to the device from now on."""
    swap = swap_of(dit)
    assert swap is not None
    positions: list[int] = []
    send = swap._send
    swap._send = lambda ring, unit, slot: (positions.append(unit.position), send(ring, unit, slot))  # type: ignore[method-assign]
    return positions


TEACACHE: Callable[[], TeaCacheRule] = lambda: TeaCacheRule(1e9, (1.0, 0.0))  # noqa: E731
MAGCACHE: Callable[[], MagCacheRule] = lambda: MagCacheRule([1.0] * STEPS, 0.0, 1.0, 6)  # noqa: E731


@pytest.mark.parametrize("make_rule", [MAGCACHE, TEACACHE], ids=["magcache", "teacache"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_skipped_pass_fetches_no_block(case: Case, make_rule: Callable[[], Any]) -> None:
    dit = case.make().eval()
    swapped(dit, case.spec, case.most, FakeDevice())
    cache, positions = StepCache(make_rule), sent_by(dit)
    counts = []
    with torch.no_grad(), run_around(lambda _: dit, cache.run) as dit_at:
        for step in range(STEPS):
            before = len(positions)
            found = dit_at(0.0)(**case.inputs(step), tweaks=at(step))
            counts.append(len(positions) - before)
            assert torch.isfinite(found).all()

    assert cache.skipped == STEPS - 2
    assert counts[0] > 0
    assert counts[1:-1] == [0] * (STEPS - 2)  # and the last step finds the first blocks in place
    assert 0 < counts[-1] <= counts[0]


@pytest.mark.parametrize("make_rule", [MAGCACHE, TEACACHE], ids=["magcache", "teacache"])
def test_swapped_blocks_give_the_same_bits_with_a_cache(make_rule: Callable[[], Any]) -> None:
    for case in CASES:
        dits = case.make().eval(), case.make().eval()
        swapped(dits[1], case.spec, case.most, FakeDevice())
        found: list[list[Tensor]] = [[], []]
        for dit, outputs in zip(dits, found, strict=True):
            cache = StepCache(make_rule)
            with torch.no_grad(), run_around(lambda _, dit=dit: dit, cache.run) as dit_at:
                for step in range(4):
                    for skipped in (frozenset[int](), frozenset({0}), frozenset({1})):
                        tweaks = replace(at(step, f"without {sorted(skipped)}"), skip_blocks=skipped)
                        outputs.append(dit_at(0.0)(**case.inputs(step), tweaks=tweaks))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
