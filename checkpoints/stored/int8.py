"""Weights in int8 with a scale for each row, most of them rotated first (ConvRot).

An outlier would make all other values of its row less precise. Columns are therefore multiplied in groups by
the regular Hadamard matrix H, which spreads it: symmetric, H H = 1, entries +-1 / sqrt(group), each row sums
to 1. The effective weight is (q * scale) H; the input is rotated too, so that both factors are int8:

    output           y = (x8 q^T) * t * scale + b, with x H = x8 * t, one t = max|x H| / 127 for each token
    input gradient   dx = (dy (q * scale)) H in 16 bits, or with dy * scale rounded by tokens to int8 too

For up to 16 tokens, which int8 hardware does not speed up, x is not rounded. Rounding x counts as the
identity for gradients. Source: ConvRot, arXiv 2512.03673; H is a Kronecker power of its 4 x 4 matrix.
"""
# Letters: M tokens, K input features, N output features

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from checkpoints.stored.forms import (
    QuantizationFormat,
    QuantizedWeight,
    Shape,
    Tensors,
    computed_dtype,
    dequantize_and_multiply,
)
from modules.private_torch import int8_product
from modules.speed_options import Quantization

GROUPS = (256, 64, 16)  # columns that are rotated together: the first that divides a layer's width
LARGEST = 127
MIN_SCALE = 1e-30  # so that zeros are not divided by zero
FEW_TOKENS = 16
PIECE = 1 << 24  # values that have a float32 copy at a time: 64 MiB


