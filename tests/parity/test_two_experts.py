"""Wan2.2 A14B through the command line equals diffusers' pipelines with two transformers, in float32 latents.

1e-5 of the largest value: both compute the same sums in float32. A step by the wrong transformer, or with the
guidance of the other, is seen a hundred times over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.parity import reference
from tests.parity.projects import Project, train, write_project
from tests.parity.reference import (
    ReleasedUniPC,
    Sampling,
    draw_noise,
    open_image,
    relative_error,
    schedule,
    to_pixels,
)
from tests.parity.running import TOLERANCE, assert_equal, decoded, generate
from tests.parity.test_training import (
    DESCENT,
    RATE,
    Batches,
    assert_steps,
    by_sigma,
    draw,
    mean_gradients,
    single_items,
)
from tests.parity.theirs import Theirs, load_dit
from tests.parity.training import Factors, assert_descent, linear_modules, read_factors
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

PROMPT, NEGATIVE, SEED = "a red apple rolls &amp; stops", "dull, blurry", 31
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 5, 4
ASK: list[object] = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", SEED]
ASK += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS]
EXACT = 1e-5
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """kind -> a folder with tiny models of it, two transformers among them, and pictures."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(kind: str) -> Path:
        if not (root / kind).exists():
            write_tiny_wan(root / kind, kind, experts=2)
            random = numpy.random.default_rng(7)
            for name in ("start.png", "end.png"):
                write_png(root / kind / name, random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8))
            write_video(root / kind / "control.mp4", moving_square(FRAMES, WIDTH, HEIGHT, 3), fps=16)
        return root / kind

    return folder_of


def two(folder: Path) -> list[object]:
    """The option of the second transformer."""
    return ["--dit_high_noise", folder / "dit_high.safetensors"]


def in_diffusers(
    folder: Path, boundary: float | None, shift: float, guidance: tuple[float, float], **images: Image.Image
) -> Tensor:
    """Latents of diffusers' pipeline. guidance: for much and for little noise; boundary None: one expert."""
    theirs = Theirs(folder)
    scheduler = ReleasedUniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    kind: Any = WanImageToVideoPipeline if images else WanPipeline
    low, high = theirs.dit, load_dit(folder / "dit_high.safetensors")
    experts = {"transformer": low} if boundary is None else {"transformer": high, "transformer_2": low}
    more = {"image_encoder": None, "image_processor": None} if images else {}
    parts = {"tokenizer": theirs.tokenizer, "text_encoder": theirs.t5, "vae": theirs.vae, **experts, **more}
    pipeline = kind(**parts, scheduler=scheduler, boundary_ratio=boundary)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        **images,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=guidance[0],
        guidance_scale_2=None if boundary is None else guidance[1],
        latents=draw_noise(SEED, FRAMES, HEIGHT, WIDTH)[None],
        output_type="latent",
    )
    latents: Tensor = made.frames[0]
    return latents


def test_text_to_video_with_the_tasks_own_settings(tmp_path: Path, folders: Folders) -> None:
    folder = folders("t2v")

    latents = generate(tmp_path, folder, "t2v-A14B", *ASK, *two(folder))

    expected = in_diffusers(folder, 0.875, 12.0, (4.0, 3.0))
    assert_equal(latents, expected, "t2v-A14B", EXACT)
    swapped = in_diffusers(folder, 0.875, 12.0, (3.0, 4.0))
    assert relative_error(swapped, expected) > 100 * EXACT, "the comparison sees whose guidance is whose"


