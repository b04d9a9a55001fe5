"""Weights in 4 bits: bitsandbytes' nf4, with nested statistics.

The weight is cut row by row into blocks of 64, which may span rows. A code is the nearest of 16 levels to
w / max|block|; two codes form a byte, the first in its high half. The maxima are quantized to 8 bits too:
minus their mean, in blocks of 256, as one of 256 values. So a weight takes 0.516 bytes.
Sources: QLoRA, Dettmers et al. 2023, arXiv 2305.14314; the 8-bit values: Dettmers et al. 2022, arXiv
2110.02861. Torch formulas are used here; on CUDA, bitsandbytes' kernel dequantizes if it is installed.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from checkpoints.stored.forms import (
    QuantizationFormat,
    QuantizedWeight,
    Shape,
    Tensors,
    computed_dtype,
    dequantize_and_multiply,
)
from modules.integers import ceil_div
from modules.speed_options import Quantization

BLOCK, NESTED_BLOCK = 64, 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PIECE = 1 << 24  # weights rounded at a time


@lru_cache(maxsize=4)
def _make_value_pairs(device: torch.device) -> Tensor:
    """Return the two nf4 levels of each byte, 256 x 2; cached, because copying to a GPU synchronizes."""
    return torch.cartesian_prod(*[torch.tensor(LEVELS, device=device)] * 2)


@dataclass(frozen=True)
class Nf4:
    """Weights stored in nf4: uint8, [out, in / 2] if `in` is even, otherwise flat.

    The maximum of each block is quantized again, in nested blocks. A layer's other buffers are the maxima as
    8-bit codes (uint8), the float32 maximum of each nested block, the 256 values of the codes, and the mean
    of the maxima.
    """

    expand: Callable[..., Tensor] | None = None  # bitsandbytes' operation
    name = "nf4"
    companions = ("weight_absmax", "weight_nested_absmax", "weight_nested_map", "weight_offset")
    is_kept_by_default = True
    log_description = "in nf4 with nested statistics"

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Round a weight to the 16 values of nf4, in blocks of 64 divided by their largest magnitude.

        These maxima, minus their mean, are quantized to 8 bits in blocks of 256.
        """
        rows, columns = weight.shape
        shape = (rows, columns)
        packed, block_maxima = _quantize_blocks(weight.reshape(-1))
        offset = block_maxima.mean()
        maxima_codes, nested_maxima = _quantize_nested(block_maxima - offset)
        companions = (maxima_codes, nested_maxima, nested_values(weight.device), offset.view(1))
        return QuantizedWeight(self, shape, (packed.view(_packed_shape(shape)), *companions))

    def empty(self, shape: Shape) -> QuantizedWeight:
        """Return a quantized weight with its block statistics on the meta device, to plan memory."""
        blocks = ceil_div(shape[0] * shape[1], BLOCK)
        packed = torch.empty(_packed_shape(shape), dtype=torch.uint8, device="meta")
        codes = torch.empty(blocks, dtype=torch.uint8, device="meta")
        statistics = [torch.empty(size, device="meta") for size in (ceil_div(blocks, NESTED_BLOCK), 256, 1)]
        return QuantizedWeight(self, shape, (packed, codes, *statistics))

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight to `dtype`: the value of each code times the maximum of its block."""
        packed, codes, nested, values, offset = cast(tuple[Tensor, ...], tensors)
        wide = _pad_rows(values.index_select(0, codes.int()), NESTED_BLOCK) * nested[:, None]
        peaks = wide.view(-1)[: len(codes)] + offset
        if self.expand is not None:
            return self.expand(packed.reshape(-1, 1), peaks, BLOCK, "nf4", shape, dtype)
        pairs = _make_value_pairs(packed.device)
        count = math.prod(shape)
        flat = pairs.index_select(0, packed.reshape(-1).int()).view(-1)[:count]
        return (_pad_rows(flat, BLOCK) * peaks[:, None]).to(dtype).view(-1)[:count].view(shape)

    def multiply(self, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None) -> Tensor:
        """Multiply with the dequantized weight."""
        return dequantize_and_multiply(self, x.to(computed_dtype(x)), tensors, shape=shape, bias=bias)

    def cut(self, stored: QuantizedWeight, first: int, count: int) -> QuantizedWeight | None:
        """Return None: a quantization block may span the end of one row and the start of the next."""
        return None

    def join(self, parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """Return None: quantization blocks may span row ends, so weights cannot be stacked."""
        return None

    def adopt_compute_settings(self, chosen: QuantizationFormat) -> QuantizationFormat:
        """Return `chosen`, which has the compute settings, if it is nf4 too; otherwise this format."""
        return chosen if isinstance(chosen, Nf4) else self

    def check_device(self, device: torch.device) -> None:
        """Accept any device: every device can store bytes."""


def _quantize_blocks(flat_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nf4 codes of a weight (uint8, two per byte) and the maximum of each block (float32)."""
    # The weight is rounded piece by piece, so that only one piece at a time has a float32 copy.
    device = flat_weight.device
    packed = torch.empty(ceil_div(len(flat_weight), 2), dtype=torch.uint8, device=device)
    block_maxima = torch.empty(ceil_div(len(flat_weight), BLOCK), device=device)
    for start in range(0, len(flat_weight), PIECE):
        codes, maxima = _round_blocks(flat_weight[start : start + PIECE].float())
        first_byte = start // 2
        packed[first_byte : first_byte + len(codes)] = codes
        first_block = start // BLOCK
        block_maxima[first_block : first_block + len(maxima)] = maxima
    return packed, block_maxima