@dataclass(frozen=True)
class Int8:
    """Format of weights stored in int8, with a float32 scale per row (buffer `scale_weight`, out x 1)."""

    group: int | None = None  # columns that are rotated together; 0: none; None: by the width of a layer
    rounds_gradients: bool = False
    name = "int8"
    companions = ("scale_weight",)
    is_kept_by_default = True

    @property
    def log_description(self) -> str:
        """Description of the format for the log."""
        rotated = f"rotated in groups of {self.group}" if self.group else "not rotated: no group divides them"
        return f"in int8 with a scale per row, {rotated}"

    def _for_width(self, columns: int) -> "Int8":
        if self.group is not None:
            return self
        return replace(self, group=next((group for group in GROUPS if columns % group == 0), 0))

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Rotate a weight in groups of columns, then quantize it to int8 with one scale per row."""
        rows, columns = weight.shape
        form = self._for_width(columns)
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        scales = torch.empty(rows, 1, device=weight.device)
        for part in _split_rows(weight):
            codes[part], scales[part] = round_rows(rotate(weight[part], form.group))
        return QuantizedWeight(form, (rows, columns), (codes, scales))

    def empty(self, shape: Shape) -> QuantizedWeight:
        """Return a quantized weight with codes and scales on the meta device, to plan memory."""
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return QuantizedWeight(
            self._for_width(shape[1]), shape, (codes, torch.empty(shape[0], 1, device="meta"))
        )

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight to `dtype`: multiply the codes by the scales, then undo the rotation."""
        codes, scale = _pair(tensors)
        return _by_parts(lambda part: rotate(_scale_codes(codes, scale, part), self.group), codes, dtype)

    def multiply(self, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None) -> Tensor:
        """Multiply in int8; for few tokens and on Apple GPUs, use the dequantized weight instead."""
        dtype = computed_dtype(x)
        codes, scale = _pair(tensors)
        if x.device.type == "mps" or x.numel() <= FEW_TOKENS * shape[1]:  # torch has no int8 products there
            return dequantize_and_multiply(self, x.to(dtype), tensors, shape=shape, bias=bias)
        out: Tensor = _Int8Product.apply(x, codes, scale, bias, dtype, self)
        return out

    def cut(self, stored: QuantizedWeight, first: int, count: int) -> QuantizedWeight | None:
        """Return `count` rows of an int8 weight and their scales, starting at row `first`."""
        codes, scale = _pair(stored.tensors)
        rows = slice(first, first + count)
        return QuantizedWeight(self, (count, stored.shape[1]), (codes[rows], scale[rows]))

    def join(self, parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """Concatenate int8 weights and their scales along rows."""
        pairs = [_pair(part.tensors) for part in parts]
        codes, scales = (torch.cat(column) for column in zip(*pairs, strict=True))
        return QuantizedWeight(self, (len(codes), parts[0].shape[1]), (codes, scales))

    def adopt_compute_settings(self, chosen: QuantizationFormat) -> QuantizationFormat:
        """Return this format, with the gradient rounding of the chosen format if that is int8 too."""
        if not isinstance(chosen, Int8):
            return self
        return replace(self, rounds_gradients=chosen.rounds_gradients)

    def check_device(self, device: torch.device) -> None:
        """Accept any device: every device can store int8."""


def make_quantization_format(quantization: Quantization) -> Int8:
    """Return the int8 format for the quantization options."""
    return Int8(rounds_gradients=quantization.int8_backward)


def prepare(quantization: Quantization, device: torch.device) -> Quantization:
    """Return the quantization unchanged, because int8 works on any device."""
    return quantization


def rehearsed(quantization: Quantization) -> Quantization:
    """Return the quantization unchanged for a dry run.

    8-bit matrix products take as much memory as 16-bit products.
    """
    return quantization


class _Int8Product(torch.autograd.Function):
    """Linear layer that multiplies in int8; for the backward pass, it saves only its quantized weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        form: Int8,
    ) -> Tensor:
        """Multiply x by an int8 weight in 8 bits; rows of x are rotated and rounded with one scale each."""
        ctx.save_for_backward(codes, scale)
        ctx.form = form
        ctx.dtype = x.dtype
        flat = x.reshape(-1, x.shape[-1])

        def product(part: slice) -> Tensor:
            rounded, by_token = round_rows(rotate(flat[part], form.group))
            return int8_product(rounded, codes.t()).float() * by_token * scale.view(1, -1)

        out = _by_parts(product, flat, dtype, len(codes))
        if bias is not None:
            out = out + bias.to(dtype)
        return out.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        form = ctx.form
        flat = gradient.reshape(-1, gradient.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            make_product = _multiply_in_int8 if form.rounds_gradients else _multiply_dequantized
            product = make_product(flat, codes, scale, form.group)
            in_features = codes.shape[1]
            grad_x = _by_parts(product, flat, ctx.dtype, in_features)
            grad_x = grad_x.view(*gradient.shape[:-1], in_features)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None, None


def _multiply_in_int8(
    gradients: Tensor, codes: Tensor, scale: Tensor, group: int
) -> Callable[[slice], Tensor]:
    """Return a function that maps a slice of output gradients to input gradients, in int8."""
    # column-major, as int8 units need it; freed with the function that is returned
    columns = codes.t().contiguous().t()

    def product(part: slice) -> Tensor:
        rounded, by_token = round_rows(gradients[part].float() * scale.view(1, -1))
        return rotate(int8_product(rounded, columns).float() * by_token, group)

    return product


def _multiply_dequantized(
    gradients: Tensor, codes: Tensor, scale: Tensor, group: int
) -> Callable[[slice], Tensor]:
    """Return a function that maps a slice of output gradients to input gradients, without int8."""
    plain = _by_parts(lambda part: _scale_codes(codes, scale, part), codes, gradients.dtype)

    def product(part: slice) -> Tensor:
        return rotate(gradients[part] @ plain, group)

    return product


def rotate(x: Tensor, group: int | None) -> Tensor:
    """Multiply each group of columns by the Hadamard matrix in float32; do nothing for group 0 or None.

    `x` is rows x columns. In bf16, 9 % of the codes would change.
    """
    x = x.float()
    if not group:
        return x
    # H of size group is the Kronecker product of H of sizes group / 16 and 16: an eighth of the operations
    with torch.autocast(x.device.type, enabled=False):
        inner = x.reshape(-1, group // 16, 16) @ hadamard(16, x.device)
        return (inner if group == 16 else hadamard(group // 16, x.device) @ inner).view(x.shape)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the orthogonal Hadamard matrix of size 4 or 16 with equal row sums."""
    return _make_hadamard(size, device) if torch.compiler.is_compiling() else _hadamard_once(size, device)


def _make_hadamard(size: int, device: torch.device) -> Tensor:
    # size 4 is negative on the antidiagonal; size 16, where exactly one of the base-4 digit pairs is on it
    place = torch.arange(size, device=device)
    low, high = place % 4, place // 4
    sign = 1 - 2 * (low[:, None] + low == 3).float()
    if size == 16:
        sign = sign * (1 - 2 * (high[:, None] + high == 3).float())
    return sign / size**0.5


_hadamard_once = lru_cache(maxsize=16)(_make_hadamard)  # each call would launch eight kernels per layer


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 rows to int8 (round half to even); return codes and row scales, M x 1 float32."""
    scales = (x.abs().amax(1, keepdim=True) / LARGEST).clamp_min(MIN_SCALE)
    return (x / scales).round().clamp(-128, 127).to(torch.int8), scales


def _pair(tensors: Tensors) -> tuple[Tensor, Tensor]:
    codes, scale = tensors
    assert codes is not None
    assert scale is not None
    return codes, scale


def _scale_codes(codes: Tensor, scale: Tensor, part: slice) -> Tensor:
    return codes[part] * scale[part]


def _split_rows(x: Tensor) -> list[slice]:
    """Split the rows of x into slices, so that only one needs float32 at a time; no split while compiling."""
    rows = len(x) if torch.compiler.is_compiling() else max(FEW_TOKENS + 1, PIECE // max(1, x.shape[1]))
    if len(x) <= rows:
        return [slice(None)]
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _by_parts(
    make: Callable[[slice], Tensor], x: Tensor, dtype: torch.dtype, columns: int | None = None
) -> Tensor:
    """Apply `make` to slices of the rows of x, and join the results in a dtype."""
    # `columns` is the number of columns of the result; None if it equals that of x.
    parts = _split_rows(x)
    if len(parts) == 1:
        return make(parts[0]).to(dtype)
    out = torch.empty(len(x), x.shape[1] if columns is None else columns, dtype=dtype, device=x.device)
    for part in parts:
        out[part] = make(part)
    return out
