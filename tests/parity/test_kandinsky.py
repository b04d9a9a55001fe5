"""Clips and images of Kandinsky 5 equal those of diffusers' pipelines, except where these differ from the
maker's code: the spelling of the template and its length, the grid of the steps, the factor of positions at
small sizes, and queries that are rounded to bfloat16. Each of these would show.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from encoders.autoencoder import load_autoencoder
from kandinsky.text_encoders import CLIP_SETTINGS, IMAGE_SETTINGS
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.faults.messages import succeed_here
from tests.kandinsky.making import network_of
from tests.parity.hunyuan import load_clip, load_vae
from tests.parity.pipelines import quiet
from tests.parity.reference import relative_error
from tests.parity.running import assert_equal, latents_in
from tests.tiny.kandinsky import TinyKandinsky, write_tiny_kandinsky
from tests.tiny.language_models import qwen25_vl
from tests.tiny.picture_encoders import write_autoencoder
from tests.tiny.project import write_image

PROMPT, NEGATIVE, SEED, STEPS = "a small rabbit runs through the grass", "low quality, blurred", 20, 3
HEIGHT, WIDTH, FRAMES = 32, 48, 21
TOLERANCE = 1e-4
FAR = 1e-3  # ten times the tolerance: the least that a mistake of those below changes


class MakersGrid(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """The maker's steps: evenly from 1 to 0, then shifted. diffusers shifts the smallest level twice."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(
            sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device
        )


class Reader:
    """The tokenizer as the pipelines call their processor."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tokenizer.pad_token = "<|endoftext|>"

    def __call__(self, text: list[str], images: None, videos: None, **more: Any) -> Any:
        return self.tokenizer(text, **more)


def pipe_of(files: TinyKandinsky, task: str, flow_shift: float, scale: float | None = None) -> Any:
    """diffusers' pipeline of a task with the maker's template and steps. scale: of positions."""
    kind = {"t2v": Kandinsky5T2VPipeline, "i2v": Kandinsky5I2VPipeline, "t2i": Kandinsky5T2IPipeline}[task]
    if task == "t2i":
        vae = diffusers_autoencoder()
        vae.register_to_config(scaling_factor=0.3611)
    else:
        vae = load_vae(files.vae)
    pipe = kind(
        transformer=network_of(load_file(files.dit)),
        vae=vae,
        text_encoder=qwen25_vl(),
        tokenizer=Reader(files.qwen),
        text_encoder_2=load_clip(files.clip),
        tokenizer_2=CLIPTokenizer.from_pretrained(files.clip),
        scheduler=MakersGrid(shift=flow_shift),
    )
    settings = IMAGE_SETTINGS if task == "t2i" else CLIP_SETTINGS
    pipe.prompt_template = settings.template
    pipe.prompt_template_encode_start_idx = settings.num_dropped_tokens
    if scale is not None:
        pipe._get_scale_factor = lambda height, width: (1.0, scale, scale)
    return quiet(pipe)


@torch.no_grad()
def made_there(pipe: Any, **more: Any) -> Tensor:
    """Latents C F h w of a request."""
    options = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "latent",
        "return_dict": False,
        **more,
    }
    (latents,) = pipe(**options)
    return latents[0].permute(3, 0, 1, 2)


def made_here(folder: Path, files: TinyKandinsky, task: str, *more: object) -> Tensor:
    options = ["--task", task, *files.models, "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    options += ["--prompt", PROMPT, "--seed", SEED, "--infer_steps", STEPS, "--device", "cpu"]
    options += ["--save_path", "made", "--output_type", "latent", *more]
    succeed_here("kandinsky_generate_video.py", *options, folder=folder)
    return latents_in(folder / "made")


SIZE = ("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--negative_prompt", NEGATIVE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyKandinsky:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("kandinsky"))


@pytest.fixture(scope="module")
def expected(files: TinyKandinsky) -> Tensor:
    """What the pipeline makes from text, with the maker's settings."""
    return made_there(pipe_of(files, "t2v", 10.0, 2.0), num_frames=FRAMES)


def test_a_clip_equals_the_pipelines(tmp_path: Path, files: TinyKandinsky, expected: Tensor) -> None:
    made = made_here(tmp_path, files, "k5-lite-t2v-5s-sd", *SIZE)

    assert_equal(made, expected, "kandinsky t2v", TOLERANCE)


def test_a_clip_in_hd_equals_the_pipelines(tmp_path: Path, files: TinyKandinsky) -> None:
    """diffusers guesses the factor 3.16 from such a size by itself."""
    made = made_here(tmp_path, files, "k5-pro-t2v-5s-hd", *SIZE)

    assert_equal(made, made_there(pipe_of(files, "t2v", 10.0), num_frames=FRAMES), "hd", TOLERANCE)


def test_a_clip_without_guidance_equals_the_pipelines(tmp_path: Path, files: TinyKandinsky) -> None:
    made = made_here(tmp_path, files, "k5-lite-t2v-5s-sd", *SIZE, "--guidance_scale", 1, "--flow_shift", 5)

    there = made_there(pipe_of(files, "t2v", 5.0, 2.0), num_frames=FRAMES, guidance_scale=1.0)
    assert_equal(made, there, "no guidance", TOLERANCE)


def other_template(pipe: Any) -> None:
    pipe.prompt_template = pipe.prompt_template.replace("promt", "prompt")


def other_cut(tokens: int) -> Callable[[Any], None]:
    def cut(pipe: Any) -> None:
        pipe.prompt_template_encode_start_idx += tokens

    return cut


