"""TI2V-5B, first and last images and other conditions of Wan equal diffusers' pipelines."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.reference import (
    KINDS,
    Inputs,
    Sampling,
    denoise,
    draw_noise,
    open_image,
    relative_error,
    schedule,
    to_pixels,
)
from tests.parity.running import assert_equal, decoded, generate, generate_one
from tests.parity.theirs import Theirs, pad_text
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import CONFIGS
from tests.tiny.wan_encoders import vae_diffusers_tensors
from tests.wan.making import in_diffusers
from wan.configs import WAN_2_2

PROMPT, SEED, FRAMES, STEPS = "close up of a butterfly", 31, 9, 4
HEIGHT, WIDTH = 64, 96
OPTIONS = (
    *("--prompt", PROMPT, "--seed", SEED, "--infer_steps", STEPS),
    *("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES),
)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]
# float32: measured at most 3e-6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a ti2v model")
    write_tiny_wan(folder, "ti2v")
    return folder


def write_picture(path: Path, height: int, width: int) -> Path:
    random = numpy.random.default_rng(height)
    write_png(path, random.integers(0, 256, (height, width, 3), dtype=numpy.uint8))
    return path


def our_grid(solver: str) -> Any:
    """Their scheduler on the noise levels of the released code."""
    sampling = Sampling(solver, scales=(5.0,) * STEPS)
    sigmas, timesteps = schedule(sampling)
    kind, algorithm = KINDS[solver]

    class OnOurs(kind):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **named: Any) -> None:
            super().set_timesteps(STEPS)
            self.sigmas, self.timesteps = sigmas, torch.tensor(timesteps).long()

    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
    return OnOurs(solver_order=2, **algorithm, **settings)


def their_vae(folder: Path) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=list(WAN_2_2.mean),
        latents_std=list(WAN_2_2.std),
    )
    vae.load_state_dict(vae_diffusers_tensors(load_file(folder / "vae.safetensors")))
    return vae.eval().requires_grad_(False)


def their_video(
    folder: Path, image: Image.Image | None = None, solver: str = "unipc", output: str = "latent"
) -> Any:
    """What their pipeline makes: latents C F h w, or frames F H W 3 in 0..1."""
    texts = Theirs(folder)
    dit = in_diffusers(CONFIGS["ti2v"], load_file(folder / "dit.safetensors"))
    parts: Mapping[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": their_vae(folder),
        "scheduler": our_grid(solver),
        "transformer": dit,
        "expand_timesteps": True,
    }
    height, width = (HEIGHT, WIDTH) if image is None else (image.height, image.width)
    noise = torch.randn(
        (48, (FRAMES - 1) // 4 + 1, height // 16, width // 16), generator=torch.Generator().manual_seed(SEED)
    )
    given = {
        "prompt_embeds": pad_text(texts.text(PROMPT)),
        "negative_prompt_embeds": pad_text(texts.text(NEGATIVE)),
        "latents": noise[None],
        **{"height": height, "width": width, "num_frames": FRAMES, "num_inference_steps": STEPS},
        **{"guidance_scale": 5.0, "output_type": output},
    }
    kind = WanPipeline if image is None else WanImageToVideoPipeline
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**given, **({} if image is None else {"image": image})).frames
    return made[0]


def test_text_to_video(tmp_path: Path, models: Path) -> None:
    latents = generate_one(tmp_path, models, "ti2v-5B", *OPTIONS)

    assert_equal(latents, their_video(models), "ti2v", TOLERANCE)


@pytest.mark.parametrize("solver", ["unipc", pytest.param("dpm++", marks=pytest.mark.slow)])
def test_image_to_video(tmp_path: Path, models: Path, solver: str) -> None:
    path = write_picture(tmp_path / "start.png", HEIGHT, WIDTH)
    more = ("--image_path", path, "--sample_solver", solver)

    latents = generate_one(tmp_path, models, "ti2v-5B", *OPTIONS, *more, in_process=True)

    expected = their_video(models, Image.open(path), solver)
    assert_equal(latents, expected, f"ti2v image {solver}", TOLERANCE)
    assert relative_error(latents, their_video(models, solver=solver)) > 0.1


@pytest.mark.parametrize(
    ("height", "width", "made"), [(90, 60, (96, 64)), pytest.param(30, 80, (32, 128), marks=pytest.mark.slow)]
)
def test_an_image_of_another_size_is_scaled_to_cover_and_cropped(
    tmp_path: Path, models: Path, height: int, width: int, made: tuple[int, int]
) -> None:
    """LANCZOS also where it shrinks. made: height and width of at most 64 x 96 pixels, as the released code
    chooses them.
    """
    path = write_picture(tmp_path / "start.png", height, width)

    latents = generate_one(tmp_path, models, "ti2v-5B", *OPTIONS, "--image_path", path, in_process=True)

    scale = max(made[0] / height, made[1] / width)
    size = round(width * scale), round(height * scale)
    image = Image.fromarray(open_image(path)).resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - made[1]) // 2, (image.height - made[0]) // 2
    image = image.crop((left, top, left + made[1], top + made[0]))
    assert_equal(latents, their_video(models, image), f"ti2v {height} x {width}", TOLERANCE)


@pytest.mark.parametrize("with_image", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_frames_are_theirs(tmp_path: Path, models: Path, with_image: bool) -> None:
    path = write_picture(tmp_path / "start.png", HEIGHT, WIDTH) if with_image else None
    more = () if path is None else ("--image_path", path)

    generate(tmp_path, models, "ti2v-5B", *OPTIONS, *more, output="images", in_process=True)

    files = sorted((tmp_path / "made").glob("*/*.png"))
    ours = torch.stack([torch.from_numpy(open_image(file).copy()) for file in files])
    image = None if path is None else Image.open(path)
    expected: Tensor = torch.as_tensor(their_video(models, image, output="np")) * 255
    assert ours.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert (ours - expected).abs().max() < 0.51 + 255 * TOLERANCE  # rounded to whole levels


HIGH, WIDE = 32, 64  # asked for; images set the aspect
CONDITIONED = (
    *("--prompt", PROMPT, "--seed", SEED, "--video_size", HIGH, WIDE, "--video_length", FRAMES),
    *("--infer_steps", STEPS),
)
SAMPLING = Sampling(scales=(5.0,) * STEPS)
FIRST_LAST_SHIFT = 16.0  # what these models are sampled with, by the released code


def picture(height: int, width: int, seed: int) -> numpy.ndarray:
    """A picture with detail at every scale, so that each way to resize gives other pixels."""
    random = numpy.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes, a control video larger than asked for and one as a folder of images."""
    folder = tmp_path_factory.mktemp("media")
    for name, height, width in (("high", 90, 60), ("small", 24, 20), ("wide", 40, 100), ("exact", 32, 64)):
        write_png(folder / f"{name}.png", picture(height, width, height))
    write_video(folder / "control.mp4", moving_square(15, 96, 80, 3), fps=16)
    (folder / "control").mkdir()
    for index in range(FRAMES):
        write_png(folder / "control" / f"{index:03d}.png", picture(20, 40, index))
    return folder


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with tiny models of it, written once."""
    root, written = tmp_path_factory.mktemp("models"), set[str]()

    def folder_of(kind: str) -> Path:
        if kind not in written:
            write_tiny_wan(root / kind, kind)
            written.add(kind)
        return root / kind

    return folder_of


def texts(theirs: Theirs, negative: str = NEGATIVE) -> tuple[Tensor, Tensor]:
    return theirs.text(PROMPT), theirs.text(negative)


def resized(path: Path, height: int, width: int) -> Tensor:
    return to_pixels([reference.stretched(open_image(path), height, width)])


@pytest.mark.parametrize(
    ("image", "in_process"), [("high", False), ("small", True), ("wide", True), ("exact", True)]
)
def test_image_to_video_of_every_kind(
    tmp_path: Path, media: Path, models_of: Callable[[str], Path], image: str, in_process: bool
) -> None:
    path = media / f"{image}.png"

    latents = generate_one(
        tmp_path, models_of("i2v"), "i2v-14B", *CONDITIONED, "--image_path", path, in_process=in_process
    )

    theirs = Theirs(models_of("i2v"))
    height, width = reference.video_size_for(open_image(path), HIGH, WIDE)
    condition = reference.image_condition(theirs, resized(path, height, width), FRAMES)
    clip = reference.features_of(theirs, open_image(path))
    inputs = Inputs(draw_noise(SEED, FRAMES, height, width), *texts(theirs), clip, condition)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v {image} {height}x{width}")


def test_image_to_video_with_an_end_image(
    tmp_path: Path, media: Path, models_of: Callable[[str], Path]
) -> None:
    """One more latent frame, of noise too; the image tower sees the start image only."""
    start, end = media / "high.png", media / "wide.png"

    latents = generate_one(
        tmp_path, models_of("i2v"), "i2v-14B", *CONDITIONED, "--image_path", start, "--end_image_path", end
    )

    theirs = Theirs(models_of("i2v"))
    height, width = reference.video_size_for(open_image(start), HIGH, WIDE)
    first, last = resized(start, height, width), resized(end, height, width)
    condition = reference.image_condition(theirs, first, FRAMES, last)
    noise = draw_noise(SEED, FRAMES + 4, height, width)
    inputs = Inputs(noise, *texts(theirs), reference.features_of(theirs, open_image(start)), condition)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), "i2v with end image")


@pytest.mark.parametrize("solver", ["unipc", pytest.param("dpm++", marks=pytest.mark.slow)])
def test_first_and_last_image(
    tmp_path: Path, media: Path, models_of: Callable[[str], Path], solver: str
) -> None:
    """514 image tokens with positions; both images in one clip; the negative text of these models names cuts
    first.
    """
    start, end = media / "high.png", media / "wide.png"
    more = ("--image_path", start, "--end_image_path", end, "--sample_solver", solver)

    latents = generate_one(tmp_path, models_of("flf2v"), "flf2v-14B", *CONDITIONED, *more)

    theirs = Theirs(models_of("flf2v"))
    height, width = reference.video_size_for(open_image(start), HIGH, WIDE)
    condition = reference.first_last_condition(
        theirs, resized(start, height, width), resized(end, height, width), FRAMES
    )
    clip = reference.features_of(theirs, open_image(start), open_image(end))
    noise = draw_noise(SEED, FRAMES, height, width)
    inputs = Inputs(noise, *texts(theirs, "镜头切换，" + NEGATIVE), clip, condition)
    assert_equal(
        latents, denoise(theirs.dit, inputs, Sampling(solver, FIRST_LAST_SHIFT, SAMPLING.scales)), "flf2v"
    )


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("control", "in_process"), [("control.mp4", False), ("control", True)])
def test_control_without_an_image(
    tmp_path: Path, media: Path, models_of: Callable[[str], Path], control: str, in_process: bool
) -> None:
    """The image channels are zero, and so are the features of the image tower."""
    more = ("--control_path", media / control)

    latents = generate_one(
        tmp_path, models_of("fun-control"), "t2v-1.3B-FC", *CONDITIONED, *more, in_process=in_process
    )

    theirs = Theirs(models_of("fun-control"))
    if control == "control":
        frames = [open_image(path) for path in sorted((media / control).iterdir())]
    else:
        frames = decoded(media / "control.mp4")[:FRAMES]
    pixels = to_pixels([reference.covering(frame, HIGH, WIDE) for frame in frames])
    extra = reference.control_condition(theirs, pixels, None)
    zeros = torch.zeros(1, 257, theirs.dit.config.image_dim)
    inputs = Inputs(draw_noise(SEED, FRAMES, HIGH, WIDE), *texts(theirs), zeros, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"t2v-FC {control}")


@pytest.mark.parametrize(("with_end", "control_frames"), [(False, FRAMES), (True, FRAMES + 1), (True, 15)])
def test_control_with_an_image(
    tmp_path: Path, media: Path, models_of: Callable[[str], Path], with_end: bool, control_frames: int
) -> None:
    """Of the image's latents only the first frame is kept, and the end image's; no mask. The model's ref_conv
    is not used.

    An end image takes four frames more, of which the control video needs to have one.
    """
    start, end, control = media / "high.png", media / "small.png", tmp_path / "control"
    control.mkdir()
    frames = decoded(media / "control.mp4")[:control_frames]
    for index, frame in enumerate(frames):
        write_png(control / f"{index:03d}.png", frame)
    more = [
        *("--image_path", start, "--control_path", control),
        *(["--end_image_path", end] if with_end else []),
    ]

    latents = generate_one(
        tmp_path, models_of("fun-control-v1.1"), "i2v-14B-FC", *CONDITIONED, *more, in_process=with_end
    )

    theirs = Theirs(models_of("fun-control-v1.1"))
    height, width = reference.video_size_for(open_image(start), HIGH, WIDE)
    length = FRAMES + 4 * with_end
    last = resized(end, height, width) if with_end else None
    image = reference.image_condition(theirs, resized(start, height, width), FRAMES, last)[4:]
    followed = [reference.covering(frame, height, width) for frame in [*frames, *[frames[-1]] * 3][:length]]
    extra = reference.control_condition(theirs, to_pixels(followed), image, with_end)
    clip = reference.features_of(theirs, open_image(start))
    inputs = Inputs(draw_noise(SEED, length, height, width), *texts(theirs), clip, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v-FC end {with_end}")


def test_the_pipelines_of_diffusers_make_the_same_conditions(
    media: Path, models_of: Callable[[str], Path]
) -> None:
    """The formulas of reference.py against the ones diffusers runs itself."""
    from diffusers import WanImageToVideoPipeline

    theirs = Theirs(models_of("i2v"))
    pipeline = WanImageToVideoPipeline(None, None, theirs.vae, None)
    first, last = (resized(media / f"{name}.png", 48, 32) for name in ("high", "wide"))
    size = {"height": 48, "width": 32, "num_frames": FRAMES, "dtype": torch.float32}

    _, one = pipeline.prepare_latents(first[:, :, 0], 1, **size)
    _, two = pipeline.prepare_latents(first[:, :, 0], 1, **size, last_image=last[:, :, 0])

    assert_equal(reference.image_condition(theirs, first, FRAMES), one[0], "pipeline i2v")
    assert_equal(reference.first_last_condition(theirs, first, last, FRAMES), two[0], "pipeline flf2v")
