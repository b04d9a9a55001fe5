"""Steps of hunyuan_image_train_network.py equal those computed with diffusers' transformer at the same noise
and timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate. Latents and texts are read from the caches of our scripts; nothing else of ours is used. One caption has
a text in quotation marks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.faults.messages import succeed_here
from tests.hunyuan_image.making import in_diffusers, run_there
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
from tests.tiny.hunyuan_image import diffusers_parts
from tests.tiny.project import write_plain_pictures

RATE, SHIFT = 8.0, 5.0
SCALE = 0.75289  # of latents, after caching


@dataclass(frozen=True)
class TwoTexts(Item):
    """text: states of the language model, n D, all real."""

    glyphs: Tensor = torch.zeros(0)
    glyph_mask: Tensor = torch.zeros(0)


def read_items(folder: Path) -> list[Item]:
    """What the caches hold, sorted by name."""
    items: list[Item] = []
    for path in sorted(folder.glob("*_hi.safetensors")):
        (latents,) = (value for name, value in load_file(path).items() if name.startswith("latents"))
        texts = load_file(folder / f"{path.name.partition('_')[0]}_hi_te.safetensors")
        states = texts["varlen_vlm_embed_float32"]
        assert texts["varlen_vlm_mask_int64"].tolist() == [1] * len(states)
        glyphs, mask = texts["byt5_embed_float32"], texts["byt5_mask"]
        items.append(TwoTexts(latents * SCALE, states, glyphs=glyphs, glyph_mask=mask))
    return items


def gradients_of(
    dit: nn.Module, parts: dict[str, list[str]], factors: Factors, batch: list[Item], number: int
) -> Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every part."""
    latents, noise = torch.stack([item.latents for item in batch]), noise_of(batch, number)
    # an entry of the released table of 1000 noise levels, which is shifted
    clean = 1 - (1000 * uniform_of(batch, number)).floor() / 1000
    sigmas = (SHIFT * clean / (1 + (SHIFT - 1) * clean)).float()
    mix = sigmas.view(-1, 1, 1, 1, 1)
    noisy = ((1 - mix) * latents + mix * noise).squeeze(2)
    with learning(dit, parts, factors) as found:
        velocities = []
        for index, item in enumerate(batch):
            assert isinstance(item, TwoTexts)
            inputs = {
                "noisy": noisy[index : index + 1],
                "timesteps": (1000 * sigmas[index : index + 1]).trunc(),
                "text": item.text[None],
                "text_mask": torch.ones(1, len(item.text), dtype=torch.int64),
                "glyphs": item.glyphs[None],
                "glyph_mask": item.glyph_mask[None],
            }
            velocities.append(run_there(dit, inputs, learns=True))
        (torch.cat(velocities) - (noise - latents).squeeze(2)).square().mean().backward()
    return found()


def test_each_step_follows_diffusers_gradient(tmp_path: Path) -> None:
    family = next(each for each in FAMILIES if each.name == "hunyuan_image")
    family.prepare(tmp_path)
    write_plain_pictures(tmp_path, batch_size=4, side=64)
    (tmp_path / "clips" / "picture 2.txt").write_text('a door that says "push"', encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    succeed_here(*family.train, *descent(RATE), folder=tmp_path)

    parts = parts_of(tmp_path / "model" / "dit.safetensors", diffusers_parts)
    items = read_items(tmp_path / "cache")
    assert sum(bool(item.glyph_mask.any()) for item in items if isinstance(item, TwoTexts)) == 1

    def gradients_at(factors: Factors, step: int) -> Factors:
        return gradients_of(in_diffusers(), parts, factors, shuffled(items, step), step)

    assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, "hunyuan_image")
