"""Clips of HunyuanVideo 1.5 equal those of diffusers' pipelines, and each of many mistakes would show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, SiglipImageProcessor

from hunyuan_video_15.configs import nearest_size
from tests.faults.messages import run_here, succeed_here
from tests.hunyuan_video_15.making import in_diffusers, vae_in_diffusers
from tests.parity.framepack import load_siglip
from tests.parity.hunyuan_image import glyph_encoder
from tests.parity.pipelines import quiet
from tests.parity.reference import relative_error
from tests.parity.running import assert_equal, latents_in
from tests.tiny.hunyuan_video_15 import TinyHunyuanVideo15, write_tiny_hunyuan_video_15
from tests.tiny.language_models import QWEN3_TEMPLATE, qwen25_vl
from tests.tiny.project import write_image

PROMPT = 'a small rabbit says "hello" and \u201cgoodbye\u201d, then "hello"'
NEGATIVE, SEED, STEPS, GUIDANCE = "low quality, blurred", 20, 3, 6.0
HEIGHT, WIDTH, FRAMES, SHIFT = 32, 64, 9, 7.0
SIDE = 48  # of a square with the area of these clips
TOLERANCE = 1e-4
FAR = 1e-3  # ten times the tolerance: the least that a mistake of those below changes


def pipe_of(files: TinyHunyuanVideo15, task: str, shift: float = SHIFT) -> Any:
    """diffusers' pipeline of a task, with the weights that our script gets."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(files.text_encoder)
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "right"
    tokenizer.chat_template = QWEN3_TEMPLATE
    parts = {
        "transformer": in_diffusers(load_file(files.dit)),
        "vae": vae_in_diffusers({name: load_file(files.vae)[name] for name in load_file(files.vae)}),
        "text_encoder": qwen25_vl().model.language_model,
        "tokenizer": tokenizer,
        "text_encoder_2": glyph_encoder(files.byt5),
        "tokenizer_2": ByT5Tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "guider": ClassifierFreeGuidance(guidance_scale=GUIDANCE),
    }
    if task == "t2v":
        return quiet(HunyuanVideo15Pipeline(**parts))
    siglip = load_siglip(files.image_encoder)
    size = siglip.config.image_size
    feature_extractor = SiglipImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    pipe = HunyuanVideo15ImageToVideoPipeline(
        **parts, image_encoder=siglip, feature_extractor=feature_extractor
    )
    pipe.target_size = SIDE
    return quiet(pipe)


@torch.no_grad()
def made_there(pipe: Any, **more: Any) -> Tensor:
    """Latents C F h w of a request."""
    options = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "latent",
        "return_dict": False,
        **more,
    }
    if "image" not in options:
        options |= {"height": HEIGHT, "width": WIDTH}
    (latents,) = pipe(**options)
    return latents[0]


def made_here(folder: Path, files: TinyHunyuanVideo15, *more: object) -> Tensor:
    options = [*files.models, "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    options += ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", SEED, "--infer_steps", STEPS]
    options += ["--video_length", FRAMES, "--flow_shift", SHIFT, "--device", "cpu"]
    options += ["--save_path", "made", "--output_type", "latent", *more]
    succeed_here("hv_1_5_generate_video.py", *options, folder=folder)
    return latents_in(folder / "made")


