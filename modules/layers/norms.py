"""Normalization layers of the transformers, compute dtypes of layers, and networks of two or three layers.

Norms compute in float32, because bf16 sums over a thousand channels lose precision.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def activation_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """Return a layer's compute dtype: autocast's if autocast is enabled, else the dtype of the weights."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


def run_in_weight_dtype(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x), with x cast to the weight's dtype, unless autocast or the fp8 layer casts it."""
    dtype: torch.dtype = layer.weight.dtype
    if x.dtype == dtype or dtype.itemsize == 1 or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    return layer(x.to(dtype))


def run_float32(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) as float32, computed without autocast in the weight's dtype (8-bit: in float32)."""
    dtype: torch.dtype = layer.weight.dtype
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(torch.float32 if dtype.itemsize == 1 else dtype)).float()


class TwoLayerMlp(nn.Module):
    """second(activation(first(x))), ... C -> ... C'; computes in the dtype of each layer, or in float32."""

    def __init__(
        self,
        names: str,
        sizes: tuple[int, int, int],
        activation: Callable[[Tensor], Tensor] = functional.silu,
        bias: bool = True,
        in_float32: bool = False,
    ) -> None:
        """Create two linear layers with an activation between them.

        Args:
            names: Names of the two layers in files, separated by a space, such as "fc1 fc2".
            sizes: Widths of the input, between the layers, and of the output.
            activation: Activation between the layers.
            bias: Whether the layers have a bias.
            in_float32: Whether to compute in float32 instead of the layers' own dtype.
        """
        super().__init__()
        self._first, self._second = names.split()
        self.add_module(self._first, nn.Linear(sizes[0], sizes[1], bias=bias))
        self.add_module(self._second, nn.Linear(sizes[1], sizes[2], bias=bias))
        self._activation = activation
        self._run = run_float32 if in_float32 else run_in_weight_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of both layers, ... C' for ... C."""
        hidden = self._activation(self._run(getattr(self, self._first), x))
        return self._run(getattr(self, self._second), hidden)


class SwiGlu(nn.Module):
    """Gated feed-forward: down(silu(gate x) * up x). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, names: str, dim: int, hidden: int) -> None:
        """Create the three linear layers, without biases.

        Args:
            names: Names in files of the layers gate, up and down, separated by spaces.
            dim: Width of the input and of the output.
            hidden: Width between the layers.
        """
        super().__init__()
        self._gate, self._up, self._down = names.split()
        self.add_module(self._gate, nn.Linear(dim, hidden, bias=False))
        self.add_module(self._up, nn.Linear(dim, hidden, bias=False))
        self.add_module(self._down, nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to tokens x, ... C."""
        gates = functional.silu(run_in_weight_dtype(getattr(self, self._gate), x))
        values = run_in_weight_dtype(getattr(self, self._up), x)
        output: Tensor = run_in_weight_dtype(getattr(self, self._down), gates * values)
        return output


class NamedFeedForward(nn.Module):
    """`TwoLayerMlp` with the parameter names of diffusers: net.0.proj and net.2."""

    def __init__(
        self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor], bias: bool = True
    ) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(dim, hidden, bias=bias)})
        # the second entry is dropout in the released code and has no weights
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, dim, bias=bias)])
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of both layers, ... C' for ... C."""
        first, _, last = self.net
        return run_in_weight_dtype(last, self._activation(run_in_weight_dtype(first["proj"], x)))  # type: ignore[index]


class Float32LayerNorm(nn.Module):
    """LayerNorm over the last axis that returns float32, for modulation in float32; the caller casts back."""

    def __init__(self, dim: int, eps: float, affine: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values in float32."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(x.float(), (self.dim,), weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of x.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values in the dtype of `x`."""
        return rms_norm(x, self.weight, self.eps)


class CenteredRMSNorm(RMSNorm):
    """`RMSNorm` whose files store weight - 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values in the dtype of `x`."""
        return rms_norm(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)


class ScaleNorm(nn.Module):
    """`RMSNorm` whose weight is called `scale`, as in the files of some models."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values in the dtype of `x`."""
        return rms_norm(x, self.scale, self.eps)


class CenteredNorm(ScaleNorm):
    """`ScaleNorm` whose files store scale - 1. Computes in float32, because 16 bits would round the scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.scale)
        # the state of a frozen scale, and 1 + scale in float32, computed once for all passes
        self._known: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values in the dtype of `x`."""
        return self.in_float32(x).to(x.dtype)

    def in_float32(self, x: Tensor) -> Tensor:
        """Return the normalized values in float32, for float32 layers that follow."""
        return rms_norm(x.float(), self._weight(), self.eps)

    def _weight(self) -> Tensor:
        """Return 1 + scale in float32."""
        scale = self.scale
        if scale.requires_grad or torch.compiler.is_compiling():
            return 1 + scale.float()
        state = (id(scale), scale._version, scale.dtype, scale.device)
        if self._known is None or self._known[0] != state:
            with torch.inference_mode(False):  # it may be made while sampling and reused in training
                self._known = state, 1 + scale.detach().float()
        return self._known[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of x.

    `weight` has one value per channel, C.
    """
    # torch's kernel accumulates and scales in float32 and rounds once at the end; autocast would pass it
    # a float32 copy of x, which autograd would keep
    with torch.autocast(x.device.type, enabled=False):
        return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
