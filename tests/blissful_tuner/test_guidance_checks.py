"""What contradicts is refused, and what does nothing is told, before anything loads."""

from dataclasses import replace
from typing import Any

import pytest

from blissful_tuner.guidance_checks import check_guidance
from blissful_tuner.guidance_options import PLAIN_GUIDANCE
from modules.contract.generation import Request
from modules.errors import OptionError
from tests.preparing import prepare

SLG = {"slg_mode": "uncond", "slg_layers": "1", "slg_end": 1.0}


def check(
    options: dict[str, Any], scale: float = 5.0, schedule: str | None = None, negative: str | None = None
) -> None:
    request = Request("p", 0, steps=4, guidance_scale=scale, cfg_schedule=schedule, negative_prompt=negative)
    check_guidance(prepare(request, usual_negative=""), replace(PLAIN_GUIDANCE, **options))


def test_a_schedule_beyond_the_steps_is_refused() -> None:
    with pytest.raises(OptionError, match="1 to 4"):
        check({}, schedule="1-9")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cfgzerostar_scaling": True, "perp_neg": 1.5}, ("--cfgzerostar_scaling", "--perp_neg")),
        ({**SLG, "slg_mode": "original", "perp_neg": 1.5}, ("--slg_mode original", "--perp_neg")),
        ({"cfgzerostar_init_steps": -2}, ("--cfgzerostar_init_steps -2",)),
        ({"cfgzerostar_multiplier": float("nan")}, ("--cfgzerostar_multiplier nan",)),
        ({"perp_neg": float("inf")}, ("--perp_neg inf",)),
    ],
)
def test_options_that_exclude_each_other_or_make_no_sense_are_refused(
    options: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(OptionError) as refused:
        replace(PLAIN_GUIDANCE, **options)
    assert all(name in str(refused.value) for name in named)


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


def test_zero_star_must_leave_a_step_that_calls_the_model() -> None:
    with pytest.raises(OptionError, match="--cfgzerostar_init_steps 4: none of the 4 steps"):
        check({"cfgzerostar_init_steps": 4})
    check({"cfgzerostar_init_steps": 3})
    check({"cfgzerostar_init_steps": 9, "cfgzerostar_multiplier": 1.0})


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (SLG, "--slg_mode uncond"),
        ({"guidance_rescale": 0.5}, "--guidance_rescale 0.5"),
        ({"perp_neg": 2.0}, "--perp_neg 2"),
        ({"disable_embedded_for_cfg": True}, "--disable_embedded_for_cfg"),
    ],
)
def test_what_needs_guidance_is_told_where_no_step_has_it(
    options: dict[str, Any], given: str, caplog: pytest.LogCaptureFixture
) -> None:
    check(options, scale=1.0)
    assert f"{given} is ignored because " in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "schedule", "reason"),
    [
        ({**SLG, "slg_start": 0.5, "slg_end": 0.5}, None, "leave none of the 4 steps"),
        ({**SLG, "slg_end": 0.5}, "3-4", "none of its steps, 1 to 2, has a negative pass"),
        ({**SLG, "slg_mode": "original", "slg_scale": 0.0}, None, "--slg_scale is 0"),
        ({**SLG, "perp_neg": 0.0}, None, "--perp_neg 0 has no negative pass"),
    ],
)
def test_skip_layer_guidance_that_skips_nothing_is_told(
    options: dict[str, Any], schedule: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    check(options, schedule=schedule, negative="bad" if "perp_neg" not in options else None)
    assert f"--slg_mode {options['slg_mode']} is ignored because" in caplog.text
    assert reason in caplog.text


def test_a_perpendicular_negative_of_the_empty_prompt_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check({"perp_neg": 2.0}, negative="bad")
    check({"perp_neg": 2.0, **SLG})  # this makes the two passes differ
    assert not caplog.text
    check({"perp_neg": 2.0})
    assert "--perp_neg 2 is ignored because the negative prompt is empty" in caplog.text


def test_a_negative_prompt_that_no_pass_takes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check({}, scale=1.0, negative="bad")
    assert "'bad' is ignored because no step uses guidance (--guidance_scale)" in caplog.text
    check({"perp_neg": 0.0}, negative="worse")
    assert "'worse' is ignored because --perp_neg 0 leaves it out" in caplog.text
    check({}, schedule="1-4:1", negative="dull")
    assert "'dull' is ignored because no step has a pass with it" in caplog.text


def test_embedded_guidance_that_the_model_has_not_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check({"disable_embedded_for_cfg": True})
    assert not caplog.text
    has_none = replace(prepare(Request("p", 0, guidance_scale=5.0)), embedded_guidance=None)
    check_guidance(has_none, replace(PLAIN_GUIDANCE, disable_embedded_for_cfg=True))
    assert "--disable_embedded_for_cfg is ignored because the model has no embedded" in caplog.text


def test_a_multiplier_of_no_steps_is_told(caplog: pytest.LogCaptureFixture) -> None:
    replace(PLAIN_GUIDANCE, cfgzerostar_multiplier=0.5)
    assert "--cfgzerostar_multiplier 0.5 is ignored because --cfgzerostar_init_steps is" in caplog.text


def test_guidance_of_scale_0_is_guidance(caplog: pytest.LogCaptureFixture) -> None:
    check(SLG, scale=0.0)
    assert not caplog.text