@pytest.mark.parametrize("above", [0, 1])
def test_a_timestep_at_the_boundary_belongs_to_the_expert_for_much_noise(
    tmp_path: Path, folders: Folders, above: int
) -> None:
    folder = folders("t2v")
    _, timesteps = schedule(Sampling(flow_shift=5.0, scales=(None,) * STEPS))
    boundary = int(timesteps[2]) + above
    assert boundary / 1000 * 1000 == boundary
    options = ["--timestep_boundary", boundary, "--flow_shift", 5, "--guidance_scale", 2.5]
    options += ["--guidance_scale_high_noise", 6]

    latents = generate(tmp_path, folder, "t2v-A14B", *ASK, *two(folder), *options)

    expected = in_diffusers(folder, boundary / 1000, 5.0, (6.0, 2.5))
    assert_equal(latents, expected, f"boundary {boundary}", EXACT)
    other = in_diffusers(folder, (boundary + 1 - 2 * above) / 1000, 5.0, (6.0, 2.5))
    assert relative_error(other, expected) > 100 * EXACT, "one step more is seen"


def test_one_transformer_alone_does_all_steps(tmp_path: Path, folders: Folders) -> None:
    folder = folders("t2v")

    latents = generate(tmp_path, folder, "t2v-A14B", *ASK)

    assert_equal(latents, in_diffusers(folder, None, 12.0, (3.0, 3.0)), "the low one alone", EXACT)


