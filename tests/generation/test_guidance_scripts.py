"""Guidance, speed switches and solvers of every family: what they change in latents, and what they cost."""

from pathlib import Path

import pytest
import torch

import wan_generate_video
from modules.errors import OptionError
from modules.media.reading import read_image, read_tags
from tests.generation.guided import SAY, STEPS, Script, is_finite, per_step, write_scripts
from tests.generation.test_run import Typing
from tests.tiny.wan import write_tiny_wan

KINDS = ("wan", "hunyuan", "framepack")
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
    "steered nowhere": ("--nag_scale", 1),
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
    "nag": (("--nag_scale", 5, "--nag_prompt", "a dull dog"), PLAIN),
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


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_no_bit(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], name: str
) -> None:
    latents, calls = scripts["wan"].run(tmp_path, *NEUTRAL[name])
    assert torch.equal(latents[1], plain["wan"])
    assert per_step(calls) == PLAIN


@pytest.mark.slow_cases("framepack-nag", "framepack-perp neg, slg uncond")
@pytest.mark.parametrize(
    ("kind", "name"),
    # what a family gives to guidance beside the formula: an empty text, blocks to skip, a text to leave
    [
        *(("wan", name) for name in ACTIVE),
        *((kind, name) for kind in ("hunyuan", "framepack") for name in ("perp neg, slg uncond", "nag")),
    ],
)
def test_real_values_change_the_result_and_make_no_pass_too_many(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    options, passes = ACTIVE[name]
    latents, calls = scripts[kind].run(tmp_path, *options)
    assert is_finite(latents)
    assert float((latents[1] - plain[kind]).abs().max()) > 1e-4
    assert per_step(calls) == passes


@pytest.mark.slow_cases("framepack")
@pytest.mark.parametrize("kind", ["hunyuan", "framepack"])
def test_steps_with_guidance_can_leave_embedded_guidance_out(
    tmp_path: Path, scripts: dict[str, Script], kind: str
) -> None:
    one = ("--cfg_schedule", "2", "--disable_embedded_for_cfg")
    latents, calls = scripts[kind].run(tmp_path / "a", *one)
    assert {call.step: call.embedded for call in calls} == {0: True, 1: False, 2: True, 3: True}
    assert not torch.equal(latents[1], scripts[kind].latents(tmp_path / "b", "--cfg_schedule", "2"))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ((), [2]),
        (("--perp_neg", 1.5, *SLG, "uncond"), [1, 2]),  # the pass that skips blocks is a call of its own
        (("--perp_neg", 1.5, "--split_uncond"), [1, 1, 1]),
    ],
)
def test_passes_that_can_be_one_batch_are_one(
    tmp_path: Path, scripts: dict[str, Script], options: tuple[object, ...], rows: list[int]
) -> None:
    _, calls = scripts["hunyuan"].run(tmp_path, *options)
    assert sorted(call.rows for call in calls if call.step == 0) == rows


@pytest.mark.slow_cases("lcm")
@pytest.mark.parametrize("solver", ["lcm", "dpm++sde"])
def test_lines_of_a_file_and_of_the_console_equal_single_runs(
    scripts: dict[str, Script], solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Solvers that draw noise draw that of their own seed."""
    make, lines = scripts["wan"].made, ["a cat --d 1", "a dog --d 2"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("builtins.input", Typing(*lines))
    words = ("--sample_solver", solver)

    of_file = make(tmp_path / "file", *words, "--from_file", tmp_path / "lines.txt")
    of_console = make(tmp_path / "console", *words, "--interactive")

    for seed, prompt in ((1, "a cat"), (2, "a dog")):
        alone = make(tmp_path / prompt, *words, "--prompt", prompt, "--seed", seed)[seed]
        assert torch.equal(of_file[seed], alone)
        assert torch.equal(of_console[seed], alone)


def test_upcast_linear_computes_fp8_layers_in_float32(tmp_path: Path) -> None:
    """The formula of a layer is in tests/checkpoints/stored/test_fp8.py; here it arrives in the script."""
    models = write_tiny_wan(tmp_path / "models", dtype=torch.bfloat16).models
    script = Script(wan_generate_video.main, [*models, "--task", "t2v-1.3B", "--video_length", "1"])
    scaled = script.latents(tmp_path / "scaled", "--fp8_scaled")
    wide = script.latents(tmp_path / "wide", "--fp8_scaled", "--upcast_linear")
    assert 1e-6 < float((wide - scaled).norm() / scaled.norm()) < 0.05


def test_the_last_frame_of_a_video_and_of_decoded_latents(scripts: dict[str, Script], tmp_path: Path) -> None:
    make, folder = scripts["wan"].made, tmp_path / "made"
    make(folder, *SAY, "--output_type", "both", "--save_last_frame", "--keep_pngs")
    (video,), (last,), (latent,) = (
        [*folder.glob(kind)] for kind in ("*.mp4", "*_last.png", "*_latent.safetensors")
    )
    assert last.name == f"{video.stem}_last.png"
    frames = sorted((folder / "frames").iterdir())
    assert (read_image(last) == read_image(frames[-1])).all()
    assert read_tags(last) == read_tags(frames[-1])

    decode = ("--output_type", "video", "--latent_path", latent)
    make(tmp_path / "again", *decode, "--save_last_frame")
    (decoded,) = (tmp_path / "again").glob("*_last.png")
    assert (read_image(decoded) == read_image(last)).all()
    make(tmp_path / "plain", *decode)
    assert not list((tmp_path / "plain").glob("*_last.png"))


@pytest.mark.slow
def test_scheduler_is_another_spelling_of_the_solver(scripts: dict[str, Script], tmp_path: Path) -> None:
    make = scripts["hunyuan"].latents
    found = make(tmp_path / "a", "--scheduler", "dpm++")
    assert torch.equal(found, make(tmp_path / "b", "--sample_solver", "dpm++"))
    assert torch.equal(found, make(tmp_path / "c", "--sample_solver", "dpm++", "--scheduler", "dpm++"))
    default = make(tmp_path / "d", "--scheduler", "default")
    assert torch.equal(default, make(tmp_path / "e", "--sample_solver", "vanilla"))
    assert not torch.equal(default, found)
    with pytest.raises(OptionError, match=r"--scheduler dpm\+\+ is --sample_solver dpm\+\+.*vanilla"):
        make(tmp_path / "f", "--scheduler", "dpm++", "--sample_solver", "vanilla")
