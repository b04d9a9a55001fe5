"""Text-to-video through the command line equals diffusers' transformer, text encoder and solvers at the same
seed.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.messages import succeed_here
from tests.golden_cases import read_case
from tests.parity.reference import Inputs, Sampling, SkippedLayers, denoise, draw_noise
from tests.parity.running import assert_equal, generate, latents_in
from tests.parity.theirs import Theirs
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan

PROMPT = "a small  rabbit wakes up &amp; runs，in the morning light"  # with what text cleaning mends
SEED = 20
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 8
SIZE = ("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]
N = None
FIVE = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models of another user")
    write_tiny_wan(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Theirs:
    return Theirs(folder)


def inputs_of(
    theirs: Theirs, prompt: str = PROMPT, negative: str = NEGATIVE, seed: int = SEED, frames: int = FRAMES
) -> Inputs:
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = draw_noise(seed, frames, HEIGHT, WIDTH, generator)
    texts = theirs.text(prompt), theirs.text(negative)
    return Inputs(noise, *texts, blank=theirs.text(""), generator=generator)


SLG_ORIGINAL = ("--slg_mode", "original", "--slg_layers", "0,1", "--slg_end", 1, "--slg_scale", 2)
CASES = {
    "unipc": ([], Sampling("unipc")),
    "dpm++": (["--sample_solver", "dpm++", "--flow_shift", 3], Sampling("dpm++", 3.0)),
    "dpm++sde": (["--sample_solver", "dpm++sde", "--flow_shift", 3], Sampling("dpm++sde", 3.0)),
    "vanilla": (["--sample_solver", "vanilla", "--flow_shift", 7], Sampling("vanilla", 7.0)),
    "guidance 1": (["--guidance_scale", 1], Sampling("unipc", scales=(N,) * STEPS)),
    "skip early": (
        ["--cfg_skip_mode", "early", "--cfg_apply_ratio", 0.6],
        Sampling(scales=(N,) * 4 + (FIVE,) * 4),
    ),
    "skip alternate": (
        ["--cfg_skip_mode", "alternate", "--cfg_apply_ratio", 0.7],
        Sampling(scales=(N, FIVE, FIVE, N, FIVE, FIVE, N, FIVE)),  # 0.7 a step, applied whenever 1 is reached
    ),
    "schedule": (
        ["--cfg_schedule", "1-3, e~4:2.5, 6:7, !2", "--sample_solver", "vanilla"],
        Sampling("vanilla", scales=(FIVE, N, FIVE, 2.5, N, 7.0, N, 2.5)),
    ),
    "slg uncond": (
        ["--slg_mode", "uncond", "--slg_layers", "1", "--slg_start", 0.1, "--slg_end", 0.7],
        Sampling(skipped=SkippedLayers("uncond", frozenset({1}), start=0.1, end=0.7)),
    ),
    "slg original, dpm++, skipped steps": (
        [*SLG_ORIGINAL, "--cfg_skip_mode", "late", "--cfg_apply_ratio", 0.5, "--sample_solver", "dpm++"],
        Sampling(
            "dpm++",
            scales=(FIVE,) * 4 + (N,) * 4,
            skipped=SkippedLayers("original", frozenset({0, 1}), scale=2.0, end=1.0),
        ),
    ),
    "cfg-zero*": (
        ["--cfgzerostar_scaling", "--cfgzerostar_init_steps", 2],
        Sampling(formula="zero star", factors=(0.0, 0.0)),
    ),
    "cfg-zero* with a factor, dpm++": (
        ["--cfgzerostar_init_steps", 1, "--cfgzerostar_multiplier", 0.5, "--sample_solver", "dpm++"],
        Sampling("dpm++", factors=(0.5,)),
    ),
    "cfg-zero*, slg uncond, first steps without guidance": (
        [
            *("--cfgzerostar_scaling", "--cfgzerostar_init_steps", 2, "--cfgzerostar_multiplier", 2),
            *("--slg_mode", "uncond", "--slg_layers", "1", "--slg_end", 0.5),
            *("--cfg_schedule", "2-8", "--sample_solver", "vanilla"),
        ],
        Sampling(
            "vanilla",
            scales=(N,) + (FIVE,) * 7,
            skipped=SkippedLayers("uncond", frozenset({1}), end=0.5),
            formula="zero star",
            factors=(2.0, 2.0),
        ),
    ),
    "perpendicular negative": (["--perp_neg", 1.5], Sampling(formula="perpendicular", weight=1.5)),
    "perpendicular negative, slg uncond, dpm++": (
        ["--perp_neg", 2, "--slg_mode", "uncond", "--slg_layers", "1", "--sample_solver", "dpm++"],
        Sampling(
            "dpm++", skipped=SkippedLayers("uncond", frozenset({1})), formula="perpendicular", weight=2.0
        ),
    ),
    "comfy rope": (["--rope_func", "comfy"], Sampling()),
}


@pytest.mark.slow_cases(
    "cfg-zero* with a factor, dpm++",
    "cfg-zero*, slg uncond, first steps without guidance",
    "perpendicular negative, slg uncond, dpm++",
    "skip alternate",
)
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_those_of_diffusers(tmp_path: Path, folder: Path, theirs: Theirs, name: str) -> None:
    options, sampling = CASES[name]
    arguments = (*SIZE, "--prompt", PROMPT, "--seed", SEED, *options)

    latents = generate(tmp_path, folder, "t2v-1.3B", *arguments)

    assert_equal(latents, denoise(theirs.dit, inputs_of(theirs), sampling), name)


@pytest.mark.slow
def test_the_tasks_own_number_of_steps_equals_that_of_diffusers(
    tmp_path: Path, folder: Path, theirs: Theirs
) -> None:
    more = ("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--prompt", PROMPT, "--seed", SEED)

    latents = generate(tmp_path, folder, "t2v-1.3B", *more)

    assert_equal(latents, denoise(theirs.dit, inputs_of(theirs), Sampling(scales=(FIVE,) * 50)), "50 steps")


def test_cpu_noise_is_the_stream_of_the_global_generator(
    tmp_path: Path, folder: Path, theirs: Theirs
) -> None:
    torch.manual_seed(SEED)
    noise = torch.randn(16, 3, HEIGHT // 8, WIDTH // 8)
    inputs = Inputs(noise, theirs.text(PROMPT), theirs.text(NEGATIVE))

    latents = generate(tmp_path, folder, "t2v-1.3B", *SIZE, "--prompt", PROMPT, "--seed", SEED, "--cpu_noise")

    assert_equal(latents, denoise(theirs.dit, inputs, Sampling()), "cpu noise")


ASK = (
    *("--prompt", "a red apple", "--seed", 4, "--video_size", 32, 48, "--video_length", 5),
    *("--infer_steps", 3, "--task", "i2v-14B", "--output_type", "latent", "--save_path", "made"),
)


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official files in `models` and those of diffusers in `pipeline`; a start image."""
    folder = tmp_path_factory.mktemp("i2v")
    write_tiny_wan(folder / "models", "i2v")
    write_image(folder / "start.png", 48, 32)
    theirs, pipeline = Theirs(folder / "models"), folder / "pipeline"
    theirs.dit.save_pretrained(pipeline / "transformer", max_shard_size="500KB")
    theirs.vae.save_pretrained(pipeline / "vae")
    theirs.t5.save_pretrained(pipeline / "text_encoder", max_shard_size="20KB")
    theirs.tokenizer.save_pretrained(pipeline / "tokenizer")
    theirs.clip.save_pretrained(pipeline / "image_encoder")
    assert len(list((pipeline / "transformer").glob("*-of-*.safetensors"))) > 1
    return folder