SIZE = ("--video_size", HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanVideo15:
    return write_tiny_hunyuan_video_15(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def expected(files: TinyHunyuanVideo15) -> Tensor:
    """What the pipeline makes from text."""
    return made_there(pipe_of(files, "t2v"))


def test_a_clip_equals_the_pipelines(tmp_path: Path, files: TinyHunyuanVideo15, expected: Tensor) -> None:
    assert_equal(made_here(tmp_path, files, *SIZE), expected, "t2v", TOLERANCE)


def test_a_clip_without_guidance_and_quotes_equals_the_pipelines(
    tmp_path: Path, files: TinyHunyuanVideo15
) -> None:
    pipe = pipe_of(files, "t2v", 5.0)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)

    made = made_here(
        tmp_path,
        files,
        *SIZE,
        "--guidance_scale",
        1,
        "--flow_shift",
        5,
        "--prompt",
        "a rabbit",
        "--task",
        "t2v",
    )

    assert_equal(made, made_there(pipe, prompt="a rabbit"), "plain", TOLERANCE)


def test_an_empty_negative_prompt_is_a_blank(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    made = made_here(tmp_path, files, *SIZE, "--negative_prompt", "")

    there = made_there(pipe_of(files, "t2v"), negative_prompt=None)
    assert_equal(made, there, "empty", TOLERANCE)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A first frame of the size of the clip, so that no filter shrinks it."""
    write_image(tmp_path / "start.png", WIDTH, HEIGHT)
    return tmp_path / "start.png"


def test_a_clip_from_an_image_equals_the_pipelines(
    tmp_path: Path, files: TinyHunyuanVideo15, start: Path
) -> None:
    """Without --task, as an image is given."""
    assert nearest_size(WIDTH, HEIGHT, SIDE) == (WIDTH, HEIGHT)

    made = made_here(tmp_path, files, *SIZE, "--image_path", start, "--image_encoder", files.image_encoder)

    there = made_there(pipe_of(files, "i2v"), image=Image.open(start))
    assert_equal(made, there, "i2v", TOLERANCE)


def test_the_task_decides_whether_an_image_counts(
    tmp_path: Path, files: TinyHunyuanVideo15, start: Path, expected: Tensor
) -> None:
    options = (*SIZE, "--task", "t2v", "--image_path", start, "--image_encoder", files.image_encoder)

    assert_equal(made_here(tmp_path, files, *options), expected, "t2v with an image", TOLERANCE)


def test_an_image_without_its_encoder_is_refused(
    tmp_path: Path, files: TinyHunyuanVideo15, start: Path
) -> None:
    options = [*files.models, "--prompt", "a cat", "--save_path", "made", "--image_path", start]

    code, said = run_here("hv_1_5_generate_video.py", *options, folder=tmp_path)

    assert code
    assert "--image_encoder" in said


def other_state(pipe: Any) -> None:
    encode = pipe._get_mllm_prompt_embeds
    pipe._get_mllm_prompt_embeds = lambda **given: encode(**given, num_hidden_layers_to_skip=1)


def message_on_lines(pipe: Any) -> None:
    pipe.system_message = pipe.system_message.replace(" " * 9, "\n")


def other_cut(tokens: int) -> Callable[[Any], None]:
    def cut(pipe: Any) -> None:
        pipe.prompt_template_encode_start_idx += tokens

    return cut


def no_glyphs(pipe: Any) -> None:
    encode = pipe._get_byt5_prompt_embeds

    def without(**given: Any) -> Any:
        states, mask = encode(**given)
        return states, torch.zeros_like(mask)

    pipe._get_byt5_prompt_embeds = without


def image_of_small_numbers(pipe: Any) -> None:
    forward = pipe.transformer.forward

    def faint(**given: Any) -> Any:
        return forward(**{**given, "image_embeds": given["image_embeds"] + 1e-6})

    pipe.transformer.forward = faint


def time_from_0_to_1(pipe: Any) -> None:
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **given: forward(**{**given, "timestep": given["timestep"] / 1000})


def shift_5(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)


def guidance_of_5(pipe: Any) -> None:
    pipe.guider = ClassifierFreeGuidance(guidance_scale=5.0)


MISTAKES: dict[str, Callable[[Any], None]] = {
    "the state before the last layer": other_state,
    "the points of the message on lines of their own": message_on_lines,
    "one token fewer cut": other_cut(-1),
    "one token more cut": other_cut(1),
    "no glyphs": no_glyphs,
    "an image of small numbers": image_of_small_numbers,
    "time from 0 to 1": time_from_0_to_1,
    "a shift of 5": shift_5,
    "a guidance of 5": guidance_of_5,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(files: TinyHunyuanVideo15, expected: Tensor, name: str) -> None:
    pipe = pipe_of(files, "t2v")
    MISTAKES[name](pipe)

    assert relative_error(made_there(pipe), expected) > FAR, name
