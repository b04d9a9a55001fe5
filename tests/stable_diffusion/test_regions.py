"""Attention couple and regional LoRA, against a plain computation of every cross-attention and every LoRA."""
# Letters: B pictures, R rows, P parts, L tokens of a part, N tokens of a picture

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor, nn

from modules.errors import OptionError
from stable_diffusion.contract import RequestedImage, UnetCall
from stable_diffusion.regions import Regions, read_regions
from tests.stable_diffusion.loaded import call_of, picture, run_unet, unet_of

HEIGHT, WIDTH = 72, 120  # pixels: latents 9 x 15, features 5 x 8, no two alike and none even
TOKENS = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Lora:
    """A LoRA on one module, as `Networks.layers` has them."""

    def __init__(self, module: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.change = torch.randn(module.weight.shape, generator=generator) * module.weight.std() * 0.5
        self.apply_region: Callable[[Tensor], Tensor] | None = None
        self._module = module
        self._before = module.forward
        module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        added = apply(self._module, self.change, x)
        return self._before(x) + (added if self.apply_region is None else self.apply_region(added))


def apply(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """What a module does with another weight, without its bias."""
    if isinstance(module, nn.Conv2d):
        return functional.conv2d(x, weight, None, module.stride, module.padding)
    return functional.linear(x, weight)


def add_loras(unet: Any, count: int) -> list[dict[str, Lora]]:
    """LoRAs on every linear layer and convolution."""
    modules = [(name, m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [
        {name: Lora(module, 1000 * index + place) for place, (name, module) in enumerate(modules)}
        for index in range(count)
    ]


def a_call(kind: str, parts: int) -> UnetCall:
    call = call_of(kind, size=(WIDTH, HEIGHT))
    return replace(call, context=call.context[:, : parts * TOKENS])


def a_image(mask: Path | None, parts: int) -> RequestedImage:
    return replace(picture(parts=parts), mask=mask)


def save_mask(path: Path, *boxes: tuple[int, int, int, int, tuple[int, int, int]]) -> Path:
    """left, top, right, bottom in eighths of the picture, and the color."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for left, top, right, bottom, color in boxes:
        rows = slice(top * HEIGHT // 8, bottom * HEIGHT // 8)
        pixels[rows, left * WIDTH // 8 : right * WIDTH // 8] = color
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Part 1 has most of the left, part 2 most of the right; they overlap, and a corner is nobody's."""
    return save_mask(
        tmp_path / "halves.png",
        (0, 0, 4, 8, (255, 0, 0)),
        (3, 0, 8, 6, (0, 255, 0)),
        (3, 0, 4, 6, (255, 128, 0)),
    )


# A plain computation


def plain(unet: Any, call: UnetCall, regions: Tensor, changes: Sequence[dict[str, Tensor]]) -> Tensor:
    """The U-Net with everything written out: regions P H W of one picture, changes of weights by module."""
    sizes = {}
    height, width = call.sample.shape[-2:]
    while (height, width) not in sizes.values():
        sizes[height * width] = (height, width)
        height, width = (height + 1) // 2, (width + 1) // 2
    modules = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with_forward = {name: module.__dict__.get("forward") for name, module in modules.items()}
    original = {name: type(module).forward.__get__(module) for name, module in modules.items()}

    def masks_at(size: tuple[int, int]) -> Tensor:
        return functional.interpolate(regions[None], size, mode="bilinear")[0]

    def masked(name: str, x: Tensor) -> Tensor:
        out = original[name](x)
        for part, change in enumerate(changes):
            added = apply(modules[name], change[name], x)
            if out.ndim == 2:
                mask: Any = regions[part].mean()
            elif out.ndim == 3:
                mask = masks_at(sizes[out.shape[1]])[part].reshape(-1, 1)
            else:
                mask = masks_at((out.shape[2], out.shape[3]))[part]
            out = out + added * mask
        return out

    def attend(name: str, module: Any, x: Tensor, context: Tensor) -> Tensor:
        masks = masks_at(sizes[x.shape[1]]).flatten(1)  # P N
        total = masks.sum(0)
        result = torch.zeros_like(x)
        query = masked(f"{name}.to_q", x)
        for part, own in enumerate(context.split(TOKENS, 1)):
            key, value = original[f"{name}.to_k"](own), original[f"{name}.to_v"](own)
            if changes:
                key = key + own @ changes[part][f"{name}.to_k"].T
                value = value + own @ changes[part][f"{name}.to_v"].T
            heads = [t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (query, key, value)]
            scores = heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5
            seen = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
            weight = torch.where(total > 0, masks[part] / total.clamp(min=1e-6), 1 / len(masks))
            result = result + seen * weight[:, None]
        return masked(f"{name}.to_out.0", result)

    cross = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    for name, module in modules.items():
        if not name.endswith(("attn2.to_k", "attn2.to_v")):
            module.forward = lambda x, *_, name=name, **__: masked(name, x)
    for name, module in cross.items():
        module.forward = lambda hidden_states, encoder_hidden_states, name=name, module=module, **_: attend(
            name, module, hidden_states, encoder_hidden_states
        )
    try:
        return run_unet(unet, call)
    finally:
        for name, module in modules.items():
            module.forward = with_forward[name] or original[name]
        for module in cross.values():
            del module.forward


@pytest.mark.slow_cases("sdxl")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_parts_and_their_loras_act_in_their_regions(kind: str, halves: Path) -> None:
    unet = unet_of(kind)
    loras = add_loras(unet, 2)
    call = a_call(kind, parts=2)
    masked = a_image(halves, parts=2)
    maker = Regions(unet, loras)

    with maker.apply_to_batch([masked], WIDTH, HEIGHT) as idea:
        assert idea is not None
        made = run_unet(unet, idea(call))

    changes = [{name: lora.change for name, lora in layers.items()} for layers in loras]
    expected = plain(unet, call, maker.read_regions(masked, WIDTH, HEIGHT), changes)
    torch.testing.assert_close(made, expected, **CLOSE)
    assert all(lora.apply_region is None for layers in loras for lora in layers.values())


def test_a_failure_leaves_the_unet_as_it_was(halves: Path) -> None:
    unet = unet_of("sd1")
    loras = add_loras(unet, 2)
    call = a_call("sd1", parts=1)
    before = run_unet(unet, call)

    with pytest.raises(KeyboardInterrupt), Regions(unet, loras).apply_to_batch([a_image(halves, 2)], 64, 64):
        raise KeyboardInterrupt

    torch.testing.assert_close(run_unet(unet, call), before, rtol=0, atol=0)


def test_there_are_as_many_loras_as_parts(halves: Path) -> None:
    unet = unet_of("sd1")
    maker = Regions(unet, add_loras(unet, 2))
    with pytest.raises(OptionError, match=r"the prompt has 3 parts between AND, --network_weights 2 LoRAs"):
        maker.read_regions(a_image(halves, 3), WIDTH, HEIGHT)
    assert maker.read_regions(a_image(None, 3), WIDTH, HEIGHT).shape == (3, 1, 1)
    with pytest.raises(OptionError, match=r"--network_pre_calc folds LoRAs"):
        Regions(unet, None).read_regions(a_image(halves, 2), WIDTH, HEIGHT)


# Masks


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    return save_mask(
        tmp_path / "colors.png",
        (0, 0, 2, 8, (255, 0, 0)),
        (2, 0, 4, 8, (255, 255, 0)),
        (4, 0, 6, 8, (250, 10, 255)),
        (6, 0, 8, 8, (0, 51, 0)),
    )


def test_channels_are_regions(colors: Path) -> None:
    regions = read_regions(colors, 4, WIDTH, HEIGHT)
    columns = regions[:, 0, [5, 35, 65, 95]]
    expected = [[1, 1, 250 / 255, 0], [0, 1, 10 / 255, 0.2], [0, 0, 1, 0], [1, 1, 1, 1]]
    torch.testing.assert_close(columns, torch.tensor(expected))
    assert regions.shape == (4, HEIGHT, WIDTH)


def test_colors_are_codes(colors: Path) -> None:
    regions = read_regions(colors, 7, WIDTH, HEIGHT, num_colors=5)
    columns = regions[:, 0, [5, 35, 65, 95]].int().tolist()
    # red is part 1, yellow (red, green) part 3, magenta (red, blue) part 5; 2 and 4 have none: everywhere
    everywhere = [1, 1, 1, 1]
    assert columns == [
        [1, 0, 0, 0],
        everywhere,
        [0, 1, 0, 0],
        everywhere,
        [0, 0, 1, 0],
        everywhere,
        everywhere,
    ]


# Texts
