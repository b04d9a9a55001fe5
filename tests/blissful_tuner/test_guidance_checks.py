"""What contradicts is refused, and what does nothing is told, before anything loads."""

from dataclasses import replace
from typing import Any

import pytest

from blissful_tuner.guidance import check_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from modules.contract.requests import Request
from modules.errors import OptionError
from tests.preparing import prepare


def check(
    options: dict[str, Any], scale: float = 5.0, schedule: str | None = None, negative: str | None = None
) -> None:
    request = Request("p", 0, steps=4, guidance_scale=scale, cfg_schedule=schedule, negative_prompt=negative)
    check_guidance(prepare(request, usual_negative=""), replace(PLAIN_GUIDANCE, **options))


def test_a_schedule_and_a_skip_mode_are_refused_together() -> None:
    with pytest.raises(OptionError, match="--cfg_schedule '1' and --cfg_skip_mode late"):
        check({"cfg_skip_mode": "late", "cfg_apply_ratio": 0.5}, schedule="1")


@pytest.mark.parametrize("options", [{"cfgzerostar_scaling": True}, {"cfgzerostar_init_steps": 1}])
@pytest.mark.parametrize(("scale", "schedule"), [(1.0, None), (5.0, "!1")])
def test_zero_star_is_refused_where_no_step_has_guidance(
    options: dict[str, Any], scale: float, schedule: str | None
) -> None:
    (option,) = options
    with pytest.raises(OptionError, match=f"--{option}.* needs guidance, and no step uses guidance: give a"):
        check(options, scale, schedule)
    check(options, 1.0, "2:3")
