"""The dtype that a layer computes in: its own, autocast's, or always float32."""

import torch
from torch import Tensor, nn


def activation_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """Return the dtype of activations between layers: autocast's if it is on, else that of the weights."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


def in_own_dtype(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) with x cast to the dtype of the layer's weight.

    Under autocast, and with fp8 weights, x is not cast: the layer chooses.
    """
    dtype = _weight_dtype(layer)
    if x.dtype == dtype or dtype.itemsize == 1 or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    return layer(x.to(dtype))


def run_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) as float32, computed outside autocast in the dtype of the layer's weight."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(_weight_dtype(layer))).float()


def _weight_dtype(layer: nn.Module) -> torch.dtype:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
