"""FLUX.2 through the command line equals diffusers' whole pipelines.

Both read the same prompts with their own tokenizers and encoders.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import flux_2_generate_image
from tests.flux_2.making import autoencoder_in_diffusers, in_diffusers
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.tiny.flux_2 import (
    TEXT_LAYERS,
    TinyFlux2,
    write_tiny_flux_2,
)
from tests.tiny.language_models import QWEN3_TEMPLATE, mistral3, qwen3
from tests.tiny.project import write_image

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS = 48, 80, 4
RATE = 20.0
# of the release's scheduler_config.json
SCHEDULER = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "max_shift": 1.15}
MISTRAL_TEMPLATE = """<s>{%- for message in messages %}
    {%- set text = message.content[0].text %}
    {%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}
    {{- '[' + mark + ']' + text + '[/' + mark + ']' }}
{%- endfor %}"""
SIZE = ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS), "--seed", str(SEED)]
OUTPUT = ["--output_type", "latent_images", "--device", "cpu", "--vae_dtype", "float32"]


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> TinyFlux2:
    return write_tiny_flux_2(tmp_path_factory.mktemp("models"))


def theirs(files: TinyFlux2, is_distilled: bool = False) -> Any:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    is_dev = files.version == "dev"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<pad>" if is_dev else "<|endoftext|>",
        padding_side="left" if is_dev else "right",
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE if is_dev else QWEN3_TEMPLATE
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        "vae": autoencoder_in_diffusers(load_file(files.vae)),
        "text_encoder": mistral3(TEXT_LAYERS["dev"]) if is_dev else qwen3(TEXT_LAYERS["klein"]),
        "tokenizer": tokenizer,
        "transformer": in_diffusers(load_file(files.dit)),
    }
    pipe = Flux2Pipeline(**parts) if is_dev else Flux2KleinPipeline(**parts, is_distilled=is_distilled)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoised(pipe: Any, found: Tensor) -> Tensor:
    """Latents as the transformer sees them, 128 1 h w, of what a pipeline returns: of dev tokens B L 128, of
    klein 1 32 2h 2w, which are those of the autoencoder.
    """
    if found.ndim == 3:
        return found[0].T.unflatten(1, (1, HEIGHT // 16, WIDTH // 16))
    (packed,) = pipe._patchify_latents(found)
    return ((packed - mean_of(pipe)) / deviation_of(pipe)).unsqueeze(1)


def mean_of(pipe: Any) -> Tensor:
    return pipe.vae.bn.running_mean[:, None, None]  # type: ignore[no-any-return]


def deviation_of(pipe: Any) -> Tensor:
    return (pipe.vae.bn.running_var[:, None, None] + 1e-4).sqrt()  # type: ignore[no-any-return]


def picture_of(pipe: Any, latents: Tensor) -> Tensor:
    """The picture of 128 1 h w with diffusers' autoencoder, H W 3, 0..255."""
    own = pipe._unpatchify_latents((latents[:, 0] * deviation_of(pipe) + mean_of(pipe))[None])
    pixels: Tensor = pipe.vae.decode(own).sample[0]
    return (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255


def references_in(folder: Path) -> list[Path]:
    """Two pictures of sizes of their own, neither of them a multiple of 16."""
    paths = [folder / "one.png", folder / "two.png"]
    for path, size in zip(paths, ((75, 90), (110, 66)), strict=True):
        write_image(path, *size)
    return paths


GUIDED = ["--guidance_scale", "3", "--negative_prompt", " "]
# options, version, number of references, what the pipeline is asked
CASES: dict[str, tuple[list[str], str, int, dict[str, Any]]] = {
    "text alone, guided": ([*GUIDED], "klein-base-4b", 0, {"guidance_scale": 3.0}),
    "two references, guided": ([*GUIDED], "klein-base-4b", 2, {"guidance_scale": 3.0}),
    "distilled": (["--guidance_scale", "4"], "klein-9b", 1, {"guidance_scale": 4.0}),
    "dev": (["--embedded_cfg_scale", "2.5"], "dev", 0, {"guidance_scale": 2.5}),
    "dev with two references": ([], "dev", 2, {"guidance_scale": 4.0}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "dev")) for name in CASES]
)
@torch.no_grad()
def test_a_picture_equals_that_of_diffusers_pipeline(klein: TinyFlux2, tmp_path: Path, name: str) -> None:
    words, version, count, asked = CASES[name]
    files = write_tiny_flux_2(tmp_path / "models", "dev") if version == "dev" else klein
    references = references_in(tmp_path)[:count]
    words = [*words, *(["--control_image_path", *map(str, references)] if references else [])]

    options = [*files.models[:-1], version, "--prompt", PROMPT, *SIZE, *OUTPUT, *words]
    flux_2_generate_image.main([*options, "--save_path", str(tmp_path / "made")])

    pipe = theirs(files, is_distilled=version == "klein-9b")
    if version == "klein-base-4b":  # it knows no negative prompt but ""
        negative, _ = pipe.encode_prompt(" ")
        asked = {**asked, "negative_prompt_embeds": negative}
    found = pipe(
        **{"image": [Image.open(path) for path in references] or None, "prompt": PROMPT},
        **{"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **asked},
        **{"output_type": "latent", "generator": torch.Generator().manual_seed(SEED)},
    ).images
    expected = denoised(pipe, found)
    assert_equal(latents_in(tmp_path / "made"), expected, f"{name}, latents")
    levels = picture_in(tmp_path / "made")
    assert (levels - picture_of(pipe, expected)).abs().max() < 0.6  # a rounded level of 255 at most
