"""Guidance, speed switches and solvers of every family: what they change in latents, and what they cost."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.errors import OptionError
from modules.media.reading import read_image, read_tags
from modules.media.writing import write_video
from tests.generation.guided import STEPS, Script, is_finite, latents_in, per_step, write_scripts
from tests.tiny.families import FAMILIES, ONE_OF_EACH, TinyFamily, write_for_anywhere
from tests.tiny.project import moving_square

GUIDED = ("wan", "hunyuan", "framepack")
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


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_no_bit(
    tmp_path: Path, scripts: dict[str, Script], plain: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    latents, calls = scripts[kind].run(tmp_path, *NEUTRAL[name])
    assert torch.equal(latents[1], plain[kind])
    assert per_step(calls) == PLAIN


@pytest.mark.parametrize("kind", GUIDED)
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


SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--seed", "1"]
CAT = ("--prompt", "a cat")


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=lambda one: one.name)
def float32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose commands name whole paths."""
    family: TinyFamily = request.param
    return write_for_anywhere(family, tmp_path_factory.mktemp("project"))


def rewritten(family: TinyFamily, name: str, mixed: bool = False) -> TinyFamily:
    """The family with its transformer's weights in bfloat16; mixed: only the matrices of blocks."""
    place = family.generate.index("--dit") + 1
    tensors = load_file(family.generate[place])
    path = Path(family.generate[place]).with_name(f"{name}.safetensors")
    save_file(
        {
            key: tensor.bfloat16() if not mixed or ("blocks." in key and tensor.ndim == 2) else tensor
            for key, tensor in tensors.items()
        },
        path,
    )
    words = [*family.generate]
    words[place] = str(path)
    return replace(family, generate=words)


@pytest.fixture(scope="module")
def bfloat16(float32: TinyFamily) -> TinyFamily:
    return rewritten(float32, "bfloat16")


def run(family: TinyFamily, folder: Path, *more: str) -> Path:
    words = [*family.generate, *SIZE, "--save_path", str(folder), *more]
    importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
    return folder


def latents(family: TinyFamily, folder: Path, *more: str) -> Tensor:
    (path,) = run(family, folder, *CAT, "--output_type", "latent", *more).glob("*_latent.safetensors")
    return load_file(path)["latent"]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_upcast_linear_computes_fp8_layers_in_float32(bfloat16: TinyFamily, tmp_path: Path) -> None:
    """The formula of a layer is in tests/modules/fp8/test_weights.py; here it arrives in the script."""
    scaled = latents(bfloat16, tmp_path / "scaled", "--fp8_scaled")
    wide = latents(bfloat16, tmp_path / "wide", "--fp8_scaled", "--upcast_linear")
    assert 1e-6 < apart(wide, scaled) < 0.05


def test_upcast_linear_without_fp8_is_an_error_in_every_script(float32: TinyFamily, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--upcast_linear needs --fp8_scaled"):
        run(float32, tmp_path, *CAT, "--upcast_linear")
    assert not list(tmp_path.iterdir())


def test_the_last_frame_of_a_video_and_of_decoded_latents(float32: TinyFamily, tmp_path: Path) -> None:
    folder = run(
        float32, tmp_path / "made", *CAT, "--output_type", "both", "--save_last_frame", "--keep_pngs"
    )
    (video,), (last,), (latent,) = (
        [*folder.glob(kind)] for kind in ("*.mp4", "*_last.png", "*_latent.safetensors")
    )
    assert last.name == f"{video.stem}_last.png"
    frames = sorted((folder / "frames").iterdir())
    assert (read_image(last) == read_image(frames[-1])).all()
    assert read_tags(last) == read_tags(frames[-1])

    again = run(float32, tmp_path / "again", "--latent_path", str(latent), "--save_last_frame")
    (decoded,) = again.glob("*_last.png")
    assert (read_image(decoded) == read_image(last)).all()
    plain = run(float32, tmp_path / "plain", "--latent_path", str(latent))
    assert not list(plain.glob("*_last.png"))


NOISY = ("lcm", "dpm++sde")


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=lambda one: one.name)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    family: TinyFamily = request.param
    return write_for_anywhere(family, tmp_path_factory.mktemp("project"))


def made_by(family: TinyFamily, folder: Path, *more: object) -> dict[int, Tensor]:
    """Return the latents of a generation, by seed."""
    words = ("--infer_steps", 3, "--output_type", "latent", *more)
    return latents_in(run(family, folder, *map(str, words)))


def single(family: TinyFamily, folder: Path, solver: str, seed: int, prompt: str = "a cat") -> Tensor:
    more = ("--prompt", prompt, "--seed", seed, "--sample_solver", solver)
    return made_by(family, folder / f"{solver}-{seed}", *more)[seed]


@pytest.mark.parametrize("solver", NOISY)
def test_lines_of_a_file_and_of_the_console_equal_single_runs(
    project: TinyFamily, solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "a cat --d 1\na dog --d 2\n"
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
    alone = single(project, tmp_path, solver, 1), single(project, tmp_path, solver, 2, "a dog")

    of_file = made_by(
        project, tmp_path / "file", "--from_file", tmp_path / "lines.txt", "--sample_solver", solver
    )
    typed = iter(lines.splitlines())

    def answer(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)
    of_console = made_by(project, tmp_path / "console", "--interactive", "--sample_solver", solver)

    for found in (of_file, of_console):
        assert torch.equal(found[1], alone[0])
        assert torch.equal(found[2], alone[1])


def hunyuan() -> TinyFamily:
    return next(one for one in FAMILIES if one.name == "hunyuan_video")


@pytest.fixture(scope="module")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan")
    hunyuan().prepare(folder)
    write_video(folder / "clip.mp4", moving_square(5, 32, 32, 1), fps=24)
    return folder


@pytest.mark.parametrize(
    ("name", "solver"), [("default", "vanilla"), ("dpm++", "dpm++"), ("dpm++sde", "dpm++sde")]
)
def test_scheduler_is_another_spelling(
    hunyuan_folder: Path, name: str, solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hunyuan_folder)
    say = ("--prompt", "a cat", "--seed", 1)
    found = made_by(hunyuan(), tmp_path / "a", *say, "--scheduler", name)[1]
    assert torch.equal(found, made_by(hunyuan(), tmp_path / "b", *say, "--sample_solver", solver)[1])
    both = made_by(hunyuan(), tmp_path / "c", *say, "--sample_solver", solver, "--scheduler", name)
    assert torch.equal(found, both[1])


@pytest.mark.parametrize("solver", ["vanilla", "unipc"])
def test_two_spellings_that_differ_are_refused(solver: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"--scheduler dpm\+\+ is --sample_solver dpm\+\+.*{solver}"):
        made_by(hunyuan(), tmp_path, "--prompt", "p", "--scheduler", "dpm++", "--sample_solver", solver)
