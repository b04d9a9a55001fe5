"""FLUX.2 through the command lines equals diffusers: whole pipelines, steps of training, and LoRAs.

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
from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.flux_2.making import autoencoder_in_diffusers, in_diffusers, predict_with, tiny_inputs
from tests.parity.running import assert_equal, assert_same_effect
from tests.parity.training import (
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    normal_share,
    parts_of,
    ratio_of,
    shifted,
    shuffled,
)
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.flux_2 import (
    TEXT_LAYERS,
    TinyFlux2,
    diffusers_parts,
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
    (latents,) = (load_file(path)["latent"] for path in (tmp_path / "made").glob("*.safetensors"))
    assert_equal(latents, expected, f"{name}, latents")
    (picture,) = (tmp_path / "made").glob("*.png")
    levels = torch.from_numpy(read_image(picture))
    assert (levels - picture_of(pipe, expected)).abs().max() < 0.6  # a rounded level of 255 at most


def read_items(folder: Path) -> list[tuple[Item, list[Tensor]]]:
    """What the caches hold, sorted by name, and the references of each."""
    items = []
    for path in sorted(folder.glob("*_f2k4b.safetensors")):
        media = load_file(path)
        texts = load_file(folder / f"{path.name.partition('_')[0]}_f2k4b_te.safetensors")
        controls = [media.pop(f"latents_control_{number}_3x3_float32").unsqueeze(1) for number in range(2)]
        (latents,) = media.values()
        items.append((Item(latents.unsqueeze(1), texts["ctx_vec_float32"]), controls))
    return items


def project(folder: Path) -> TinyFamily:
    """Caches of four pictures with two references of another size each, which the dataset keeps."""
    family = family_called("flux_2")
    family.prepare(folder)
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    text = text.replace("batch_size = 1", "batch_size = 4") + "no_resize_control = true\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    return family


def test_two_steps_of_training_equal_those_computed_with_diffusers(tmp_path: Path) -> None:
    """And the LoRA that comes out has the same effect in diffusers as here."""
    family = project(tmp_path)
    shift = ("--timestep_sampling", "flux2_shift")

    succeed_here(*family.train, *descent(RATE), *shift, folder=tmp_path)

    dit_file = tmp_path / "model" / "dit.safetensors"
    dit, parts = in_diffusers(load_file(dit_file)), parts_of(dit_file, diffusers_parts)
    items = read_items(tmp_path / "cache")

    def gradients_at(factors: Factors, step: int) -> Factors:
        batch = shuffled(items, step)
        only = [item for item, _ in batch]
        rows, columns = only[0].latents.shape[-2:]
        sigmas = shifted(normal_share(only, step), ratio_of(rows * columns))
        noisy, wanted = mixed(only, step, sigmas)
        given = {
            "noisy": noisy,
            "timesteps": 1000 * sigmas + 1,  # as the known tuner's
            "text": torch.stack([item.text for item in only]),
        }
        references = [torch.stack([controls[number] for _, controls in batch]) for number in range(2)]
        with learning(dit, parts, factors) as found:
            velocity = predict_with(dit, given, references)
            (velocity - wanted).square().mean().backward()
            return found()

    assert len(parts) == 22
    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, "flux_2")
    files = TinyFlux2(
        dit_file,
        tmp_path / "model" / "vae.safetensors",
        tmp_path / "model" / "text_encoder",
        "klein-base-4b",
    )
    assert_same_effect(
        theirs(files),
        lambda dit: predict_with(dit, tiny_inputs()),
        lambda merged: in_diffusers(load_file(merged)),
        dit_file,
        tmp_path / "out" / "lora.safetensors",
    )