def _quantize_nested(centered_maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize block maxima, after subtracting their mean, to 8 bits in nested blocks."""
    nested_blocks = _pad_rows(centered_maxima, NESTED_BLOCK)
    nested_maxima = nested_blocks.abs().amax(1)
    scaled = nested_blocks / nested_maxima.clamp_min(1e-30)[:, None]  # 1e-30: blocks of zeros stay zeros
    codes = _find_nearest(scaled, nested_values(centered_maxima.device)).to(torch.uint8)
    return codes.view(-1)[: len(centered_maxima)], nested_maxima  # without the padding of the last block


def make_quantization_format(quantization: Quantization) -> Nf4:
    """Return the nf4 format for the quantization options."""
    return Nf4(quantization.product)


def prepare(quantization: Quantization, device: torch.device) -> Quantization:
    """Add bitsandbytes' dequantization function for CUDA devices if the package is installed."""
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        return quantization
    importlib.import_module("bitsandbytes")  # it registers its operations
    return replace(quantization, product=torch.ops.bitsandbytes.dequantize_4bit)


def rehearsed(quantization: Quantization) -> Quantization:
    """Return the quantization to use in a dry run.

    With bitsandbytes installed, the dry run only allocates the result, as bitsandbytes' kernel does. Without
    it, torch's formulas need several float32 copies of a weight.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return quantization
    return replace(quantization, product=_allocate_value)


def _allocate_value(
    packed: Tensor, peaks: Tensor, block: int, kind: str, shape: Shape, dtype: torch.dtype
) -> Tensor:
    """Allocate the result that bitsandbytes' operation would return, for a dry run without computing."""
    return packed.new_empty(shape, dtype=dtype)


def nested_values(device: torch.device) -> Tensor:
    """Return the 256 sorted values of an 8-bit code with a dynamic exponent: 0, 1, and both signs of 127.

    The decade from 10^(i - 7) to 10^(i - 6) has the midpoints of 2^i equal parts of its upper nine tenths.
    """
    middles = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        middles.append(10.0 ** (i - 6) * (bounds[1:] + bounds[:-1]) / 2)
    positive = torch.cat(middles)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def _round_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize blocks to 4 bits; return the packed codes and the largest magnitude in each block."""
    blocks = _pad_rows(flat, BLOCK)
    peaks = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=flat.device)
    codes = _find_nearest(blocks / peaks.clamp_min(1e-30)[:, None], levels).to(torch.uint8).view(-1)
    codes = codes[: len(flat) + len(flat) % 2]
    return codes[::2] << 4 | codes[1::2], peaks


def _find_nearest(x: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def _pad_rows(flat: Tensor, width: int) -> Tensor:
    """Reshape a flat tensor to rows of `width`, padding the last row with zeros."""
    return functional.pad(flat, (0, -len(flat) % width)).view(-1, width)


def _packed_shape(shape: Shape) -> tuple[int, int]:
    rows, columns = shape
    return (rows, columns // 2) if columns % 2 == 0 else (ceil_div(rows * columns, 2), 1)
