"""Tiny random ControlNets for the tiny Stable Diffusion models, in all layouts of files, and LLLites."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor

from tests.tiny.dit_files import draw_state, write_tensors
from tests.tiny.stable_diffusion import KINDS, ldm_unet, unet_state

_UNLIKE_UNET = {"out_channels", "up_block_types"}
_LAST_HINT = 14  # number of the last layer of the hint block, with the usual sizes


def control_net_config(kind: str, **sizes: Any) -> dict[str, Any]:
    """Settings of ControlNetModel for a tiny U-Net."""
    unet = {name: value for name, value in KINDS[kind].unet.items() if name not in _UNLIKE_UNET}
    return {**unet, **sizes}


def control_net_state(kind: str, seed: int = 50, **sizes: Any) -> dict[str, Tensor]:
    """A ControlNet under diffusers' names, whose zero convolutions are not zero."""
    state = _state(kind, seed, tuple(sorted(sizes.items())))
    return {name: tensor.clone() for name, tensor in state.items()}


@cache
def _state(kind: str, seed: int, sizes: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    state = draw_state(lambda: ControlNetModel(**control_net_config(kind, **dict(sizes))), seed)
    for name in state:  # guides must be seen in a picture
        if name.startswith("controlnet_cond_embedding.") and name.endswith("weight"):
            state[name] *= 1.5
    return state


def control_net(kind: str, seed: int = 50, **sizes: Any) -> ControlNetModel:
    """The same as a network of diffusers."""
    network = ControlNetModel(**control_net_config(kind, **sizes))
    network.load_state_dict(control_net_state(kind, seed, **sizes))
    return network.eval().requires_grad_(False)


def ldm_control_net(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet under the released names, without prefix."""
    unet = {name: tensor for name, tensor in state.items() if not name.startswith("controlnet_")}
    stored = ldm_unet(unet)
    for name, tensor in state.items():
        if name.startswith("controlnet_"):
            stored[_ldm_name(name)] = tensor
    return stored


def _ldm_name(name: str) -> str:
    leaf = name.rpartition(".")[2]
    number = re.search(r"\.(\d+)\.", name)
    if name.startswith("controlnet_down_blocks."):
        assert number is not None
        return f"zero_convs.{number[1]}.0.{leaf}"
    if name.startswith("controlnet_mid_block."):
        return f"middle_block_out.0.{leaf}"
    if ".conv_in." in name:
        return f"input_hint_block.0.{leaf}"
    if ".conv_out." in name:
        return f"input_hint_block.{_LAST_HINT}.{leaf}"
    assert number is not None
    return f"input_hint_block.{2 * int(number[1]) + 2}.{leaf}"


def write_control_net(path: Path, kind: str, layout: str = "released", seed: int = 50, **sizes: Any) -> Path:
    """Write a ControlNet.

    layout: "released", "prefixed" (also with `control_model.`), "diffusers" (its names), "folder" (of
    diffusers) or "difference" (to the tiny U-Net). A path that ends in .pth is a torch file.
    """
    state = control_net_state(kind, seed, **sizes)
    if layout == "folder":
        config = {"_class_name": "ControlNetModel", **control_net_config(kind, **sizes)}
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return write_tensors(path / "diffusion_pytorch_model.safetensors", state).parent
    if layout == "difference":
        unet = unet_state(kind)
        state = {
            name: tensor if name.startswith("controlnet_") else tensor - unet[name]
            for name, tensor in state.items()
        }
    if layout != "diffusers":
        state = ldm_control_net(state)
    if layout in {"prefixed", "difference"}:
        state = {f"control_model.{name}": tensor for name, tensor in state.items()}
    if layout == "difference":
        state["difference"] = torch.tensor(1.0)
    return write_tensors(path, state)


# ControlNet-LLLite

# layers of the tiny SDXL U-Net by their released names, and the width of their inputs
LLLITE_LAYERS = {
    f"lllite_unet_{block}_1_transformer_blocks_{number}_{leaf}": 128
    for block in ("input_blocks_4", "input_blocks_5", "middle_block", "output_blocks_0", "output_blocks_2")
    for number in (0, 1)
    for leaf in ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q")
}


def lllite_state(
    layers: Mapping[str, int] = LLLITE_LAYERS,
    rank: int = 8,
    width: int = 6,
    strides: Sequence[int] = (4, 4),
    seed: int = 60,
    convolution: bool = False,
) -> dict[str, Tensor]:
    """An LLLite. width: of the guide's embedding; strides: of the convolutions that make it."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        fan = torch.Size(shape[1:]).numel()
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan**0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    ones = (1, 1) if convolution else ()
    for name, channels in layers.items():
        before = 3
        for place, stride in enumerate(strides):
            after = width if place == len(strides) - 1 else width // 2
            add(f"{name}.conditioning1.{2 * place}", after, before, stride, stride)
            before = after
        add(f"{name}.down.0", rank, channels, *ones)
        add(f"{name}.mid.0", rank, rank + width, *ones)
        add(f"{name}.up.0", channels, rank, *ones)
    return state


def write_lllite(path: Path, **settings: Any) -> Path:
    """Write an LLLite; settings: of `lllite_state`."""
    return write_tensors(path, lllite_state(**settings))
