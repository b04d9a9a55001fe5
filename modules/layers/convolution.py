"""A 3D convolution that is also fast for small clips on a CPU."""

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available()


def conv3d(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """Compute nn.Conv3d.forward with zero padding, B C T H W to B C' T' H' W'.

    For one clip with few channels x frames x rows PyTorch chooses a plain kernel that is three to ten times
    slower than oneDNN's, which is used here.
    """
    padding = layer.padding
    assert not isinstance(padding, str)
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or layer.weight.dtype != torch.float32
    if plain or not HAS_ONEDNN or torch.is_autocast_enabled("cpu"):
        return functional.conv3d(
            x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups
        )
    return torch.mkldnn_convolution(
        x, layer.weight, layer.bias, padding, layer.stride, layer.dilation, layer.groups
    )
