"""Rules of MagCache and TeaCache, and the passes that they skip."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from protocols.steps import Overrides, StepPosition
from runtime.run_blocks import Hidden, get_runner, run_in_order, set_runner
from runtime.step_cache import (
    Changes,
    FirstBlockInput,
    MagCacheRule,
    Ratios,
    Rule,
    StepCache,
    TeaCacheRule,
    compute_first_block_input,
    measure_pass,
    polynomial,
    resample,
    run_around,
)
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, Case, swapped
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit

SIZE = (2, 4, 4, 6)
STEPS = 6


def at(step: int, which: str = "positive", **overrides: Any) -> Overrides:
    return Overrides(step_position=turn(step, STEPS, which), **overrides)


def steps_of(tiny: TinyDit, count: int = STEPS) -> list[dict[str, Any]]:
    inputs = tiny.inputs(SIZE, 1)
    return [{**inputs, "noisy": inputs["noisy"] * (1 - 0.1 * step)} for step in range(count)]


class Skips(NamedTuple):
    """Skips the steps named."""

    steps: frozenset[int]

    def should_skip(self, turn: StepPosition, first_block_input: FirstBlockInput) -> bool:
        return turn.step in self.steps


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
        found = [dit(**inputs, overrides=at(step)) for step, inputs in enumerate(steps_of(tiny))]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (cache.passes, cache.skipped) == (STEPS, 0)


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda each: each.name)
@torch.no_grad()
def test_a_skipped_pass_adds_the_residual_of_the_last_one_computed(tiny: TinyDit) -> None:
    dit, residuals = tiny.make(2).eval(), list[Tensor]()
    first, second, *_ = steps_of(tiny)

    def note(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        before = hidden.x
        run_in_order(dit, hidden, overrides)
        residuals.append(hidden.x - before)

    def add(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        hidden.x = hidden.x + residuals[0]

    with cached(dit, 1) as cache:
        dit(**first, overrides=at(0))
        found = dit(**second, overrides=at(1))
    outputs = []
    for runner, inputs in ((note, first), (add, second), (run_in_order, second)):
        set_runner(dit, runner)
        outputs.append(dit(**inputs))

    assert torch.equal(found, outputs[1])
    assert not torch.equal(found, outputs[2])
    assert cache.skipped == 1


def test_the_passes_of_a_step_have_their_own_residuals() -> None:
    tiny = ONE_OF_EACH[0]
    dit = tiny.make(2).eval()
    first, second, *_ = steps_of(tiny)
    other = {**first, "text": [rows * -2 for rows in first["text"]]}
    with cached(dit, 1):
        _, alone = dit(**first, overrides=at(0)), dit(**second, overrides=at(1))
    with cached(dit, 1):
        dit(**first, overrides=at(0))
        dit(**other, overrides=at(0, "negative"))
        found, negative = (dit(**second, overrides=at(1, which)) for which in ("positive", "negative"))

    assert torch.equal(found, alone)
    assert not torch.equal(negative, found)


def test_another_network_has_its_own_residuals() -> None:
    tiny = ONE_OF_EACH[0]
    high, low = tiny.make(2).eval(), tiny.make(2).eval()
    first, second, third, *_ = steps_of(tiny)
    cache = StepCache(lambda: Skips(frozenset({1})))
    with torch.no_grad(), run_around(lambda t: high if t > 500 else low, cache.run) as dit_at:
        dit_at(900.0)(**first, overrides=at(0))
        dit_at(100.0)(**second, overrides=at(0))
        found = dit_at(100.0)(**third, overrides=at(1))
    with cached(low, 1):
        low(**second, overrides=at(0))
        assert torch.equal(found, low(**third, overrides=at(1)))
    assert get_runner(high) is get_runner(low) is run_in_order


@pytest.mark.parametrize(
    ("tiny", "attention"),
    zip(ONE_OF_EACH, ("self_attn.q", "img_attn_qkv", "attn.to_q"), strict=True),
    ids=[tiny.name for tiny in ONE_OF_EACH],
)
def test_teacache_compares_what_the_first_attention_gets(tiny: TinyDit, attention: str) -> None:
    dit = tiny.make(1).eval()
    expected: list[Tensor] = []
    found: list[Tensor] = []
    (first, *_) = dit.spec.blocks(dit)[dit.spec.block_lists[0]]
    first.get_submodule(attention).register_forward_pre_hook(lambda _, args: expected.append(args[0]))

    def note(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        found.append(compute_first_block_input(dit, hidden, overrides))
        run_in_order(dit, hidden, overrides)

    set_runner(dit, note)
    with torch.no_grad():
        dit(**steps_of(tiny)[0])
    assert torch.equal(found[0], expected[0])


TEACACHE: Callable[[], TeaCacheRule] = lambda: TeaCacheRule(1e9, (1.0, 0.0))  # noqa: E731
MAGCACHE: Callable[[], MagCacheRule] = lambda: MagCacheRule([1.0] * STEPS, 0.0, 1.0, 6)  # noqa: E731


@pytest.mark.parametrize("make_rule", [MAGCACHE, TEACACHE], ids=["magcache", "teacache"])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_swapped_blocks_give_the_same_bits_with_a_cache_and_no_skipped_pass_fetches_one(
    case: Case, make_rule: Callable[[], Any]
) -> None:
    outputs, fetched, device = [], [], FakeDevice()
    for swaps in (False, True):
        dit, cache = case.make().eval(), StepCache(make_rule)
        if swaps:
            swapped(dit, case.spec, case.maximum, device)
        outputs.append([])
        with torch.no_grad(), run_around(lambda _, dit=dit: dit, cache.run) as dit_at:
            for step in range(STEPS):
                before = device.log.count("in")
                for skipped in (frozenset[int](), frozenset({0})):
                    overrides = replace(at(step, f"without {sorted(skipped)}"), skip_blocks=skipped)
                    outputs[-1].append(dit_at(0.0)(**case.inputs(step), overrides=overrides))
                fetched.append(device.log.count("in") - before)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    assert fetched[STEPS] > 0
    assert fetched[STEPS + 1 : -1] == [0] * (STEPS - 2)  # and the last step finds the first blocks in place
    assert 0 < fetched[-1] <= fetched[STEPS]


RATIOS = [1.0, 1.02, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9, 0.8, 0.7]


GROWING = [1.0, 1.25, 0.8, 1.25, 1.0]  # 0.25, then 0 more, then 0.25 more: both ways are errors


@pytest.mark.parametrize(
    ("ratios", "threshold", "max_skips", "retention", "expected"),
    [
        # from step 2 on (20 % of 10), R, and the sum of |1 - R| that it gives:
        # step 2: 0.99, 0.01; 3: 0.9702, 0.0398; 4: 0.941094, 0.098706; 5: 0.90345, 0.195256 -> computed
        # step 6: 0.95, 0.05; 7: 0.855, 0.195 -> computed; 8: 0.8, 0.2 -> computed; 9: the last
        (RATIOS, 0.1, 6, 0.2, "ccssscsccc"),
        # never more than two in a row; 8: 0.2
        (RATIOS, 0.2, 2, 0.2, "ccsscsscsc"),
        (RATIOS, 100.0, 3, 0.2, "ccssscsssc"),
        # half of the steps are kept; 5: 0.04; 6: 0.128 -> computed; 7: 0.1; 8: 0.38 -> computed
        (RATIOS, 0.1, 6, 0.5, "cccccscscc"),
        # the first step is computed whatever is said
        (RATIOS, 100.0, 100, 0.0, "cssssssssc"),
        (RATIOS, 0.0, 6, 0.2, "cccccccccc"),
        (RATIOS, 100.0, 0, 0.2, "cccccccccc"),
        (GROWING, 0.375, 6, 0.0, "csscc"),
    ],
)
def test_magcaches_rule_step_by_step(
    ratios: list[float], threshold: float, max_skips: int, retention: float, expected: str
) -> None:
    assert answers(MagCacheRule(ratios, retention, threshold, max_skips), len(ratios)) == expected


def test_steps_that_lack_the_pass_age_it_too() -> None:
    rule = MagCacheRule([1.0, 0.9, 0.9, 0.9, 0.9, 1.0], 0.0, 0.25, 6)
    assert not rule.should_skip(turn(0, 6), nothing)
    assert not rule.should_skip(turn(2, 6), nothing)  # 0.1, then 0.1 + 0.19 for the step without guidance
    assert rule.should_skip(turn(3, 6), nothing)


def test_ratios_are_resampled_by_the_nearest() -> None:
    ratios = [1.0, 0.9, 0.8, 0.7, 0.6]
    assert resample(ratios, 5) == ratios
    assert resample(ratios, 3) == [1.0, 0.8, 0.6]
    # 0, 0.5, 1, 1.5, ... : halves go to the even number
    assert resample(ratios, 9) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6]
    assert (resample(ratios, 1), resample([0.5], 3)) == ([0.6], [0.5] * 3)


# inputs of ones times a number: the change is that of the number, against the number before
LEVELS = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.4641, 2.0, 1.0]  # 0.1 four times, 0, 0.366, 0.5


def answers_at(rule: TeaCacheRule, levels: list[float]) -> str:
    inputs = [torch.full((1, 3, 4), level) for level in levels]
    asked = [rule.should_skip(turn(step, len(levels)), lambda x=x: x) for step, x in enumerate(inputs)]
    return "".join("s" if should_skip else "c" for should_skip in asked)


@pytest.mark.parametrize(
    ("threshold", "coefficients", "expected"),
    [
        # the change itself is summed: 0.1, 0.2, 0.3 -> computed; 0.1, 0.1, 0.466 -> computed; the last
        (0.25, (1.0, 0.0), "csscsscc"),
        (0.15, (1.0, 0.0), "cscscscc"),
        # twice the change: 0.2, 0.4 -> computed; 0.2, 0.4 -> computed; 0; 0.73 -> computed
        (0.25, (2.0, 0.0), "cscscscc"),
        # its square and a tenth: 0.11, 0.22 -> computed; the same; 0.1; 0.1 + 0.234 -> computed
        (0.2, (1.0, 0.0, 0.1), "cscscscc"),
        (100.0, (1.0, 0.0), "cssssssc"),
        (0.0, (1.0, 0.0), "cccccccc"),
        # a polynomial below zero takes nothing away from the sum
        (0.05, (10.0, -2.0), "cssssscc"),
    ],
)
def test_teacaches_rule_step_by_step(
    threshold: float, coefficients: tuple[float, ...], expected: str
) -> None:
    assert answers_at(TeaCacheRule(threshold, coefficients), LEVELS) == expected


def test_teacache_computes_the_last_step_and_inputs_that_are_not_numbers() -> None:
    assert not TeaCacheRule(100.0, (1.0, 0.0)).should_skip(turn(4, 5), nothing)  # without a look at its input
    assert answers_at(TeaCacheRule(100.0, (1.0, 0.0)), [1.0, math.nan, 1.0, 1.0, 1.0, 1.0]) == "cccssc"


def tokens(*sizes: float) -> Tensor:
    """A token of each size, B L C."""
    return torch.tensor(sizes).view(1, -1, 1).expand(1, -1, 4) / 2


def test_ratios_are_means_over_tokens_passes_and_sections() -> None:
    ratios = Ratios()
    for section in range(2):
        ratios.forget()
        for step, sizes in enumerate([(1.0, 2.0), (1.1, 2.6), (2.2, 2.6)]):
            ratios.measure(turn(step, 3), nothing, tokens(*sizes))
            if section == 0:
                ratios.measure(turn(step, 3, "negative"), nothing, tokens(1.0, 1.0))
    # (1.1 + 1.3) / 2 = 1.2 twice, and 1 once; (2 + 1) / 2 = 1.5 twice, and 1 once
    assert ratios.result(3) == pytest.approx([1.0, (1.2 + 1.2 + 1) / 3, (1.5 + 1.5 + 1) / 3])


def test_a_step_that_lacks_the_pass_has_no_ratio_and_neither_has_the_one_after() -> None:
    ratios = Ratios()
    ratios.forget()
    for step, size in ((0, 1.0), (1, 2.0), (3, 5.0), (4, 10.0)):
        ratios.measure(turn(step, 5), nothing, tokens(size))
    assert ratios.result(5) == [1.0, 2.0, 1.0, 1.0, 2.0]


def fitted(count: int, coefficients: tuple[float, ...]) -> tuple[Changes, list[float]]:
    """Coefficients fitted to `count` points of a polynomial."""
    changes, entered, residual = Changes(), 1.0, 1.0
    changes.forget()
    for step in range(count + 1):
        level, added = torch.full((1, 2, 4), entered), torch.full((1, 2, 4), residual)
        changes.measure(turn(step, count + 1), lambda level=level: level, added)
        change = 0.01 * (step + 1)
        entered *= 1 + change
        residual *= 1 + polynomial(coefficients, change)
    return changes, changes.result()


def test_the_polynomial_is_found_again() -> None:
    coefficients = (20.0, -3.0, 0.5, 0.02)
    _, found = fitted(24, coefficients)
    assert len(found) == 5
    for x in (0.02, 0.1, 0.2):
        assert polynomial(tuple(found), x) == pytest.approx(polynomial(coefficients, x), rel=1e-2)


@pytest.mark.parametrize(("points", "count"), [(5, 0), (6, 2), (8, 2), (9, 3), (12, 4), (40, 5)])
def test_few_points_give_few_powers(points: int, count: int) -> None:
    changes, found = fitted(points, (0.5, 0.01))
    assert len(found) == count
    assert len(changes.points) == points


def test_passes_that_skip_layers_do_not_count() -> None:
    dit, seen = ONE_OF_EACH[0].make(1).eval(), list[int]()

    def add(dit: nn.Module, hidden: Hidden, overrides: Overrides) -> None:
        hidden.x = hidden.x + 1

    def see(turn: StepPosition, first_block_input: FirstBlockInput, residual: Tensor) -> None:
        seen.append(int(residual.mean()))

    for overrides in (at(0), at(0, skip_blocks=frozenset({0})), Overrides()):
        measure_pass(see, add, dit, Hidden(torch.zeros(1, 2, 4), None), overrides)

    assert seen == [1]


def turn(step: int, num_steps: int, which: str = "positive") -> StepPosition:
    return StepPosition(
        step, num_steps, 1000.0 * (1 - step / num_steps), 1000.0 * (1 - (step + 1) / num_steps), which
    )


def nothing() -> Tensor:
    raise AssertionError("the rule looks at a tensor")


def answers(rule: Rule, num_steps: int) -> str:
    """One letter a step: c for computed, s for skipped."""
    return "".join(
        "s" if rule.should_skip(turn(step, num_steps), nothing) else "c" for step in range(num_steps)
    )