@pytest.mark.parametrize("end", [False, True])
def test_image_to_video_takes_no_image_encoder(
    tmp_path: Path, folders: Folders, end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """--clip, which `generate` gives, is ignored with a warning."""
    folder = folders("i2v-2.2")
    images = {"image": "start.png"} | ({"last_image": "end.png"} if end else {})
    given = ["--image_path", folder / "start.png"] + (["--end_image_path", folder / "end.png"] if end else [])

    latents = generate(tmp_path, folder, "i2v-A14B", *ASK, *two(folder), *given)

    opened = {name: Image.open(folder / path) for name, path in images.items()}
    expected = in_diffusers(folder, 0.9, 5.0, (3.5, 3.5), **opened)
    assert_equal(latents, expected, f"i2v-A14B, end image: {end}", EXACT)
    assert "--task i2v-A14B takes no image features" in caplog.text


@pytest.mark.parametrize("task", ["t2v-A14B-FC", "i2v-A14B-FC"])
def test_fun_control_takes_control_mask_and_image_in_this_order(
    tmp_path: Path, folders: Folders, task: str
) -> None:
    """No pipeline of diffusers has it: its transformers and solver, with the channels of VideoX-Fun."""
    folder, theirs = folders("fun-control-2.2"), Theirs(folders("fun-control-2.2"))
    given = ["--control_path", folder / "control.mp4"]
    given += ["--image_path", folder / "start.png"] if task.startswith("i2v") else []

    latents = generate(tmp_path, folder, task, *ASK, *two(folder), *given)

    control = theirs.encode(control_pixels(folder / "control.mp4"))[0]
    image = torch.zeros(20, *control.shape[1:])
    if task.startswith("i2v"):
        image = reference.image_condition(theirs, to_pixels([open_image(folder / "start.png")]), FRAMES)
    inputs = reference.Inputs(
        draw_noise(SEED, FRAMES, HEIGHT, WIDTH),
        theirs.text(PROMPT),
        theirs.text(NEGATIVE),
        extra=torch.cat([control, image]),
    )
    sampling = Sampling(scales=(6.0,) * STEPS)
    experts = load_dit(folder / "dit_high.safetensors"), theirs.dit
    solver, expected = reference.TheirSolver(sampling), inputs.noise
    for step, timestep in enumerate(solver.timesteps):
        dit = experts[timestep < 900]
        velocity = reference.guided(dit, expected, timestep, step, inputs, sampling)
        expected = solver.step(step, velocity, expected)
    assert {timestep < 900 for timestep in solver.timesteps} == {True, False}
    assert_equal(latents, expected, task, EXACT)


def control_pixels(path: Path) -> Tensor:
    """The frames of a video of the right size and length, 1 3 F H W in -1..1."""
    return to_pixels(decoded(path)[:FRAMES])


BOUNDARY = 600
BOTH = ("--task", "t2v-A14B", "--timestep_boundary", BOUNDARY / 1000)
UPDATES = 3


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = write_project(tmp_path / "a project", "t2v", count=4, batch_size=1)
    write_dit(made.models, tiny_state("t2v", seed=9), name="dit_high")
    return made


def batches_by_step(project: Project) -> list[Batches]:
    """Two micro-batches of one item to a step."""
    order = [item for epoch in (0, 1) for item in single_items(project, epoch)]
    pairs = [[2 * step, 2 * step + 1] for step in range(UPDATES)]
    return [[([order[number]], draw([order[number]], number, by_sigma)) for number in pair] for pair in pairs]


def is_high(timesteps: Tensor) -> bool:
    return bool(timesteps[0] >= BOUNDARY)


def expert_options(project: Project) -> list[object]:
    high = project.models / "dit_high.safetensors"
    return [*BOTH, "--dit_high_noise", high, "--gradient_accumulation_steps", 2]


def network_at(project: Project) -> Callable[[Tensor], Any]:
    low, high = load_dit(project.dit), load_dit(project.models / "dit_high.safetensors")
    return lambda timesteps: high if is_high(timesteps) else low


def test_steps_in_two_transformers_equal_gradient_descent_with_diffusers(project: Project) -> None:
    steps = batches_by_step(project)
    sides = [[is_high(drawn.timesteps) for _, drawn in step] for step in steps]
    assert [True, False] in [sorted(pair, reverse=True) for pair in sides]  # both work in one step

    files = train(project, *DESCENT, *expert_options(project), steps=UPDATES)

    assert_steps(files, project, network_at(project), lambda step: steps[step], "two experts")
    with safe_open(files[-1], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_wan_expert"] == "both"
    assert metadata["ss_sd_model_name"] == "dit.safetensors"
    assert metadata["ss_sd_model_name_high_noise"] == "dit_high.safetensors"


def test_a_network_for_each_transformer_learns_from_its_micro_batches_alone(project: Project) -> None:
    """Each file is compared with descent on the gradients of its side, divided by both micro-batches."""
    steps, network, modules = batches_by_step(project), network_at(project), linear_modules(project.dit)
    files = train(project, *DESCENT, *expert_options(project), "--lora_per_expert", steps=UPDATES)

    for part, side in (("low_noise", False), ("high_noise", True)):
        own = [path.with_name(f"{path.stem}_{part}.safetensors") for path in files]

        def gradients_at(factors: Factors, step: int, side: bool = side) -> Factors:
            batches = [batch for batch in steps[step] if is_high(batch[1].timesteps) == side]
            if not batches:
                return {}
            share, gradients = len(batches) / 2, mean_gradients(network, modules, factors, batches)
            return {name: (share * down, share * up) for name, (down, up) in gradients.items()}

        assert_descent(own, modules, RATE, gradients_at, part, TOLERANCE)
        with safe_open(own[-1], "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_wan_expert"] == part.removesuffix("_noise")
        assert metadata["ss_sd_model_name"] == f"dit{'_high' * side}.safetensors"


def test_the_high_noise_transformer_alone_is_trained_on_its_timesteps(project: Project) -> None:
    """It equals training the same file as --dit with a window."""
    high = project.models / "dit_high.safetensors"
    shared = [*DESCENT, *BOTH, "--timestep_sampling", "uniform"]
    window = ["--min_timestep", BOUNDARY, "--preserve_distribution_shape"]
    alone = train(project, *shared, name="a", dits=["--dit_high_noise", high])
    as_only = train(project, *shared, *window, name="b", dits=["--dit", high])
    first, second = (read_factors(files[-1])[0] for files in (alone, as_only))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name][part], second[name][part]) for name in first for part in (0, 1))
    for files in (alone, as_only):
        with safe_open(files[-1], "pt") as file:
            assert file.metadata()["ss_wan_expert"] == "high"
