"""Linear layers with weights in 8 bits: rounding the weights, and computing with them.

A quantised layer stays an `nn.Linear`. Its `weight` is a frozen float8 parameter of the checkpoint's shape,
with a buffer `scale_weight` (float32: [1], [out, 1] or [out, blocks, 1]; None for a plain cast). The actual
weight is their product. `forward` is set on the layer itself, so that wrappers added later (a LoRA,
compilation) find it.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.fp8.products import fp8_linear, suits_fp8
from modules.speed_options import Quantisation

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn; larger values would become NaN
# elements rounded at once: temporaries of a few MB instead of the size of the weight
_BLOCK_ELEMENTS = 1 << 20


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 and dtype.is_floating_point


def quantise(weight: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor | None]:
    """Round a weight to float8_e4m3fn and return it with its scale (float32): weight ~ fp8 * scale.

    weight: out x in. kind "cast": clamped to +-448 and rounded, without a scale. "tensor" and "rows":
    divided by scale = max|weight| / 448, one number [1] or one per row [out, 1]; the scale of zeros is 1.
    Scale and quotient are rounded to the weight's dtype before use, unless `float32_scales` is set or the
    weight is float16, whose range is too narrow for them.
    """
    wide = quantisation.float32_scales or weight.dtype == torch.float16
    dtype = torch.float32 if wide else weight.dtype
    scale: Tensor | None = None
    if quantisation.kind != "cast":
        peak = torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True))
        if quantisation.kind != "rows":
            peak = peak.amax().reshape(1)
        scale = peak.to(dtype) / LARGEST
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight[0].numel())) if len(weight) else 1
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].to(dtype)
        if scale is not None:
            part = part / (scale if scale.ndim == 1 else scale[rows])
        rounded[rows] = part.clamp(-LARGEST, LARGEST).to(E4M3)
    return rounded, None if scale is None else scale.float()


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weight * scale, multiplied in float32 and rounded once to `dtype`.

    weight: rows x columns. scale: one number, one per row, or one per block of a row (rows x blocks x 1).
    """
    plain = weight.to(dtype, copy=True)  # multiplied in place: one copy, not two
    if scale is None:
        return plain
    if not scale.is_floating_point() or scale.ndim == 0 or scale.dtype != torch.float32:
        scale = scale.float()
    if scale.numel() == 1:
        # with as many axes as the weight: a scalar tensor would be rounded to its dtype first
        return plain.mul_(scale.reshape([1] * weight.ndim))
    if scale.ndim == 3:
        plain.unflatten(1, (scale.shape[1], -1)).mul_(scale)  # rows x blocks x width of a block
        return plain
    return plain.mul_(scale.reshape(-1, *[1] * (weight.ndim - 1)))


def store_scale(scale: Tensor) -> Tensor:
    """Return a file's scale as layers store it: float32, [1], [out, 1] or [out, blocks, 1]."""
    if scale.numel() == 1:
        return scale.float().reshape(1)
    return scale.float() if scale.ndim == 3 else scale.float().reshape(-1, 1)


def attach(layer: nn.Linear, weight: Tensor, scale: Tensor | None, quantisation: Quantisation) -> None:
    """Give a layer its 8-bit weight, its scale and a forward that computes with them.

    The layer computes in autocast's dtype (without autocast in its input's), or in float32 if
    `float32_linear` is set. With a `product` it multiplies in 8 bits whenever `suits_fp8` allows it.
    """
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_buffer("scale_weight", scale)
    layer.quantisation = quantisation  # type: ignore[assignment]
    # a method, not a partial: compiled code would know the layer by its partial, and be compiled per block
    layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    # x: ... in -> ... out
    quantisation = layer.quantisation
    assert isinstance(quantisation, Quantisation)
    if quantisation.product is not None and suits_fp8(x, layer.weight, scale_of(layer)):
        return fp8_linear(x, layer.weight, scale_of(layer), layer.bias, quantisation.product)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not quantisation.float32_linear:
        return multiply(x.to(dtype), layer.weight, scale_of(layer), layer.bias)
    with torch.autocast(kind, enabled=False):
        return multiply(x.float(), layer.weight, scale_of(layer), layer.bias).to(dtype)


def scale_of(layer: nn.Linear) -> Tensor | None:
    scale = layer.scale_weight
    assert scale is None or isinstance(scale, Tensor)
    return scale


def multiply(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute x @ (weight * scale)^T + bias in the dtype of x; gradients flow to x and bias."""
    out: Tensor = _Product.apply(x, weight, scale, None if bias is None else bias.to(x.dtype))
    return out


class _Product(torch.autograd.Function):
    """Linear layer that keeps only its 8-bit weight for the backward pass, and dequantises it again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, dequantise(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        of_x = gradient @ dequantise(weight, scale, gradient.dtype) if ctx.needs_input_grad[0] else None
        return of_x, None, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


def linear_weights(
    module: nn.Module, lists: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> frozenset[str]:
    """Return the names of the weights of linear layers.

    lists: only layers below these names. exclude: skip names that contain one of these.
    """
    begin = None if lists is None else tuple(f"{name}." for name in lists)
    return frozenset(
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and (begin is None or name.startswith(begin))
        and not any(part in f"{name}.weight" for part in exclude)
    )
