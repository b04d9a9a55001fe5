"""Weights in float8_e4m3fn (in files also e5m2), as they are or divided by scales.

The companion `scale_weight` is float32: [1], [out, 1] or [out, blocks, 1]; None for a plain cast. The value
is the product of weight and scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from modules.errors import OptionError
from modules.speed_options import Quantization

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn; larger values would become NaN
# elements rounded at a time: temporaries of a few MB instead of the size of the weight
_BLOCK_ELEMENTS = 1 << 20


def is_fp8(dtype: torch.dtype) -> bool:
    """Return whether a dtype is an 8-bit floating-point type."""
    return dtype.itemsize == 1 and dtype.is_floating_point


def quantize(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor | None]:
    """Round a weight to float8_e4m3fn; return it with its float32 scale, so that weight ~ fp8 * scale.

    `weight` is out x in. The kind "cast" clamps it to +-448 and rounds it, without a scale. "tensor" and
    "rows" divide it by scale = max|weight| / 448, one number [1] or one per row [out, 1]; the scale of zeros
    is 1. Scale and quotient are rounded to the weight's dtype before use, unless `float32_scales` is set or
    the weight is float16, whose range is too narrow for them.
    """
    is_wide = quantization.float32_scales or weight.dtype == torch.float16
    dtype = torch.float32 if is_wide else weight.dtype
    scale: Tensor | None = None
    if quantization.kind != "cast":
        scale = _find_scale(weight, dtype, by_row=quantization.kind == "rows")
    rounded = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    rows_per_block = 1
    if len(weight):
        rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows_per_block):
        rows = slice(start, start + rows_per_block)
        values = weight[rows].to(dtype)
        if scale is not None:
            values = values / (scale if scale.ndim == 1 else scale[rows])
        rounded[rows] = values.clamp(-LARGEST, LARGEST).to(E4M3)
    return rounded, None if scale is None else scale.float()


def _find_scale(weight: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    """Return the fp8 scale max|weight| / 448 as one value or one per row; 1 where all weights are 0."""
    peak = torch.maximum(weight.amax(dim=1, keepdim=True), -weight.amin(dim=1, keepdim=True))
    if not by_row:
        peak = peak.amax().reshape(1)
    scale = peak.to(dtype) / LARGEST
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weight * scale, multiplied in float32 and rounded once to `dtype`.

    `weight` is rows x columns. `scale` is one number, one per row, or one per block of a row (rows x blocks x
    1).
    """
    values = weight.to(dtype, copy=True)  # multiplied in place, to need one copy instead of two
    if scale is None:
        return values
    if not scale.is_floating_point() or scale.ndim == 0 or scale.dtype != torch.float32:
        scale = scale.float()
    if scale.numel() == 1:
        # with as many axes as the weight: a scalar tensor would be rounded to its dtype first
        return values.mul_(scale.reshape([1] * weight.ndim))
    if scale.ndim == 3:
        values.unflatten(1, (scale.shape[1], -1)).mul_(scale)  # rows x blocks x width of a block
        return values
    return values.mul_(scale.reshape(-1, *[1] * (weight.ndim - 1)))


def store_scale(scale: Tensor) -> Tensor:
    """Convert a scale from a file to float32 in the layer's shape: [1], [out, 1] or [out, blocks, 1]."""
    if scale.numel() == 1:
        return scale.float().reshape(1)
    return scale.float() if scale.ndim == 3 else scale.float().reshape(-1, 1)


