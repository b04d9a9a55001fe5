"""VGG16's features of pictures, from torchvision's file: convolutions with a ReLU each, and poolings.

Layers have torchvision's numbers (`features.19` is conv4_2, 20 its ReLU), and all sizes are read off the
file: where it has no weights, a ReLU follows a convolution and a pooling follows a ReLU. Source: Simonyan and
Zisserman 2014, arXiv 1409.1556.
"""
# Letters: B pictures, H W pixels, C width

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.checkpoints.dialects import LoadPlan, load_planned, other_kind
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.errors import OptionError

OPTION = "--vgg16_guidance_model"
RELEASE = "torchvision's vgg16-397923af.pth"
_START = "features."
# statistics of the pictures it was trained on, RGB in 0..1: torchvision's documentation of the weights
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# of each layer: channels of a convolution before and behind it, "relu" or "pool"
_Layer = tuple[int, int] | str


class Vgg16(nn.Module):
    """The layers up to the one whose features are compared."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        self.features = nn.Sequential(*map(_make_layer, layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features B C h w in the compute dtype. pixels: B 3 H W, in 0..1."""
        weight = next(self.features.parameters())
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        return self.features(((pixels - mean) / std).to(weight.device, weight.dtype))


def load_vgg16(path: Path, last: int, device: torch.device, dtype: torch.dtype) -> Vgg16:
    """Load the layers up to that number; on the meta device they are compared and not read.

    Raises CheckpointError if the file holds something else, OptionError if it has no such layer.
    """
    with open_checkpoint(path) as checkpoint:
        layers = _plan_layers(checkpoint, last)
        sources = plain_sources(checkpoint)
        names = [f"{_START}{number}.{part}" for number in range(last + 1) for part in ("weight", "bias")]
        own = {name: sources[name] for name in names if name in sources}
        return load_planned(LoadPlan(layers, checkpoint, own, ("*",)), Vgg16, device, dtype, OPTION)


def _plan_layers(checkpoint: Checkpoint, last: int) -> list[_Layer]:
    channels, layers = 3, list[_Layer]()
    for number in range(last + 1):
        info = checkpoint.tensors.get(f"{_START}{number}.weight")
        if info is None and layers:
            layers.append("relu" if isinstance(layers[-1], tuple) else "pool")
            if layers[-2:] == ["pool", "pool"]:
                raise OptionError(
                    f"--vgg16_guidance_layer {last}: the last layer in {checkpoint.path} is {number - 1}. "
                    f"Give a lower one, or {RELEASE} to {OPTION}"
                )
        elif info is None or len(info.shape) != 4 or info.shape[1:] != (channels, 3, 3) or not info.shape[0]:
            raise other_kind(checkpoint, "VGG16", OPTION, RELEASE)
        else:
            layers.append((channels, info.shape[0]))
            channels = info.shape[0]
    return layers


def _make_layer(layer: _Layer) -> nn.Module:
    if isinstance(layer, tuple):
        return nn.Conv2d(*layer, kernel_size=3, padding=1)
    return nn.ReLU(inplace=True) if layer == "relu" else nn.MaxPool2d(2)