def write_release(folder: Path, models: Path) -> list[object]:
    """Pickled files with the names of the official repository; the options that name them."""
    folder.mkdir()
    names = {"vae": "Wan2.1_VAE.pth", "t5": "models_t5_umt5-xxl-enc-bf16.pth"}
    names["clip"] = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    for part, name in names.items():
        torch.save(load_file(models / f"{part}.safetensors"), folder / name)
    (folder / "google").symlink_to(models / "google")
    shutil.copy(models / "dit.safetensors", folder / "diffusion_pytorch_model.safetensors")
    return ["--ckpt_dir", folder, "--dit", folder]


@pytest.mark.parametrize("layout", ["pipeline", "release"])
def test_folders_of_diffusers_and_of_the_release_give_the_same_latents(
    tmp_path: Path, image_to_video: Path, layout: str
) -> None:
    models, image = image_to_video / "models", ("--image_path", image_to_video / "start.png")
    if layout == "release":
        given = write_release(tmp_path / "Wan2.1", models)
    else:
        parts = {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "clip": "image_encoder"}
        paths = {name: image_to_video / "pipeline" / part for name, part in parts.items()}
        given = [word for name, path in paths.items() for word in (f"--{name}", path)]

    succeed_here("wan_generate_video.py", *given, *ASK, *image, "--device", "cpu", folder=tmp_path)

    expected = generate(tmp_path / "official", models, "i2v-14B", *ASK, *image)
    assert_equal(latents_in(tmp_path / "made"), expected, layout)