@dataclass(frozen=True)
class Fp8:
    """Format of weights stored in fp8.

    Layers compute in float32 if `float32_linear` is set. If `product` is set, they multiply in fp8 whenever
    `suits_fp8` accepts their inputs.
    """

    quantization: Quantization = Quantization("cast")
    name = "fp8"
    companions = ("scale_weight",)
    is_kept_by_default = False  # without an option, the model computes like the 16-bit file

    @property
    def log_description(self) -> str:
        """Description of the format for the log."""
        return "cast to fp8" if self.quantization.kind == "cast" else "in fp8 with a scale per row"

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Quantize a weight to fp8: cast it, or first divide it by its scales, depending on the options."""
        rows, columns = weight.shape
        return QuantizedWeight(self, (rows, columns), quantize(weight, self.quantization))

    def empty(self, shape: Shape) -> QuantizedWeight:
        """Return a weight on the meta device, to plan memory; its negligible scales are omitted."""
        return QuantizedWeight(self, shape, (torch.empty(shape, dtype=E4M3, device="meta"), None))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight: multiply it by its scale in `dtype`."""
        weight, scale = tensors
        assert weight is not None
        return dequantize(weight, scale, dtype)

    def multiply(self, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None) -> Tensor:
        """Multiply in fp8 if the inputs and the device allow it, otherwise with the dequantized weight."""
        weight, scale = tensors
        if self.quantization.product is not None:
            from checkpoints.stored.fp8_products import fp8_linear, suits_fp8  # of no use without the units

            assert weight is not None
            if suits_fp8(x, weight, scale):
                return fp8_linear(x, weight, scale, bias, product=self.quantization.product)
        dtype = computed_dtype(x)
        if not self.quantization.float32_linear:
            return dequantize_and_multiply(self, x.to(dtype), tensors, shape=shape, bias=bias)
        with torch.autocast(x.device.type, enabled=False):
            return dequantize_and_multiply(self, x.float(), tensors, shape=shape, bias=bias).to(dtype)

    def cut(self, stored: QuantizedWeight, first: int, count: int) -> QuantizedWeight | None:
        """Return `count` rows of an fp8 weight with their scales, starting at row `first`.

        Per-block scales are cut too, which requires whole blocks; a scale for the entire weight is kept.
        """
        scale = stored.tensors[1]
        part = stored.weight[first : first + count].contiguous()
        if scale is not None:
            # either for the whole weight, or with one row per block of rows
            block, remainder = divmod(stored.shape[0], len(scale))
            if not (remainder or first % block or count % block):
                scale = scale[first // block : (first + count) // block]
        return QuantizedWeight(self, (count, stored.shape[1]), (part, scale))

    def join(self, parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """Concatenate fp8 weights along rows, with one scale per row; return None if dtypes differ."""
        dtypes = {part.weight.dtype for part in parts}
        if len(dtypes) > 1:
            return None
        weight = torch.cat([part.weight.view(torch.uint8) for part in parts]).view(*dtypes)
        scales = [
            torch.ones(1, device=weight.device) if part.tensors[1] is None else part.tensors[1]
            for part in parts
        ]
        if not any(scale.ndim == 3 for scale in scales):
            scales = [scale.expand(part.shape[0], 1) for scale, part in zip(scales, parts, strict=True)]
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return QuantizedWeight(self, shape, (weight, torch.cat(scales)))

    def adopt_compute_settings(self, chosen: QuantizationFormat) -> QuantizationFormat:
        """Return `chosen`, which has the compute settings, if it is fp8 too; otherwise this format."""
        return chosen if isinstance(chosen, Fp8) else self

    def check_device(self, device: torch.device) -> None:
        """Check that the device supports fp8.

        Raises:
            OptionError: For Apple GPUs.
        """
        if device.type == "mps":
            raise OptionError("Apple's GPUs do not support fp8: omit the fp8 options, or use --device cpu")


make_quantization_format = Fp8


def make_fp8_weight(weight: Tensor, scale: Tensor | None = None) -> QuantizedWeight:
    """Convert a file's fp8 weight, with its scale if it has one, to the format that layers use."""
    rows, columns = weight.shape
    return QuantizedWeight(Fp8(), (rows, columns), (weight, None if scale is None else store_scale(scale)))


def prepare(quantization: Quantization, device: torch.device) -> Quantization:
    """Add the device's fp8 matrix product for --fp8_fast; raise OptionError if the device lacks fp8 units."""
    if not quantization.fp8_matmul:
        return quantization
    from checkpoints.stored.fp8_products import select_product  # of no use without the units

    return replace(quantization, product=select_product(device))


def rehearsed(quantization: Quantization) -> Quantization:
    """Return the quantization unchanged for a dry run.

    8-bit matrix products take as much memory as 16-bit products.
    """
    return quantization
