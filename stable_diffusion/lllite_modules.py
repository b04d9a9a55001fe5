"""ControlNet-LLLite: small networks that change the inputs of single U-Net layers of SDXL by a control image.

A module turns the control image into tokens of its layer by convolutions whose kernels do not overlap,
joins them to the layer's input, which it projects down, and projects the result up again:

layer(x + multiplier * up(mid(join(conditioning1(control), down(x)))))

Positive and negative rows are changed equally. Source: the documents and files of kohya-ss/controlnet-lllite.
"""
# Letters: B images, R rows of one call of the U-Net, L tokens, C their width, E width of the embedding

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources
from modules.errors import CheckpointError
from networks.module_names import from_alias, module_path
from stable_diffusion.contract import SDXL
from stable_diffusion.names import SDXL as SDXL_NAMES

PREFIX = "lllite_unet_"  # then the layer's path in the released files, with "_" for "."
_OTHER_PREFIX = "lllite_"  # prefix of files for other models than SDXL
A_LLLITE = "a ControlNet-LLLite for Stable Diffusion XL"
# parts of the U-Net, by released name, that have modules; below, the layers of a transformer that have one
_BLOCKS = ("input_blocks_4_1", "input_blocks_5_1", "input_blocks_7_1", "input_blocks_8_1", "middle_block_1")
_LAYERS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q")
# strides of the convolutions, by how often the latents are halved before the layer: pixels to tokens
_STRIDES = {0: (4, 2), 1: (4, 4), 2: (4, 4, 2)}


@dataclass(frozen=True)
class LlliteDimensions:
    """Dimensions of the LLLite module that modifies the input of one layer."""

    convolutions: tuple[tuple[int, int], ...]  # (channels, kernel and stride), one after the other
    width: int  # width of the layer's input
    rank: int  # width to which the input is projected down
    is_convolution: bool  # the layer's input is R C h w, else R L C

    @property
    def reduction(self) -> int:
        """Edge length in pixels of the image area per token: the product of all strides."""
        product = 1
        for _, stride in self.convolutions:
            product *= stride
        return product


class LlliteModule(nn.Module):
    """LLLite module that modifies the input of one layer; attribute names match the tensor names in files."""

    def __init__(self, dimensions: LlliteDimensions, dropout: float = 0.0) -> None:
        super().__init__()
        self.dimensions = dimensions
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in dimensions.convolutions:
            layers += [nn.Conv2d(channels, width, kernel_size=stride, stride=stride), nn.ReLU()]
            channels = width
        self.conditioning1 = nn.Sequential(*layers[:-1])  # no activation after the last
        self.down = nn.Sequential(self._make_layer(dimensions.width, dimensions.rank), nn.ReLU())
        self.mid = nn.Sequential(self._make_layer(dimensions.rank + channels, dimensions.rank), nn.ReLU())
        self.dropout = nn.Dropout(dropout)  # dropout in training; files have none
        self.up = nn.Sequential(self._make_layer(dimensions.rank, dimensions.width))

    def _make_layer(self, width: int, out: int) -> nn.Module:
        return (
            nn.Conv2d(width, out, kernel_size=1) if self.dimensions.is_convolution else nn.Linear(width, out)
        )

    def embed(self, controls: Tensor) -> Tensor:
        """Embed control images B 3 H W in -1..1 in E channels: B L E, or B E h w for a convolution layer."""
        height, width = controls.shape[2:]
        step = self.dimensions.reduction
        # the U-Net rounds its sizes up; an edge that is not a whole step is repeated, as strides round down
        padding = (0, -width % step, 0, -height % step)
        if any(padding):
            controls = nn.functional.pad(controls, padding, mode="replicate")
        embedding = self.conditioning1(controls)
        return embedding if self.dimensions.is_convolution else rearrange(embedding, "b e h w -> b (h w) e")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the correction of the layer's input `x`; `embedding` is the embedded control image."""
        # x: R L C or R C h w    embedding: B L E or B E h w; row r belongs to image r modulo B
        axis = 1 if self.dimensions.is_convolution else 2
        rows = embedding
        if len(x) != len(embedding):
            rows = embedding.repeat(len(x) // len(embedding), *(1,) * (embedding.ndim - 1))
        return self.up(self.dropout(self.mid(torch.cat([rows, self.down(x)], dim=axis))))


class Lllite(nn.Module):
    """All LLLite modules of one file, keyed by their names in the file."""

    def __init__(self, parts: Mapping[str, LlliteDimensions], dropout: float = 0.0) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, LlliteModule(part, dropout))


