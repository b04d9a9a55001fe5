"""`--cfg_schedule` against the measured schedules."""

from typing import Any

import pytest

from blissful_tuner.guidance import parse_cfg_schedule
from modules.errors import OptionError
from tests.golden_cases import read_case

CASE, _ = read_case("cfg_schedule")


@pytest.mark.parametrize(("text", "expected"), CASE["cases"])
def test_schedules_are_the_measured_ones(text: str, expected: dict[str, Any]) -> None:
    if "raises" in expected:
        with pytest.raises(OptionError, match="cfg_schedule entry"):
            parse_cfg_schedule(text, CASE["infer_steps"], CASE["guidance_scale"])
    else:
        table = parse_cfg_schedule(text, CASE["infer_steps"], CASE["guidance_scale"])
        assert {str(step): scale for step, scale in table.items()} == expected


@pytest.mark.parametrize(
    ("text", "steps", "scale", "expected"),
    [
        ("e~2:6.4, 1-4, 9-10", 10, 5, {1: 5, 2: 5, 3: 5, 4: 5, 6: 6.4, 8: 6.4, 9: 5, 10: 5}),
        (
            "1-10,!3,e~4:2",
            12,
            6,
            {**dict.fromkeys((1, 2, 5, 6, 7, 9, 10), 6), **dict.fromkeys((4, 8, 12), 2)},
        ),
        ("!1-2,1-4", 10, 3, {3: 3, 4: 3}),
        ("1-4:7,2", 6, 5, {1: 7, 2: 5, 3: 7, 4: 7}),
    ],
)
def test_documented_schedules(text: str, steps: int, scale: float, expected: dict[int, float]) -> None:
    assert parse_cfg_schedule(text, steps, scale) == expected
