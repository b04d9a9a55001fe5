"""Pictures of FLUX.1 and Chroma equal those of diffusers, at the same noise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

import flux_generate_image
import flux_minimal_inference
from encoders.autoencoder import SCALE, SHIFT
from flux.model import unpack
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.encoders.their_t5 import their_t5
from tests.flux.making import in_diffusers
from tests.parity.hunyuan import load_clip
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.tiny import picture_encoders
from tests.tiny.flux import TinyFlux, write_tiny_flux
from tests.tiny.hunyuan_encoders import clip_config_json

PROMPT, NEGATIVE = "a small rabbit runs through the grass", "low quality, blurred"
HEIGHT, WIDTH, STEPS, DRAWN = 48, 64, 3, 11
ROWS, COLUMNS = HEIGHT // 16, WIDTH // 16


def transformer_of(models: TinyFlux, kind: str) -> nn.Module:
    """diffusers' transformer of the same weights.

    Chroma's pipeline gives it the mask as numbers, which attention adds, so that nothing is left out: mended.
    """
    made = in_diffusers(kind, load_file(models.dit))
    if kind == "chroma":
        made.register_forward_pre_hook(
            lambda _, args, given: (args, given | {"attention_mask": given["attention_mask"].bool()}),
            with_kwargs=True,
        )
    return made


def clip_of(models: TinyFlux) -> nn.Module:
    """transformers' CLIP of the same weights, in a folder with the configuration of the released one."""
    assert models.clip_l is not None
    folder = models.clip_l.parent / "clip of transformers"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(clip_config_json()), encoding="utf-8")
    shutil.copy(models.clip_l, folder / "model.safetensors")
    return load_clip(folder)


def pipeline_of(models: TinyFlux, kind: str) -> Any:
    """diffusers' pipeline with the same weights."""
    text_encoder = their_t5(picture_encoders.t5xxl_config(), picture_encoders.t5xxl_tensors())
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    dynamic = {} if kind == "schnell" else {"use_dynamic_shifting": True}
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if kind == "schnell" else 3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        **dynamic,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models.t5xxl.parent / "t5xxl")
    parts = {"scheduler": scheduler, "vae": vae, "transformer": transformer_of(models, kind)}
    if kind == "chroma":
        return ChromaPipeline(**parts, text_encoder=text_encoder, tokenizer=tokenizer)
    return FluxPipeline(
        **parts,
        text_encoder=clip_of(models),
        tokenizer=CLIPTokenizer.from_pretrained(models.dit.parent / "clip_l", model_max_length=77),
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
    )


def theirs(models: TinyFlux, kind: str, **asked: Any) -> tuple[Tensor, Tensor]:
    """Latents 16 1 h w and the picture H W 3, 0..255, of diffusers' pipeline."""
    pipeline = pipeline_of(models, kind)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, ROWS * COLUMNS, 64, generator=torch.Generator().manual_seed(DRAWN))
    shared = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "latents": noise}
    tokens = pipeline(prompt=PROMPT, **shared, output_type="latent", **asked).images
    latents = unpack(tokens, ROWS, COLUMNS)
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents[:, :, 0] / SCALE + SHIFT).sample[0]
    return latents[0], (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255


def assert_same(made: Path, expected: tuple[Tensor, Tensor]) -> None:
    """Latents and picture in a folder."""
    assert_equal(latents_in(made), expected[0], "latents")
    # a rounded level of 255 at most
    assert (picture_in(made) - expected[1]).abs().max() < 0.6


CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "dev": ("dev", ["--embedded_cfg_scale", "2.5"], {"guidance_scale": 2.5}),
    "dev with guidance": (
        "dev",
        ["--guidance_scale", "3", "--negative_prompt", NEGATIVE],
        {"guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": NEGATIVE},
    ),
    "schnell": ("schnell", ["--t5xxl_max_token_length", "256"], {"max_sequence_length": 256}),
    "chroma": (
        "chroma",
        ["--guidance_scale", "4", "--negative_prompt", NEGATIVE],
        {"guidance_scale": 4.0, "negative_prompt": NEGATIVE},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_picture_equals_that_of_diffusers_pipeline(tmp_path: Path, name: str) -> None:
    kind, words, asked = CASES[name]
    models = write_tiny_flux(tmp_path / "models", kind)
    size = ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS), "--seed", str(DRAWN)]
    output = ["--output_type", "latent_images", "--save_path", str(tmp_path / "out"), "--device", "cpu"]

    flux_generate_image.main([*models.models, "--prompt", PROMPT, *size, *output, *words])

    assert_same(tmp_path / "out", theirs(models, kind, **asked))


def test_the_guides_command_makes_the_same_picture(tmp_path: Path) -> None:
    models = write_tiny_flux(tmp_path / "models")
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]
    words += ["--dtype", "float32", "--output_dir", str(tmp_path / "out"), "--guidance", "2.5"]
    # rounded up to whole tokens
    words += ["--height", str(HEIGHT - 3), "--width", str(WIDTH - 15)]

    flux_minimal_inference.main([*words, "--prompt", PROMPT, "--steps", str(STEPS), "--seed", str(DRAWN)])

    _, expected = theirs(models, "dev", guidance_scale=2.5)
    assert (picture_in(tmp_path / "out") - expected).abs().max() < 0.6
