"""Decisions of MagCache and TeaCache, and what calibrations measure, against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from modules.contract.steps import Tweaks
from modules.run_blocks import Hidden, Runner
from modules.step_cache import Changes, MagCacheRule, Ratios, TeaCacheRule, measure_pass, polynomial, resample
from tests.modules.step_cache.turns import answers, nothing, turn
from tests.tiny.dits import ONE_OF_EACH

RATIOS = [1.0, 1.02, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9, 0.8, 0.7]


@pytest.mark.parametrize(
    ("threshold", "most_skips", "retention", "expected"),
    [
        # from step 2 on (20 % of 10), R, and the sum of |1 - R| that it gives:
        # step 2: 0.99, 0.01; 3: 0.9702, 0.0398; 4: 0.941094, 0.098706; 5: 0.90345, 0.195256 -> computed
        # step 6: 0.95, 0.05; 7: 0.855, 0.195 -> computed; 8: 0.8, 0.2 -> computed; 9: the last
        (0.1, 6, 0.2, "ccssscsccc"),
        # as above, 5: 0.195256; 6: 0.858278, 0.336979 -> computed; 7: 0.9, 0.1; 8: 0.72, 0.38 -> computed
        (0.2, 6, 0.2, "ccsssscscc"),
        # never more than two in a row; 8: 0.2
        (0.2, 2, 0.2, "ccsscsscsc"),
        (100.0, 3, 0.2, "ccssscsssc"),
        # half of the steps are kept; 5: 0.04; 6: 0.128 -> computed; 7: 0.1; 8: 0.38 -> computed
        (0.1, 6, 0.5, "cccccscscc"),
        # the first step is computed whatever is said
        (100.0, 100, 0.0, "cssssssssc"),
        (0.0, 6, 0.2, "cccccccccc"),
        (100.0, 0, 0.2, "cccccccccc"),
        (100.0, 6, 1.0, "cccccccccc"),
    ],
)
def test_the_rule_step_by_step(threshold: float, most_skips: int, retention: float, expected: str) -> None:
    assert answers(MagCacheRule(RATIOS, retention, threshold, most_skips), 10) == expected


def test_growth_and_shrinking_are_both_errors() -> None:
    rule = MagCacheRule([1.0, 1.25, 0.8, 1.25, 1.0], 0.0, 0.375, 6)
    assert answers(rule, 5) == "csscc"  # 0.25, then 0 more, then 0.25 more


def test_steps_that_lack_the_pass_age_it_too() -> None:
    rule = MagCacheRule([1.0, 0.9, 0.9, 0.9, 0.9, 1.0], 0.0, 0.25, 6)
    assert not rule.skips(turn(0, 6), nothing)
    assert not rule.skips(turn(2, 6), nothing)  # 0.1, then 0.1 + 0.19 for the step without guidance
    assert rule.skips(turn(3, 6), nothing)


def test_ratios_are_resampled_by_the_nearest() -> None:
    ratios = [1.0, 0.9, 0.8, 0.7, 0.6]
    assert resample(ratios, 5) == ratios
    assert resample(ratios, 3) == [1.0, 0.8, 0.6]
    # 0, 0.5, 1, 1.5, ... : halves go to the even number
    assert resample(ratios, 9) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6]
    assert resample(ratios, 1) == [0.6]
    assert resample([0.5], 3) == [0.5, 0.5, 0.5]


# inputs of ones times a number: the change is that of the number, against the number before
LEVELS = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.4641, 2.0, 1.0]  # 0.1 four times, 0, 0.366, 0.5


def answers_at(rule: TeaCacheRule, levels: list[float]) -> str:
    def full(level: float) -> Tensor:
        return torch.full((1, 3, 4), level)

    asked = [
        rule.skips(turn(step, len(levels)), lambda level=level: full(level))
        for step, level in enumerate(levels)
    ]
    return "".join("s" if skips else "c" for skips in asked)


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


def test_the_last_step_is_computed_without_a_look_at_its_input() -> None:
    assert not TeaCacheRule(100.0, (1.0, 0.0)).skips(turn(4, 5), nothing)


def test_an_input_that_is_not_a_number_is_computed() -> None:
    rule = TeaCacheRule(100.0, (1.0, 0.0))
    assert answers_at(rule, [1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]) == "cccssc"


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


@pytest.mark.parametrize(("points", "count"), [(5, 0), (6, 2), (8, 2), (9, 3), (12, 4), (15, 5), (40, 5)])
def test_few_points_give_few_powers(points: int, count: int) -> None:
    changes, found = fitted(points, (0.5, 0.01))
    assert len(found) == count
    assert len(changes.points) == points


def test_passes_that_skip_layers_do_not_count() -> None:
    tiny = ONE_OF_EACH[0]
    dit, seen = tiny.make(1).eval(), list[int]()

    def inner(dit: torch.nn.Module, hidden: Hidden, tweaks: Tweaks) -> None:
        hidden.x = hidden.x + 1

    run: Runner = inner
    for skipped in (frozenset[int](), frozenset({0})):
        measure_pass(
            lambda turn, signal, residual: seen.append(int(residual.mean())),
            run,
            dit,
            Hidden(torch.zeros(1, 2, 4), None),
            Tweaks(skip_blocks=skipped, turn=turn(0, 3)),
        )
    measure_pass(
        lambda turn, signal, residual: seen.append(2), run, dit, Hidden(torch.zeros(1, 2, 4), None), Tweaks()
    )
    assert seen == [1]
