"""Pictures and steps of training of FLUX.1 and Chroma equal those of diffusers, at the same noise."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ChromaPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

import flux_generate_image
import flux_minimal_inference
from encoders.autoencoder import SCALE, SHIFT
from flux.model import unpack
from modules.media.reading import read_image
from tests.encoders.their_t5 import their_t5
from tests.faults.messages import succeed_here
from tests.flux.making import in_diffusers, run_there
from tests.parity import training
from tests.parity.hunyuan import load_clip
from tests.parity.running import assert_equal
from tests.tiny import picture_encoders
from tests.tiny.families import family_called
from tests.tiny.flux import TinyFlux, diffusers_parts, write_tiny_flux
from tests.tiny.hunyuan_encoders import clip_config_json
from tests.tiny.project import write_plain_pictures

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
    levels = picture_encoders.autoencoder_config()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        latent_channels=levels.latent_channels,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    ).eval()
    vae.load_state_dict(picture_encoders.autoencoder_diffusers(picture_encoders.autoencoder_tensors()))
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


def ours(folder: Path) -> tuple[Tensor, Tensor]:
    (latents,), (picture,) = folder.glob("*.safetensors"), folder.glob("*.png")
    return load_file(latents)["latent"], torch.from_numpy(read_image(picture)).float()


def assert_same(made: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_equal(made[0], expected[0], "latents")
    # a rounded level of 255 at most
    assert (made[1] - expected[1]).abs().max() < 0.6


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

    assert_same(ours(tmp_path / "out"), theirs(models, kind, **asked))


def test_the_guides_command_makes_the_same_picture(tmp_path: Path) -> None:
    models = write_tiny_flux(tmp_path / "models")
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]
    words += ["--dtype", "float32", "--output_dir", str(tmp_path / "out"), "--guidance", "2.5"]
    # rounded up to whole tokens
    words += ["--height", str(HEIGHT - 3), "--width", str(WIDTH - 15)]

    flux_minimal_inference.main([*words, "--prompt", PROMPT, "--steps", str(STEPS), "--seed", str(DRAWN)])

    (picture,) = (tmp_path / "out").glob("????????_??????.png")
    _, expected = theirs(models, "dev", guidance_scale=2.5)
    assert (torch.from_numpy(read_image(picture)).float() - expected).abs().max() < 0.6


RATE, GUIDANCE = 0.5, 2.5


@dataclass(frozen=True)
class FluxItem(training.Item):
    """text: T5's states."""

    mask: Tensor = torch.zeros(0)
    pooled: Tensor | None = None


def read_items(folder: Path) -> list[FluxItem]:
    """What the caches hold, sorted by name."""
    items = []
    for path in sorted(folder.glob("*_flux.safetensors")):
        (latents,) = (value for name, value in load_file(path).items() if name.startswith("latents"))
        texts = load_file(folder / f"{path.name.partition('_')[0]}_flux_te.safetensors")
        found = {name.removesuffix("_float32"): value for name, value in texts.items()}
        items.append(
            FluxItem(latents, found["t5_out"], mask=found["t5_attn_mask"], pooled=found.get("l_pooled"))
        )
    return items


def by_size(batch: Sequence[training.Item], number: int) -> Tensor:
    """Noise levels of --timestep_sampling flux_shift."""
    rows, columns = batch[0].latents.shape[-2:]
    ratio = training.ratio_of((rows // 2) * (columns // 2))
    return training.shifted(training.normal_share(batch, number), ratio)


def gradients_of(
    dit: nn.Module,
    parts: dict[str, list[str]],
    factors: training.Factors,
    batch: list[FluxItem],
    number: int,
    kind: str,
) -> training.Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every part."""
    sigmas = by_size(batch, number)
    noisy, wanted = training.mixed(batch, number, sigmas)
    inputs: dict[str, Any] = {
        "noisy": noisy,
        "timesteps": 1000 * sigmas,
        "t5": torch.stack([item.text for item in batch]),
        # without --apply_t5_attn_mask FLUX sees the padding
        "t5_mask": torch.stack([item.mask for item in batch]) if kind == "chroma" else None,
        "pooled": None if kind == "chroma" else torch.stack([item.pooled for item in batch]),  # type: ignore[misc]
        "guidance": torch.full((len(batch),), GUIDANCE),
    }
    with training.learning(dit, parts, factors) as found:
        velocity = torch.cat([run_there(dit, inputs, sample) for sample in range(len(batch))])
        (velocity - wanted).square().mean().backward()
    return found()


@pytest.mark.parametrize(("name", "kind"), [("flux", "dev"), ("chroma", "chroma")])
def test_each_step_follows_diffusers_gradient(tmp_path: Path, name: str, kind: str) -> None:
    family = family_called(name)
    family.prepare(tmp_path)
    write_plain_pictures(tmp_path, batch_size=4)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    times = ("--timestep_sampling", "flux_shift", "--guidance_scale", GUIDANCE)

    succeed_here(*family.train, *training.descent(RATE), *times, folder=tmp_path)

    dit_file = tmp_path / "model" / "dit.safetensors"
    dit, parts = in_diffusers(kind, load_file(dit_file)), training.parts_of(dit_file, diffusers_parts)
    items = read_items(tmp_path / "cache")

    def gradients_at(factors: training.Factors, step: int) -> training.Factors:
        return gradients_of(dit, parts, factors, training.shuffled(items, step), step, kind)

    training.assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, name)
