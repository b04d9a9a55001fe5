"""Text-to-video through the command line equals diffusers' transformer, text encoder and solvers at the same
seed.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import run_script
from tests.golden_cases import read_case
from tests.parity.reference import Inputs, Sampling, SkippedLayers, denoise, draw_noise
from tests.parity.running import assert_equal, generate_one
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


CASES = {
    "unipc": ([], Sampling("unipc")),
    "dpm++": (["--sample_solver", "dpm++", "--flow_shift", 3], Sampling("dpm++", 3.0)),
    "dpm++sde": (["--sample_solver", "dpm++sde", "--flow_shift", 3], Sampling("dpm++sde", 3.0)),
    "vanilla": (["--sample_solver", "vanilla", "--flow_shift", 7], Sampling("vanilla", 7.0)),
    "guidance 1": (["--guidance_scale", 1], Sampling("unipc", scales=(N,) * STEPS)),
    "guidance 1 dpm++": (
        ["--sample_solver", "dpm++", "--guidance_scale", 1],
        Sampling("dpm++", scales=(N,) * STEPS),
    ),
    "guidance 1 vanilla": (
        ["--sample_solver", "vanilla", "--guidance_scale", 1],
        Sampling("vanilla", scales=(N,) * STEPS),
    ),
    "skip early": (
        ["--cfg_skip_mode", "early", "--cfg_apply_ratio", 0.6],
        Sampling(scales=(N,) * 4 + (FIVE,) * 4),
    ),
    "skip late": (
        ["--cfg_skip_mode", "late", "--cfg_apply_ratio", 0.6],
        Sampling(scales=(FIVE,) * 4 + (N,) * 4),
    ),
    "skip middle": (
        ["--cfg_skip_mode", "middle", "--cfg_apply_ratio", 0.4],
        Sampling(scales=(FIVE, N, N, N, N, N, FIVE, FIVE)),  # 5 skipped steps from (8 - 5) // 2
    ),
    "skip early_late": (
        ["--cfg_skip_mode", "early_late", "--cfg_apply_ratio", 0.4],
        Sampling(scales=(N, N, FIVE, FIVE, FIVE, N, N, N)),  # 3 kept steps from (8 - 3) // 2
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
    "slg original": (
        ["--slg_mode", "original", "--slg_layers", "0", "--slg_scale", 2],
        Sampling(skipped=SkippedLayers("original", frozenset({0}), scale=2.0)),
    ),
    "slg original, dpm++, skipped steps": (
        [
            *("--slg_mode", "original", "--slg_layers", "0,1", "--slg_end", 1, "--cfg_skip_mode", "late"),
            *("--cfg_apply_ratio", 0.5),
        ]
        + ["--sample_solver", "dpm++"],
        Sampling(
            "dpm++",
            scales=(FIVE,) * 4 + (N,) * 4,
            skipped=SkippedLayers("original", frozenset({0, 1}), end=1.0),
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
    "cfg-zero*, slg original": (
        ["--cfgzerostar_scaling", "--slg_mode", "original", "--slg_layers", "0"],
        Sampling(skipped=SkippedLayers("original", frozenset({0})), formula="zero star"),
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
AS_PROGRAMS = {"unipc", "dpm++", "skip alternate"}  # the others run in this process, to save time


@pytest.mark.parametrize("name", CASES)
def test_latents_equal_those_of_diffusers(tmp_path: Path, folder: Path, theirs: Theirs, name: str) -> None:
    options, sampling = CASES[name]
    arguments = (*SIZE, "--prompt", PROMPT, "--seed", SEED, *options)

    latents = generate_one(tmp_path, folder, "t2v-1.3B", *arguments, in_process=name not in AS_PROGRAMS)

    assert_equal(latents, denoise(theirs.dit, inputs_of(theirs), sampling), name)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "vanilla"])
def test_the_tasks_own_number_of_steps_equals_that_of_diffusers(
    tmp_path: Path, folder: Path, theirs: Theirs, solver: str
) -> None:
    more = (
        *("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--sample_solver", solver),
        *("--prompt", PROMPT, "--seed", SEED),
    )

    latents = generate_one(tmp_path, folder, "t2v-1.3B", *more)

    assert_equal(
        latents, denoise(theirs.dit, inputs_of(theirs), Sampling(solver, scales=(FIVE,) * 50)), f"{solver} 50"
    )


def test_cpu_noise_is_the_stream_of_the_global_generator(
    tmp_path: Path, folder: Path, theirs: Theirs
) -> None:
    torch.manual_seed(SEED)
    noise = torch.randn(16, 3, HEIGHT // 8, WIDTH // 8)
    inputs = Inputs(noise, theirs.text(PROMPT), theirs.text(NEGATIVE))

    latents = generate_one(
        tmp_path,
        folder,
        "t2v-1.3B",
        *SIZE,
        *("--prompt", PROMPT, "--seed", SEED, "--cpu_noise"),
        in_process=True,
    )

    assert_equal(latents, denoise(theirs.dit, inputs, Sampling()), "cpu noise")


ASK = (
    *("--prompt", "a red apple", "--seed", 4, "--video_size", 32, 48, "--video_length", 5),
    *("--infer_steps", 3),
)
TASKS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with the official files in `models` and those of diffusers in `pipeline`."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder = tmp_path_factory.mktemp(kind)
            write_tiny_wan(folder / "models", kind)
            write_image(folder / "start.png", 48, 32)
            theirs, pipeline = Theirs(folder / "models"), folder / "pipeline"
            theirs.dit.save_pretrained(pipeline / "transformer", max_shard_size="500KB")
            theirs.vae.save_pretrained(pipeline / "vae")
            theirs.t5.save_pretrained(pipeline / "text_encoder", max_shard_size="20KB")
            theirs.tokenizer.save_pretrained(pipeline / "tokenizer")
            theirs.clip.save_pretrained(pipeline / "image_encoder")
        return made[kind]

    return folder_of


@pytest.mark.parametrize("kind", TASKS)
def test_a_pipeline_of_diffusers_gives_the_same_latents(
    tmp_path: Path, folders: Callable[[str], Path], kind: str
) -> None:
    folder = folders(kind)
    image = ["--image_path", folder / "start.png"] if kind == "i2v" else []
    parts = {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "clip": "image_encoder"}
    given = [word for name, part in parts.items() for word in (f"--{name}", folder / "pipeline" / part)]
    options = ["--task", TASKS[kind], "--save_path", "made", "--output_type", "latent", "--device", "cpu"]
    assert len(list((folder / "pipeline" / "transformer").glob("*-of-*.safetensors"))) > 1

    run_script("wan_generate_video.py", *given, *options, *ASK, *image, folder=tmp_path)

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    expected = generate_one(
        tmp_path / "official", folder / "models", TASKS[kind], *ASK, *image, in_process=True
    )
    assert_equal(load_file(path)["latent"], expected, f"{kind} from diffusers' folders")


def test_a_release_folder_needs_no_other_option(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """--ckpt_dir with the names of the official repository; pickled files."""
    folder = folders("i2v")
    release = tmp_path / "Wan2.1"
    release.mkdir()
    names = {"vae": "Wan2.1_VAE.pth", "t5": "models_t5_umt5-xxl-enc-bf16.pth"}
    names["clip"] = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    for part, name in names.items():
        torch.save(load_file(folder / "models" / f"{part}.safetensors"), release / name)
    (release / "google").symlink_to(folder / "models" / "google")
    save_file(
        load_file(folder / "models" / "dit.safetensors"), release / "diffusion_pytorch_model.safetensors"
    )
    options = [
        *("--ckpt_dir", release, "--dit", release, "--task", "i2v-14B", "--save_path", "made"),
        *("--output_type", "latent"),
    ]
    image = ["--image_path", folder / "start.png"]

    run_script("wan_generate_video.py", *options, *ASK, *image, "--device", "cpu", folder=tmp_path)

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    expected = generate_one(
        tmp_path / "official", folder / "models", "i2v-14B", *ASK, *image, in_process=True
    )
    assert_equal(load_file(path)["latent"], expected, "release folder")