def plan_lllite(unet: nn.Module, width: int, rank: int) -> dict[str, LlliteDimensions]:
    """Return the dimensions of all LLLite modules of a U-Net, by module name, in the order of its layers.

    Args:
        unet: The U-Net.
        width: Channels of the embedded control image, an even number.
        rank: Width to which inputs are projected.
    """
    num_levels: int = len(unet.config["block_out_channels"])  # type: ignore[index]
    plan = {}
    for block in _BLOCKS:
        for index in itertools.count():  # until no transformer block is left
            transformer_block = f"{PREFIX}{block}_transformer_blocks_{index}"
            query_path = find_layer_path(f"{transformer_block}_attn1_to_q")
            query = _get_layer(unet, query_path)
            if query_path is None or query is None:
                break
            path_parts = query_path.split(".")
            # the middle block has the resolution of the last level
            level = int(path_parts[1]) if path_parts[0] == "down_blocks" else num_levels - 1
            # (channels, stride) of each convolution: the last one has the full width
            *strides, last_stride = _STRIDES[level]
            convolutions = (*((width // 2, stride) for stride in strides), (width, last_stride))
            dimensions = LlliteDimensions(convolutions, query.in_features, rank, is_convolution=False)
            for layer in _LAYERS:
                plan[f"{transformer_block}_{layer}"] = dimensions
    return plan


def find_layer_path(name: str) -> str | None:
    """Return diffusers' path of the U-Net layer that an LLLite module changes; None if SDXL lacks it."""
    return module_path(from_alias(name.removeprefix(PREFIX), SDXL_NAMES), SDXL_NAMES)


def _get_layer(unet: nn.Module, path: str | None) -> Any:
    try:
        return None if path is None else unet.get_submodule(path)
    except AttributeError:
        return None


def _input_width(layer: Any) -> int | None:
    """Return a linear or convolution layer's number of input channels; None for other modules."""
    name = "in_channels" if isinstance(layer, nn.Conv2d) else "in_features"
    width: int | None = getattr(layer, name, None)
    return width


def find_layer(
    unet: nn.Module, name: str, dimensions: LlliteDimensions, path: Path, option: str
) -> nn.Module:
    """Return the layer of a U-Net whose input an LLLite module modifies.

    Args:
        unet: The U-Net.
        name: Name of the module in the file.
        dimensions: Dimensions of the module.
        path: Path of the file.
        option: Option that names the file.

    Raises:
        CheckpointError: If the U-Net has no layer of this name and width.
    """
    layer = _get_layer(unet, find_layer_path(name))
    width = _input_width(layer)
    if width == dimensions.width and isinstance(layer, nn.Conv2d) == dimensions.is_convolution:
        return layer
    mismatch = "has no such layer" if width is None else f"takes {width} channels in this layer"
    raise CheckpointError(
        f"{path} does not fit --ckpt: it is made for {name.removeprefix(PREFIX)} with inputs of "
        f"{dimensions.width} channels, but the model {mismatch}. Pass one for {SDXL.title} to {option}.",
        path,
    )


def read_lllite(checkpoint: Checkpoint, option: str) -> LoadPlan[dict[str, LlliteDimensions]]:
    """Plan how to load a ControlNet-LLLite file.

    Args:
        checkpoint: The opened checkpoint.
        option: Option that names the file.

    Raises:
        CheckpointError: If the file is something else.
    """
    names = {name.partition(".")[0] for name in checkpoint.tensors if name.startswith(PREFIX)}
    if not names:
        other_names = sorted(name for name in checkpoint.tensors if name.startswith(_OTHER_PREFIX))
        if other_names:
            raise CheckpointError(
                f"{checkpoint.path} is a ControlNet-LLLite of another model (it has {other_names[0]}). "
                f"Pass one for Stable Diffusion XL to {option}.",
                checkpoint.path,
            )
        raise make_wrong_kind_error(
            checkpoint, A_LLLITE, option, "a file such as controllllite_v01032064e_sdxl_canny"
        )
    return LoadPlan(
        {name: _read_dimensions(checkpoint, name) for name in sorted(names)},
        checkpoint,
        list_tensor_sources(checkpoint),
    )


def _read_dimensions(checkpoint: Checkpoint, name: str) -> LlliteDimensions:
    """Return the dimensions of the LLLite module `name`, read from its tensors."""
    tensors = checkpoint.tensors

    def shape(ending: str, axes: tuple[int, ...]) -> tuple[int, ...]:
        info = tensors.get(f"{name}.{ending}")
        if info is None or len(info.shape) not in axes or 0 in info.shape:
            raise CheckpointError(
                f"{checkpoint.path} is not {A_LLLITE}, or is damaged: {name}.{ending} is missing or has an "
                "unexpected shape. Copy or download it again.",
                checkpoint.path,
            )
        return info.shape

    pattern = re.compile(rf"{re.escape(name)}\.conditioning1\.(\d+)\.weight")
    indices = sorted(int(match[1]) for match in map(pattern.fullmatch, tensors) if match)
    kernels = []
    for number in indices or [0]:  # if there is none, the error names layer 0
        channels, _, size, _ = shape(f"conditioning1.{number}.weight", (4,))
        kernels.append((channels, size))
    down_shape = shape("down.0.weight", (2, 4))  # rank, in_features, and a convolution's kernel
    rank, in_features = down_shape[:2]
    return LlliteDimensions(tuple(kernels), in_features, rank, is_convolution=len(down_shape) == 4)
