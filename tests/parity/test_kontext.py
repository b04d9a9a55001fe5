"""FLUX.1 Kontext through the command line equals diffusers' FluxKontextPipeline.

Both read the same prompts with their own tokenizers and encoders; the start noise is drawn equal.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import flux_kontext_generate_image
from encoders.autoencoder import SCALE, SHIFT
from flux.model import unpack
from tests.parity.test_flux import (
    COLUMNS,
    DRAWN,
    HEIGHT,
    NEGATIVE,
    PROMPT,
    ROWS,
    STEPS,
    WIDTH,
    assert_same,
    pipeline_of,
)
from tests.tiny.flux import TinyFlux, write_tiny_flux
from tests.tiny.project import write_image

SIZE = ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS), "--seed", str(DRAWN)]
OUTPUT = ["--output_type", "latent_images", "--device", "cpu"]
OWN_SIZE = ["--no_resize_control"]
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "text alone": ([], {"guidance_scale": 2.5}),
    "a reference": (["--embedded_cfg_scale", "3", *OWN_SIZE], {"guidance_scale": 3.0}),
    "a reference, with guidance": (
        ["--guidance_scale", "3", "--negative_prompt", NEGATIVE, *OWN_SIZE],
        {"guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": NEGATIVE},
    ),
    "a reference at a trained size": ([], {"guidance_scale": 2.5}),
}


def models_of(models: TinyFlux) -> list[str]:
    """The options that name them."""
    texts = ["--text_encoder1", str(models.t5xxl), "--text_encoder2", str(models.clip_l)]
    return ["--dit", str(models.dit), "--vae", str(models.ae), "--vae_dtype", "float32", *texts]


def theirs(models: TinyFlux, reference: Path | None, resizes: bool, **asked: Any) -> tuple[Tensor, Tensor]:
    """Latents 16 1 h w and the picture H W 3, 0..255, of diffusers' pipeline."""
    pipeline = FluxKontextPipeline(**pipeline_of(models, "dev").components)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, ROWS * COLUMNS, 64, generator=torch.Generator().manual_seed(DRAWN))
    tokens = pipeline(
        image=None if reference is None else Image.open(reference),
        prompt=PROMPT,
        **{"height": HEIGHT, "width": WIDTH, "max_area": HEIGHT * WIDTH, "num_inference_steps": STEPS},
        **{"latents": noise, "output_type": "latent", "_auto_resize": resizes, **asked},
    ).images
    latents = unpack(tokens, ROWS, COLUMNS)
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents[:, :, 0] / SCALE + SHIFT).sample[0]
    return latents[0], (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("size")) for name in CASES]
)
def test_a_picture_equals_that_of_diffusers_pipeline(tmp_path: Path, name: str) -> None:
    words, asked = CASES[name]
    models = write_tiny_flux(tmp_path / "models")
    reference = None if name == "text alone" else tmp_path / "before.png"
    if reference is not None:  # larger than the picture, in another shape
        write_image(reference, 48, 80)
        words = [*words, "--control_image_path", str(reference)]

    options = [*models_of(models), "--prompt", PROMPT, *SIZE, *OUTPUT, *words]
    flux_kontext_generate_image.main([*options, "--save_path", str(tmp_path / "out")])

    assert_same(tmp_path / "out", theirs(models, reference, OWN_SIZE[0] not in words, **asked))
    (latents,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(latents, "pt") as file:
        named = file.metadata().get("bt_control_image_path")
    assert named == (None if reference is None else "before.png")
