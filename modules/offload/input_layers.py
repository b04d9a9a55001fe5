"""Keep the weights of layers on the device only while these layers run."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def offload_layer(layer: nn.Module, host: Tensor, device: torch.device) -> None:
    """Keep the layer's weight in host memory, except while its forward runs.

    host: that memory, already holding the weight. For frozen layers at the start of a network: if their
    backward pass needs the weight, autograd keeps it on the device.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = host
    layer.forward = functools.partial(_run_moved, layer.forward, weight, host, device)


def _run_moved(
    forward: Callable[..., Any],
    weight: nn.Parameter,
    host: Tensor,
    device: torch.device,
    *inputs: Any,
    **named: Any,
) -> Any:
    # copied in the computing stream: no waiting is needed
    weight.data = host.to(device, non_blocking=True, copy=True)
    try:
        return forward(*inputs, **named)
    finally:
        weight.data = host
