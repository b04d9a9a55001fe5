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
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.parity import reference
from tests.parity.datasets import decoded
from tests.parity.reference import Sampling, draw_noise, open_image, relative_error, schedule, to_pixels
from tests.parity.running import assert_equal, generate_one
from tests.parity.theirs import Theirs, load_dit
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan

PROMPT, NEGATIVE, SEED = "a red apple rolls &amp; stops", "dull, blurry", 31
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 5, 4
ASK: list[object] = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", SEED]
ASK += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS]
EXACT = 1e-5
Folders = Callable[[str], Path]


class ReleasedUniPC(UniPCMultistepScheduler):
    """diffusers' solver on the sigmas of the released code, which end before 0 and not at 1 / 1000."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        sampling = Sampling(flow_shift=self.config.flow_shift, scales=(None,) * num_inference_steps)
        self.sigmas, timesteps = schedule(sampling)
        self.timesteps = torch.tensor(timesteps).long()


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

    latents = generate_one(tmp_path, folder, "t2v-A14B", *ASK, *two(folder), in_process=True)

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

    latents = generate_one(tmp_path, folder, "t2v-A14B", *ASK, *two(folder), *options, in_process=True)

    expected = in_diffusers(folder, boundary / 1000, 5.0, (6.0, 2.5))
    assert_equal(latents, expected, f"boundary {boundary}", EXACT)
    other = in_diffusers(folder, (boundary + 1 - 2 * above) / 1000, 5.0, (6.0, 2.5))
    assert relative_error(other, expected) > 100 * EXACT, "one step more is seen"


def test_one_transformer_alone_does_all_steps(tmp_path: Path, folders: Folders) -> None:
    folder = folders("t2v")

    latents = generate_one(tmp_path, folder, "t2v-A14B", *ASK, in_process=True)

    assert_equal(latents, in_diffusers(folder, None, 12.0, (3.0, 3.0)), "the low one alone", EXACT)


@pytest.mark.parametrize("end", [False, True])
def test_image_to_video_takes_no_image_encoder(
    tmp_path: Path, folders: Folders, end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """--clip, which `generate_one` gives, is ignored with a warning."""
    folder = folders("i2v-2.2")
    images = {"image": "start.png"} | ({"last_image": "end.png"} if end else {})
    given = ["--image_path", folder / "start.png"] + (["--end_image_path", folder / "end.png"] if end else [])

    latents = generate_one(tmp_path, folder, "i2v-A14B", *ASK, *two(folder), *given, in_process=True)

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

    latents = generate_one(tmp_path, folder, task, *ASK, *two(folder), *given, in_process=True)

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
