"""Layers whose weights are on the device during their own calls only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def offload_layer(layer: nn.Module, host: Tensor, device: torch.device) -> None:
    """From now on the layer's weight is in host memory but while its forward runs. host: that memory, holding
    the weight.

    For frozen layers at the beginning of a network. Should their backward pass need the weight, autograd
    keeps it on the device.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = host
    layer.forward = functools.partial(_run, layer.forward, weight, host, device)


def _run(
    forward: Callable[..., Any],
    weight: nn.Parameter,
    host: Tensor,
    device: torch.device,
    *inputs: Any,
    **named: Any,
) -> Any:
    # in the stream that computes: no waiting is needed
    weight.data = host.to(device, non_blocking=True, copy=True)
    try:
        return forward(*inputs, **named)
    finally:
        weight.data = host