def other_state(index: int | str) -> Callable[[Any], None]:
    def read(pipe: Any) -> None:
        encoder = pipe.text_encoder
        run = encoder.forward

        def forward(**inputs: Any) -> Any:
            if index == "before the norm":
                encoder.model.language_model.norm = torch.nn.Identity()
                return run(**inputs)
            found = run(**inputs)
            return {"hidden_states": (*found["hidden_states"][:-1], found["hidden_states"][index])}

        encoder.forward = forward

    return read


def no_clip(pipe: Any) -> None:
    encode = pipe.encode_prompt

    def without(**inputs: Any) -> Any:
        states, pooled, lengths = encode(**inputs)
        return states, torch.zeros_like(pooled), lengths

    pipe.encode_prompt = without


def image_template(pipe: Any) -> None:
    pipe.prompt_template = IMAGE_SETTINGS.template
    pipe.prompt_template_encode_start_idx = IMAGE_SETTINGS.num_dropped_tokens


def own_grid(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=10.0)


def shift_5(pipe: Any) -> None:
    pipe.scheduler = MakersGrid(shift=5.0)


def channels_first(pipe: Any) -> None:
    shape = (1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).permute(0, 2, 3, 4, 1)
    prepare = pipe.prepare_latents

    def prepared(*inputs: Any) -> Tensor:
        latents: Tensor = prepare(*inputs)
        latents[..., :16] = noise
        return latents

    pipe.prepare_latents = prepared


def factor(scale: float) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        pipe._get_scale_factor = lambda height, width: (1.0, scale, scale)

    return change


MISTAKES: dict[str, Callable[[Any], None]] = {
    "noise with channels first": channels_first,
    "the factor of HD": factor(3.16),
    "no factor": factor(1.0),
    "the state before the norm": other_state("before the norm"),
    "the state before the last layer": other_state(-2),
    "the template of images": image_template,
    "the right spelling": other_template,
    "one token fewer cut": other_cut(-1),
    "one token more cut": other_cut(1),
    "no CLIP": no_clip,
    "a shift of 5": shift_5,
    "diffusers' grid": own_grid,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(files: TinyKandinsky, expected: Tensor, name: str) -> None:
    pipe = pipe_of(files, "t2v", 10.0, 2.0)
    MISTAKES[name](pipe)

    assert relative_error(made_there(pipe, num_frames=FRAMES), expected) > FAR, name


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines draw from the posterior of an image; here its mean is taken."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


@pytest.mark.usefixtures("modes")
@pytest.mark.parametrize("frames", [FRAMES, 41])
def test_a_clip_from_an_image_equals_the_pipelines(tmp_path: Path, files: TinyKandinsky, frames: int) -> None:
    path = tmp_path / "start.png"
    write_image(path, WIDTH, HEIGHT)
    pipe = pipe_of(files, "i2v", 10.0, 2.0)

    made = made_here(
        *(tmp_path, files, "k5-lite-i2v-5s-sd", "--image_path", path),
        *("--video_size", HEIGHT, WIDTH, "--video_length", frames, "--negative_prompt", NEGATIVE),
    )

    there = made_there(pipe, num_frames=frames, image=Image.open(path))
    assert_equal(made, there, "i2v", TOLERANCE)
    pipe.normalize_first_frame = lambda latents: latents
    uncorrected = made_there(pipe, num_frames=frames, image=Image.open(path))
    assert relative_error(uncorrected, there) > FAR


@pytest.mark.usefixtures("modes")
def test_a_short_clip_from_an_image_keeps_its_first_frames(tmp_path: Path, files: TinyKandinsky) -> None:
    """diffusers would return NaN, as no frame follows the first four."""
    path = tmp_path / "start.png"
    write_image(path, WIDTH, HEIGHT)
    pipe = pipe_of(files, "i2v", 10.0, 2.0)
    pipe.normalize_first_frame = lambda latents: latents

    made = made_here(
        *(tmp_path, files, "k5-lite-i2v-5s-sd", "--image_path", path),
        *("--video_size", HEIGHT, WIDTH, "--video_length", 9, "--negative_prompt", NEGATIVE),
    )

    there = made_there(pipe, num_frames=9, image=Image.open(path))
    assert_equal(made, there, "short", TOLERANCE)


def test_an_image_equals_the_pipelines(tmp_path: Path) -> None:
    """At one of the seven sizes that the pipeline makes; another factor than FLUX.1's shift would show."""
    files = write_tiny_kandinsky(tmp_path / "model", "image", num_layers=1, text_layers=1)
    size = {"height": 1408, "width": 640}

    made = made_here(
        *(tmp_path, files, "k5-lite-t2i-hd", "--video_size", 1408, 640, "--infer_steps", 2),
        *("--negative_prompt", NEGATIVE, "--guidance_scale", 5),
    )

    there = made_there(pipe_of(files, "t2i", 3.0), **size, num_inference_steps=2)
    assert_equal(made, there, "t2i", TOLERANCE)


def test_latents_of_an_image_are_scaled_without_a_shift(tmp_path: Path) -> None:
    """As the pipelines decode and encode: those of FLUX.1 are other numbers."""
    path = write_autoencoder(tmp_path / "ae.safetensors")
    theirs, pixels = diffusers_autoencoder(), torch.rand(1, 3, 1, 32, 48) * 2 - 1
    latents = 0.3611 * theirs.encode(pixels[:, :, 0]).latent_dist.mean.unsqueeze(2)

    ours = load_autoencoder(path, torch.device("cpu"), torch.float32, shift=0.0)

    assert_equal(ours.encode(pixels), latents, "encoded", TOLERANCE)
    expected = theirs.decode(latents[:, :, 0] / 0.3611).sample.clamp(-1, 1)
    assert_equal(ours.decode(latents)[:, :, 0], expected, "decoded", TOLERANCE)
