"""In which dtype a layer computes: its own, autocast's, or float32 whatever surrounds it."""

import torch
from torch import Tensor, nn


def activation_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """What activations between layers are kept in: autocast's dtype where it is on, else that of the
    weights.
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) with x in the dtype of the layer's weight; under autocast the layer chooses, as it does with
    fp8 weights.
    """
    dtype = _weight_dtype(layer)
    if x.dtype == dtype or dtype.itemsize == 1 or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    return layer(x.to(dtype))


def run_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) outside autocast, in float32 (in the dtype of its weight, should that be narrower).

    Returns float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(_weight_dtype(layer))).float()


def _weight_dtype(layer: nn.Module) -> torch.dtype:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
