"""Steps of fpack_train_network.py equal those computed with diffusers' transformer at the same noise and
timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate. The caches are written here, by hand, in the known tuners' form and without our record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from tests.commands import run_script
from tests.faults.messages import succeed_here
from tests.parity.framepack_dit import load_dit, velocity
from tests.parity.test_training import by_shift
from tests.parity.training import (
    RANK,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    noise_of,
    shuffled,
    uniform_of,
)
from tests.tiny.framepack_caches import random_text, write_latents, write_text
from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.framepack_encoders import SIGLIP_DIM
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM

RATE, GUIDANCE, WINDOW = 2.0, 7.5, 2
AREA = (4, 6)
TOLERANCE = 2e-5  # of the largest weight, float32; measured: 2.2e-6
DATASET = """
[[datasets]]
{kind}_directory = "{folder}/media"
cache_directory = "{folder}/cache"
resolution = [48, 32]
batch_size = 2
fp_latent_window_size = 2
"""
Kind = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class FramePackItem(Item):
    """given: all that the caches hold beside the latents to learn."""

    given: Mapping[str, Tensor] = field(default_factory=dict)


def places(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def section(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The first item is a section with one window between it and the start image, the second has none."""
    first = 1 + WINDOW * (1 - index)
    after = first + WINDOW
    return {
        "latents": torch.randn(16, WINDOW, *AREA, generator=generator),
        "latent_indices": places(*range(first, after)),
        "latents_clean": torch.randn(16, 2, *AREA, generator=generator),
        "clean_latent_indices": places(0, after),
        "latents_clean_2x": torch.randn(16, 2, *AREA, generator=generator),
        "clean_latent_2x_indices": places(after + 1, after + 2),
        "latents_clean_4x": torch.randn(16, 16, *AREA, generator=generator),
        "clean_latent_4x_indices": places(*range(after + 3, after + 19)),
    }


def f1_section(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    indices = {
        "latent_indices": places(*range(20, 20 + WINDOW)),
        "clean_latent_indices": places(0, 19),
        "clean_latent_2x_indices": places(17, 18),
        "clean_latent_4x_indices": places(*range(1, 17)),
    }
    return section(index, generator) | indices


def one_frame(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Two controls and the black frame behind them; places of coarse frames without latents."""
    return {
        "latents": torch.randn(16, 1, *AREA, generator=generator),
        "latent_indices": places(5 + index),
        "latents_clean": torch.cat(
            [torch.randn(16, 2, *AREA, generator=generator), torch.zeros(16, 1, *AREA)], dim=1
        ),
        "clean_latent_indices": places(0, 1 + index, 10),
        "clean_latent_2x_indices": places(11, 12),
        "clean_latent_4x_indices": places(*range(13, 29)),
    }


def one_frame_alone(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in one_frame(index, generator).items()
        if "2x" not in name and "4x" not in name
    }


def write_caches(folder: Path, make: Kind) -> list[FramePackItem]:
    """Two items whose texts have different lengths and whose frames stand at different places; sorted by
    name.
    """
    generator = torch.Generator().manual_seed(11)
    is_image = make in (one_frame, one_frame_alone)
    (folder / "cache").mkdir(parents=True)
    (folder / "media").mkdir()
    text = DATASET.format(kind="image" if is_image else "video", folder=folder.as_posix())
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    items = []
    for index, words in enumerate((20, 300)):
        image = {"image_embeddings": torch.randn(9, SIGLIP_DIM, generator=generator)}
        latents = make(index, generator) | image
        texts = random_text(words, LLM_DIM, CLIP_DIM, generator)
        span = "" if is_image else f"_00000-009-{1 - index:04d}"
        name = folder / "cache" / f"item {index}{span}_0048x0032_fp.safetensors"
        write_latents(name, latents, frames=None if is_image else 9)
        write_text(folder / "cache" / f"item {index}_fp_te.safetensors", texts, f"caption {index}")
        given = {name: tensor[None] for name, tensor in (latents | texts).items() if name != "latents"}
        items.append(FramePackItem(latents["latents"], texts["llama_vec"], given=given))
    return items


def modules_of(dit_file: Path) -> dict[str, list[str]]:
    """Every Linear of the blocks but those of the norms: its name in LoRA files -> its path in diffusers'
    transformer.
    """
    found = {}
    for name, tensor in load_file(dit_file).items():
        path = name.removesuffix(".weight")
        in_blocks = path.startswith(("transformer_blocks.", "single_transformer_blocks.")) and name.endswith(
            ".weight"
        )
        if in_blocks and tensor.ndim == 2 and "norm" not in path:
            found[path.replace(".", "_")] = [path]
    return found


def gradients_of(
    dit: HunyuanVideoFramepackTransformer3DModel,
    modules: Mapping[str, list[str]],
    factors: Factors,
    batch: list[FramePackItem],
    number: int,
) -> Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every module."""
    sigmas, timesteps = by_shift(uniform_of(batch, number))
    noise = noise_of(batch, number)
    errors = []
    with learning(dit, modules, factors) as found:
        for sample, item in enumerate(
            batch
        ):  # one by one: it takes the same places for all samples of a batch
            drawn, mix = noise[sample : sample + 1], sigmas[sample].float()
            noisy = (1 - mix) * item.latents + mix * drawn
            guidance = torch.tensor([1000 * GUIDANCE])
            predicted = velocity(dit, noisy, timesteps[sample : sample + 1].float(), guidance, item.given)
            errors.append((predicted - (drawn - item.latents)).square().mean())
        torch.stack(errors).mean().backward()
    return found()


@pytest.mark.parametrize(
    "make", [section, f1_section, one_frame, one_frame_alone], ids=lambda make: make.__name__
)
def test_each_step_follows_diffusers_gradient(tmp_path: Path, make: Kind) -> None:
    items = write_caches(tmp_path, make)
    widths = {"text_dim": LLM_DIM, "pooled_dim": CLIP_DIM, "image_dim": SIGLIP_DIM}
    dit_file = write_dit(tmp_path / "models", tiny_state(**widths), name="dit")
    network = ("--network_module", "networks.lora_framepack", "--network_dim", RANK)
    times = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--guidance_scale", GUIDANCE)
    files = ("--dit", dit_file, "--dataset_config", tmp_path / "dataset.toml", "--sdpa")

    arguments = ("fpack_train_network.py", *files, *network, *descent(RATE), *times)
    if make is section:
        run_script(*arguments, folder=tmp_path)
    else:  # a program of its own takes longer to start than to train
        succeed_here(*arguments, folder=tmp_path)

    dit, modules = load_dit(dit_file), modules_of(dit_file)

    def gradients_at(factors: Factors, step: int) -> Factors:
        return gradients_of(dit, modules, factors, shuffled(items, step), step)

    assert_steps_of_descent(tmp_path / "out", modules, RATE, gradients_at, make.__name__, TOLERANCE)
