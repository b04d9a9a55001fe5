"""Steps of flux_train_network.py equal those computed with diffusers' transformers at the same noise and
timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate. Latents and texts are read from the caches of our scripts; nothing else of ours is used.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.faults.messages import succeed_here
from tests.flux.making import in_diffusers, run_there
from tests.parity.training import (
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    noise_of,
    parts_of,
    shuffled,
    uniform_of,
)
from tests.tiny.families import FAMILIES
from tests.tiny.flux import diffusers_parts
from tests.tiny.project import write_plain_pictures

RATE, GUIDANCE = 0.5, 2.5
FEW, MANY = (256, 0.5), (4096, 1.15)  # tokens and shift of the released model


@dataclass(frozen=True)
class FluxItem(Item):
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


def by_size(u: Tensor, latents: Tensor) -> Tensor:
    """Noise levels of --timestep_sampling flux_shift."""
    tokens = (latents.shape[-2] // 2) * (latents.shape[-1] // 2)
    shift = FEW[1] + (tokens - FEW[0]) * (MANY[1] - FEW[1]) / (MANY[0] - FEW[0])
    s = torch.sigmoid(torch.special.ndtri(u))
    return math.exp(shift) / (math.exp(shift) + 1 / s - 1)


def gradients_of(
    dit: nn.Module,
    parts: dict[str, list[str]],
    factors: Factors,
    batch: list[FluxItem],
    number: int,
    kind: str,
) -> Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every part."""
    latents = torch.stack([item.latents for item in batch])
    sigmas = by_size(uniform_of(batch, number), latents).float()
    noise, mix = noise_of(batch, number), sigmas.view(-1, 1, 1, 1, 1)
    inputs: dict[str, Any] = {
        "noisy": (1 - mix) * latents + mix * noise,
        "timesteps": 1000 * sigmas,
        "t5": torch.stack([item.text for item in batch]),
        # without --apply_t5_attn_mask FLUX sees the padding
        "t5_mask": torch.stack([item.mask for item in batch]) if kind == "chroma" else None,
        "pooled": None if kind == "chroma" else torch.stack([item.pooled for item in batch]),  # type: ignore[misc]
        "guidance": torch.full((len(batch),), GUIDANCE),
    }
    with learning(dit, parts, factors) as found:
        velocity = torch.cat([run_there(dit, inputs, sample) for sample in range(len(batch))])
        (velocity - (noise - latents)).square().mean().backward()
    return found()


@pytest.mark.parametrize(("name", "kind"), [("flux", "dev"), ("chroma", "chroma")])
def test_each_step_follows_diffusers_gradient(tmp_path: Path, name: str, kind: str) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    family.prepare(tmp_path)
    write_plain_pictures(tmp_path, batch_size=4)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    times = ("--timestep_sampling", "flux_shift", "--guidance_scale", GUIDANCE)

    succeed_here(*family.train, *descent(RATE), *times, folder=tmp_path)

    dit_file = tmp_path / "model" / "dit.safetensors"
    dit, parts = in_diffusers(kind, load_file(dit_file)), parts_of(dit_file, diffusers_parts)
    items = read_items(tmp_path / "cache")

    def gradients_at(factors: Factors, step: int) -> Factors:
        return gradients_of(dit, parts, factors, shuffled(items, step), step, kind)

    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, name)
