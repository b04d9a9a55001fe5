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
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands import run_script
from tests.faults.messages import succeed_here
from tests.parity import training
from tests.parity.framepack import load_dit, velocity
from tests.parity.test_training import by_shift
from tests.tiny.framepack import SIGLIP_DIM
from tests.tiny.framepack_dit import tiny_state, write_dit
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
class FramePackItem(training.Item):
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
    factors: training.Factors,
    batch: list[FramePackItem],
    number: int,
) -> training.Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every module."""
    sigmas, timesteps = by_shift(training.uniform_of(batch, number))
    noise = training.noise_of(batch, number)
    errors = []
    with training.learning(dit, modules, factors) as found:
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
    network = ("--network_module", "networks.lora_framepack", "--network_dim", training.RANK)
    times = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--guidance_scale", GUIDANCE)
    files = ("--dit", dit_file, "--dataset_config", tmp_path / "dataset.toml", "--sdpa")

    arguments = ("fpack_train_network.py", *files, *network, *training.descent(RATE), *times)
    if make is section:
        run_script(*arguments, folder=tmp_path)
    else:  # a program of its own takes longer to start than to train
        succeed_here(*arguments, folder=tmp_path)

    dit, modules = load_dit(dit_file), modules_of(dit_file)

    def gradients_at(factors: training.Factors, step: int) -> training.Factors:
        return gradients_of(dit, modules, factors, training.shuffled(items, step), step)

    training.assert_steps_of_descent(tmp_path / "out", modules, RATE, gradients_at, make.__name__, TOLERANCE)


TEXT_ROWS = 512
LATENTS = {"architecture": "framepack", "width": "48", "height": "32", "format_version": "1.0.1"}


def cached_name(key: str, tensor: Tensor, grid: str) -> str:
    """The name in the file of what batches call `key`."""
    if key.endswith("_mask"):
        return key
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{key}_{grid}_{dtype}" if key.startswith("latents") else f"{key}_{dtype}"


def write_latents(path: Path, tensors: Mapping[str, Tensor], frames: int | None = None) -> None:
    """A latent cache.

    tensors: by the names of batches, without batch dimension. frames: of the clip; None for an image.
    """
    grid = "x".join(map(str, tensors["latents"].shape[1:]))  # that of the target, in the names of all
    count = {} if frames is None else {"frame_count": str(frames)}
    save_file(
        {cached_name(key, tensor, grid): tensor for key, tensor in tensors.items()}, path, LATENTS | count
    )


def write_text(path: Path, tensors: Mapping[str, Tensor], caption: str) -> None:
    """A text cache."""
    metadata = {"architecture": "framepack", "caption1": caption, "format_version": "1.0.1"}
    save_file({cached_name(key, tensor, ""): tensor for key, tensor in tensors.items()}, path, metadata)


def random_text(words: int, llm_dim: int, clip_dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A text of so many tokens, zeros behind them."""
    mask = torch.arange(TEXT_ROWS) < words
    states = torch.randn(TEXT_ROWS, llm_dim, generator=generator) * mask[:, None]
    return {
        "llama_vec": states,
        "llama_attention_mask": mask,
        "clip_l_pooler": torch.randn(clip_dim, generator=generator),
    }
