"""Steps of hv_train_network.py equal those computed with diffusers' transformer at the same noise and
timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate. The caches are written here, by hand, in the known tuners' form and without our record.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.commands import run_script
from tests.parity import training
from tests.parity.hunyuan import load_dit
from tests.parity.projects import DATASET, GRID, WIDTH
from tests.parity.test_training import by_shift
from tests.tiny.hunyuan_dit import diffusers_parts, tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM

RATE, GUIDANCE, SCALE = 2.0, 2.5, 0.476986
METADATA = {
    "architecture": "hunyuan_video",
    "width": "48",
    "height": "32",
    "format_version": "1.0.1",
    "frame_count": "5",
}


@dataclass(frozen=True)
class HunyuanItem(training.Item):
    """text: the language model's states, 256 D."""

    mask: Tensor = torch.zeros(0)  # 256
    pooled: Tensor = torch.zeros(0)
    image: Tensor | None = None  # 16 1 h w


def write_caches(folder: Path, with_image: bool) -> list[HunyuanItem]:
    """Two items whose texts have different lengths, as the known tuners cache them; sorted by name."""
    generator = torch.Generator().manual_seed(11)
    (folder / "cache").mkdir(parents=True)
    (folder / "clips").mkdir()
    (folder / "dataset.toml").write_text(
        DATASET.format(folder=folder.as_posix(), width=WIDTH, batch_size=2), encoding="utf-8"
    )
    items = []
    for index, words in enumerate((20, 256)):
        latents = torch.randn(16, *GRID, generator=generator)
        image = torch.randn(16, 1, *GRID[1:], generator=generator) if with_image else None
        text, pooled = (
            torch.randn(256, LLM_DIM, generator=generator),
            torch.randn(CLIP_DIM, generator=generator),
        )
        mask = (torch.arange(256) < words).to(torch.int64)
        tensors = {f"latents_{'x'.join(map(str, GRID))}_float32": latents}
        if image is not None:
            tensors[f"latents_image_1x{GRID[1]}x{GRID[2]}_float32"] = image
        save_file(tensors, folder / "cache" / f"clip {index}_00000-005_0048x0032_hv.safetensors", METADATA)
        texts = {
            "llm_float32": text,
            "llm_mask": mask,
            "clipL_float32": pooled,
            "clipL_mask": torch.ones(77, dtype=torch.int64),
        }
        caption = {"architecture": "hunyuan_video", "caption1": f"caption {index}", "format_version": "1.0.1"}
        save_file(texts, folder / "cache" / f"clip {index}_hv_te.safetensors", caption)
        items.append(HunyuanItem(latents, text, mask=mask, pooled=pooled, image=image))
    return items


def gradients_of(
    dit: nn.Module,
    parts: dict[str, list[str]],
    factors: training.Factors,
    batch: list[HunyuanItem],
    number: int,
) -> training.Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every part."""
    latents = torch.stack([item.latents for item in batch]) * SCALE
    sigmas, timesteps = by_shift(training.uniform_of(batch, number))
    noise, mix = training.noise_of(batch, number), sigmas.float().view(-1, 1, 1, 1, 1)
    noisy = (1 - mix) * latents + mix * noise
    if batch[0].image is not None:
        condition = torch.zeros_like(latents)
        condition[:, :, :1] = torch.stack([item.image for item in batch if item.image is not None]) * SCALE
        noisy = torch.cat([noisy, condition], dim=1)
    elif dit.config.in_channels == 32:
        condition = torch.zeros_like(latents)
        condition[:, :, 0] = latents[:, :, 0]
        noisy = torch.cat([noisy, condition], dim=1)
    texts = (torch.stack([item.text for item in batch]), torch.stack([item.mask for item in batch]))
    pooled, guidance = torch.stack([item.pooled for item in batch]), torch.full((len(batch),), GUIDANCE)
    with training.learning(dit, parts, factors) as found:
        velocity = dit(noisy, timesteps.float(), *texts, pooled, guidance, return_dict=False)[0]
        (velocity - (noise - latents)).square().mean().backward()
    return found()


@pytest.mark.parametrize(("kind", "cached_image"), [("t2v", False), ("i2v", True), ("i2v", False)])
def test_each_step_follows_diffusers_gradient(tmp_path: Path, kind: str, cached_image: bool) -> None:
    items = write_caches(tmp_path, cached_image)
    dit_file = write_dit(
        tmp_path / "models", tiny_state(kind, text_dim=LLM_DIM, pooled_dim=CLIP_DIM), name="dit"
    )
    network = ("--network_module", "networks.lora", "--network_dim", training.RANK, *training.descent(RATE))
    times = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--guidance_scale", GUIDANCE)
    files = ("--dit", dit_file, "--dataset_config", tmp_path / "dataset.toml", "--sdpa")

    run_script("hv_train_network.py", *files, *network, *times, folder=tmp_path)

    dit, linears = load_dit(dit_file), training.parts_of(dit_file, diffusers_parts)
    parts = {name: paths for name, paths in linears.items() if "mod" not in name}  # of no modulation

    def gradients_at(factors: training.Factors, step: int) -> training.Factors:
        return gradients_of(dit, parts, factors, training.shuffled(items, step), step)

    training.assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, f"{kind} {cached_image}")
