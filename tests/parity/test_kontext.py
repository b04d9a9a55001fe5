"""FLUX.1 Kontext through the command line equals diffusers' FluxKontextPipeline; so do two training steps.

Both read the same prompts with their own tokenizers and encoders; the start noise is drawn equal.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import flux_kontext_generate_image
from encoders.autoencoder import SCALE, SHIFT
from flux.model import unpack
from networks.convert import convert_file
from tests.faults.messages import succeed_here
from tests.flux.making import in_diffusers, run_there
from tests.parity.test_flux import (
    COLUMNS,
    DRAWN,
    GUIDANCE,
    HEIGHT,
    NEGATIVE,
    PROMPT,
    RATE,
    ROWS,
    STEPS,
    WIDTH,
    assert_same,
    by_size,
    ours,
    pipeline_of,
)
from tests.parity.training import (
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    parts_of,
    shuffled,
)
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.flux import TinyFlux, diffusers_parts, write_tiny_flux
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


def theirs(
    models: TinyFlux, reference: Path | None, resizes: bool, lora: Path | None = None, **asked: Any
) -> tuple[Tensor, Tensor]:
    """Latents 16 1 h w and the picture H W 3, 0..255, of diffusers' pipeline."""
    pipeline = FluxKontextPipeline(**pipeline_of(models, "dev").components)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.transformer.load_lora_adapter(load_file(lora), prefix="transformer")
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

    assert_same(ours(tmp_path / "out"), theirs(models, reference, OWN_SIZE[0] not in words, **asked))


def read_items(folder: Path) -> list[Item]:
    """What the caches hold, sorted by name; clip: CLIP's pooled state, extra: the reference's latents."""
    items = []
    for path in sorted(folder.glob("*_fk.safetensors")):
        latents, texts = (
            load_file(path),
            load_file(folder / f"{path.name.partition('_')[0]}_fk_te.safetensors"),
        )
        (control,) = (name for name in latents if name.startswith("latents_control_1x"))
        (target,) = latents.keys() - {control}
        items.append(
            Item(
                latents[target].unsqueeze(1),
                texts["t5_vec_float32"],
                texts["clip_l_pooler_float32"],
                latents[control].unsqueeze(1),
            )
        )
    return items


def project(folder: Path) -> TinyFamily:
    """Caches of four pictures with references of another size, which the dataset keeps."""
    family = family_called("kontext")
    family.prepare(folder)
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    (folder / "dataset.toml").write_text(text.replace("batch_size = 1", "batch_size = 4"), encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    return family


def test_each_step_follows_diffusers_gradient(tmp_path: Path) -> None:
    family = project(tmp_path)
    times = ("--timestep_sampling", "flux_shift", "--guidance_scale", GUIDANCE)
    modulations = ("--network_args", "include_patterns=['.*mod.*']")

    succeed_here(*family.train, *descent(RATE), *times, *modulations, folder=tmp_path)

    dit_file = tmp_path / "model" / "dit.safetensors"
    dit, parts = in_diffusers("dev", load_file(dit_file)), parts_of(dit_file, diffusers_parts)
    items = read_items(tmp_path / "cache")

    def gradients_at(factors: Factors, step: int) -> Factors:
        batch = shuffled(items, step)
        sigmas = by_size(batch, step)
        noisy, wanted = mixed(batch, step, sigmas)
        inputs: dict[str, Any] = {
            "noisy": noisy,
            "timesteps": 1000 * sigmas + 1,  # as the known tuner's
            "t5": torch.stack([item.text for item in batch]),
            "t5_mask": None,
            "pooled": torch.stack([item.clip for item in batch if item.clip is not None]),
            "guidance": torch.full((len(batch),), GUIDANCE),
        }
        references = [torch.stack([item.extra for item in batch if item.extra is not None])]
        with learning(dit, parts, factors) as found:
            velocity = [run_there(dit, inputs, sample, references) for sample in range(len(batch))]
            (torch.cat(velocity) - wanted).square().mean().backward()
        return found()

    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, "kontext")


def test_a_lora_acts_in_diffusers_as_here(tmp_path: Path) -> None:
    family = project(tmp_path)
    run = ("--output_dir", "out", "--output_name", "lora", "--max_train_steps", "2", "--seed", "1")
    succeed_here(*family.train, *run, "--max_data_loader_n_workers", "0", folder=tmp_path)
    lora, reference = tmp_path / "out" / "lora.safetensors", tmp_path / "start.png"
    convert_file(lora, tmp_path / "there.safetensors", "diffusers")
    texts = [tmp_path / "model" / name for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")]
    models = TinyFlux(
        tmp_path / "model" / "dit.safetensors", tmp_path / "model" / "ae.safetensors", texts[0], texts[1]
    )

    options = [*models_of(models), "--prompt", PROMPT, *SIZE, *OUTPUT, *OWN_SIZE]
    options += ["--control_image_path", str(reference), "--lora_weight", str(lora)]
    flux_kontext_generate_image.main([*options, "--save_path", str(tmp_path / "made")])

    made = ours(tmp_path / "made")
    (latents,) = (tmp_path / "made").glob("*.safetensors")
    with safe_open(latents, "pt") as file:
        assert file.metadata()["bt_control_image_path"] == "start.png"
    assert_same(made, theirs(models, reference, False, tmp_path / "there.safetensors", guidance_scale=2.5))
    plain, _ = theirs(models, reference, False, guidance_scale=2.5)
    assert (made[0] - plain).abs().max() > 0.01 * plain.abs().max()
