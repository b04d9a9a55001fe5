"""Guidance in every family, from the command line to latents: what changes them, and what it costs."""

from pathlib import Path

import pytest
import torch

from tests.generation.guided import STEPS, Script, is_finite, per_step, write_scripts

FAMILIES = ("wan", "hunyuan", "framepack")
KINDS = ("wan", "wan i2v", "hunyuan", "skyreels i2v", "framepack")
EMBEDDED = ("hunyuan", "framepack")
SLG = ("--slg_layers", "1", "--slg_end", "0.5", "--slg_mode")
PLAIN = [2] * STEPS  # passes of each step
NEUTRAL = {
    "zero star times 1": ("--cfgzerostar_init_steps", 2, "--cfgzerostar_multiplier", 1),
    "zero star of no steps": ("--cfgzerostar_init_steps", 0),
    "slg original 0": (*SLG, "original", "--slg_scale", 0),
    "slg that ends at once": (*SLG, "uncond", "--slg_end", 0),
    "rescale 0": ("--guidance_rescale", 0),
    "schedule of all steps": ("--cfg_schedule", f"1-{STEPS}"),
    "all steps kept": ("--cfg_skip_mode", "late", "--cfg_apply_ratio", 1),
}
ACTIVE = {  # options -> passes of each step
    "zero star": (("--cfgzerostar_scaling",), PLAIN),
    "zero init": (("--cfgzerostar_init_steps", 2), [0, 0, 2, 2]),
    "zero init times 0.5": (("--cfgzerostar_init_steps", 1, "--cfgzerostar_multiplier", 0.5), PLAIN),
    "perp neg": (("--perp_neg", 1.5), [3] * STEPS),
    "perp neg 0": (("--perp_neg", 0), PLAIN),
    "perp neg, slg uncond": (("--perp_neg", 1.5, *SLG, "uncond"), [3] * STEPS),
    "zero star, slg original": (("--cfgzerostar_scaling", *SLG, "original"), [3, 3, 2, 2]),
    "slg uncond": ((*SLG, "uncond"), PLAIN),
    "rescale": (("--guidance_rescale", 0.7), PLAIN),
    "schedule": (("--cfg_schedule", "1-2:4, 4:1"), [2, 2, 1, 1]),
    "skip mode": (("--cfg_skip_mode", "middle", "--cfg_apply_ratio", 0.5), [2, 1, 1, 2]),
    "schedule, perp neg, rescale": (
        ("--cfg_schedule", "2-3", "--perp_neg", 2, "--guidance_rescale", 0.5),
        [1, 3, 3, 1],
    ),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    return write_scripts(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(scripts: dict[str, Script], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return {kind: scripts[kind].latents(tmp_path_factory.mktemp("plain")) for kind in KINDS}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_no_bit(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    latents, calls = scripts[kind].run(tmp_path, *NEUTRAL[name])
    assert torch.equal(latents[1], plain[kind])
    assert per_step(calls) == PLAIN


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ACTIVE)
def test_real_values_change_the_result_and_make_no_pass_too_many(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    options, passes = ACTIVE[name]
    latents, calls = scripts[kind].run(tmp_path, *options)
    assert is_finite(latents)
    assert float((latents[1] - plain[kind]).abs().max()) > 1e-4
    assert per_step(calls) == passes


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_guidance_changes_the_video(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], kind: str
) -> None:
    latents, _ = scripts[kind].run(tmp_path, "--nag_scale", 5, "--nag_prompt", "a dull dog")
    assert is_finite(latents)
    assert float((latents[1] - plain[kind]).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", EMBEDDED)
def test_steps_with_guidance_can_leave_embedded_guidance_out(
    tmp_path: Path, scripts: dict[str, Script], kind: str
) -> None:
    one = ("--cfg_schedule", "2", "--disable_embedded_for_cfg")
    latents, calls = scripts[kind].run(tmp_path / "a", *one)
    assert [call.embedded for call in calls if call.step == 1].count(False) == len(
        [call for call in calls if call.step == 1]
    )
    assert all(call.embedded for call in calls if call.step != 1)
    assert not torch.equal(latents[1], scripts[kind].latents(tmp_path / "b", "--cfg_schedule", "2"))
    every = ("--disable_embedded_for_cfg", "--embedded_cfg_scale")
    assert torch.equal(
        scripts[kind].latents(tmp_path / "c", *every, 2), scripts[kind].latents(tmp_path / "d", *every, 9)
    )


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ((), [2]),
        (("--perp_neg", 1.5), [3]),
        (("--perp_neg", 1.5, *SLG, "uncond"), [1, 2]),  # the pass that skips blocks is a call of its own
        ((*SLG, "original"), [1, 2]),
        (("--cfgzerostar_scaling", "--disable_embedded_for_cfg"), [2]),
        (("--perp_neg", 1.5, "--split_uncond"), [1, 1, 1]),
    ],
)
def test_hunyuan_video_makes_one_batch_of_the_passes_that_can_be_one(
    tmp_path: Path, scripts: dict[str, Script], options: tuple[object, ...], rows: list[int]
) -> None:
    _, calls = scripts["hunyuan"].run(tmp_path, *options)
    assert sorted(call.rows for call in calls if call.step == 0) == rows
