"""TI2V-5B through the command line equals diffusers' pipelines with a time for each token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from modules.media.writing import write_png
from tests.golden_cases import read_case
from tests.parity.reference import KINDS, Sampling, open_image, relative_error, schedule
from tests.parity.running import assert_equal, generate, generate_one
from tests.parity.theirs import Theirs, pad_text
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
