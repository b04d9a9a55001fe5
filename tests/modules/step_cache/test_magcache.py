"""MagCache's decisions, against sequences worked out by hand."""

import pytest

from modules.step_cache import MagCacheRule, resample
from tests.modules.step_cache.turns import answers, nothing, turn

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
