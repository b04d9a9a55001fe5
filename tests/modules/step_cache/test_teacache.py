"""TeaCache's decisions, against sequences worked out by hand."""

import pytest
import torch
from torch import Tensor

from modules.step_cache import TeaCacheRule
from tests.modules.step_cache.turns import nothing, turn

# inputs of ones times a number: the change is that of the number, against the number before
LEVELS = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.4641, 2.0, 1.0]  # 0.1 four times, 0, 0.366, 0.5


def answers(rule: TeaCacheRule, levels: list[float]) -> str:
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
def test_the_rule_step_by_step(threshold: float, coefficients: tuple[float, ...], expected: str) -> None:
    assert answers(TeaCacheRule(threshold, coefficients), LEVELS) == expected


def test_the_last_step_is_computed_without_a_look_at_its_input() -> None:
    assert not TeaCacheRule(100.0, (1.0, 0.0)).skips(turn(4, 5), nothing)


def test_an_input_that_is_not_a_number_is_computed() -> None:
    rule = TeaCacheRule(100.0, (1.0, 0.0))
    assert answers(rule, [1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]) == "cccssc"
