"""ControlNet-LLLite: small networks that change what single layers of SDXL's U-Net take, after a guide image.

A module turns the guide into tokens of its layer by convolutions whose kernels do not overlap, joins them to
the layer's input, which it projects down, and projects the result up again:

    layer(x + multiplier * up(mid(join(conditioning1(guide), down(x)))))

Positive and negative rows are changed alike. Source: the documents and files of kohya-ss/controlnet-lllite.
"""
# Letters: B pictures, R rows, L tokens, C width of the layer's input, E width of the guide's embedding

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from modules.checkpoints.dialects import LoadPlan, load_planned, other_kind
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

OPTION = "--control_net_lllite_models"
PREFIX = "lllite_unet_"  # then the layer's path in the released files, with "_" for "."
_OTHER_PREFIX = "lllite_"  # of other models than SDXL
_WHAT = "a ControlNet-LLLite for Stable Diffusion XL"


@dataclass(frozen=True)
class LllitePart:
    """Dimensions of the module of one layer."""

    convolutions: tuple[tuple[int, int], ...]  # (channels, kernel and stride), one after the other
    width: int  # of the layer's input
    rank: int  # of what it is projected down to
    is_convolution: bool  # the layer's input is R C h w, else R L C

    @property
    def reduction(self) -> int:
        """How many pixels of the guide become one token, in each direction."""
        product = 1
        for _, stride in self.convolutions:
            product *= stride
        return product


class LlliteModule(nn.Module):
    """The change of one layer's input. Attribute names are those of the files."""

    def __init__(self, part: LllitePart) -> None:
        super().__init__()
        self.part = part
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in part.convolutions:
            layers += [nn.Conv2d(channels, width, kernel_size=stride, stride=stride), nn.ReLU()]
            channels = width
        self.conditioning1 = nn.Sequential(*layers[:-1])  # no activation after the last
        self.down = nn.Sequential(self._layer(part.width, part.rank), nn.ReLU())
        self.mid = nn.Sequential(self._layer(part.rank + channels, part.rank), nn.ReLU())
        self.up = nn.Sequential(self._layer(part.rank, part.width))

    def _layer(self, width: int, out: int) -> nn.Module:
        return nn.Conv2d(width, out, kernel_size=1) if self.part.is_convolution else nn.Linear(width, out)

    def embed(self, guides: Tensor) -> Tensor:
        """Return the guides' embedding: B 3 H W in -1..1 -> B L E, or B E h w where the layer convolves."""
        height, width = guides.shape[2:]
        step = self.part.reduction
        # the U-Net rounds its sizes up; an edge that is not a whole step is repeated, as strides round down
        missing = (0, -width % step, 0, -height % step)
        found = self.conditioning1(nn.functional.pad(guides, missing, mode="replicate"))
        return found if self.part.is_convolution else rearrange(found, "b e h w -> b (h w) e")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # x: R L C or R C h w    embedding: B L E or B E h w; row r belongs to picture r modulo B
        axis = 1 if self.part.is_convolution else 2
        rows = embedding.repeat(x.shape[0] // embedding.shape[0], *(1,) * (embedding.ndim - 1))
        return self.up(self.mid(torch.cat([rows, self.down(x)], dim=axis)))


class Lllite(nn.Module):
    """All modules of one file, by the file's names of layers."""

    def __init__(self, parts: Mapping[str, LllitePart]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, LlliteModule(part))


def read_lllite(checkpoint: Checkpoint) -> LoadPlan[dict[str, LllitePart]]:
    """Plan how to load a file of ControlNet-LLLite. Raises CheckpointError if it is another file."""
    names = {name.partition(".")[0] for name in checkpoint.tensors if name.startswith(PREFIX)}
    if not names:
        others = sorted(name for name in checkpoint.tensors if name.startswith(_OTHER_PREFIX))
        if others:
            raise CheckpointError(
                f"{checkpoint.path} is a ControlNet-LLLite of another model (it has {others[0]}). "
                f"Give one for Stable Diffusion XL to {OPTION}.",
                checkpoint.path,
            )
        raise other_kind(checkpoint, _WHAT, OPTION, "a file such as controllllite_v01032064e_sdxl_canny")
    return LoadPlan(
        {name: _read_part(checkpoint, name) for name in sorted(names)}, checkpoint, plain_sources(checkpoint)
    )


def _read_part(checkpoint: Checkpoint, name: str) -> LllitePart:
    tensors = checkpoint.tensors

    def shape(ending: str, axes: tuple[int, ...]) -> tuple[int, ...]:
        info = tensors.get(f"{name}.{ending}")
        if info is None or len(info.shape) not in axes or 0 in info.shape:
            raise CheckpointError(
                f"{checkpoint.path} is not {_WHAT} as known: {name}.{ending} is missing or has another "
                "shape. Copy or download it again.",
                checkpoint.path,
            )
        return info.shape

    places = sorted(
        int(place)
        for place in (
            other.removeprefix(f"{name}.conditioning1.").removesuffix(".weight")
            for other in tensors
            if other.startswith(f"{name}.conditioning1.") and other.endswith(".weight")
        )
        if place.isdecimal()
    )
    kernels = [shape(f"conditioning1.{place}.weight", (4,)) for place in places or [0]]
    down = shape("down.0.weight", (2, 4))
    return LllitePart(
        tuple((kernel[0], kernel[2]) for kernel in kernels), down[1], down[0], is_convolution=len(down) == 4
    )


def load_lllite(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Lllite:
    """Load an open file. Raises CheckpointError as `read_lllite`, or if tensors do not fit together."""
    return load_planned(read_lllite(checkpoint), Lllite, device, dtype, _WHAT)
