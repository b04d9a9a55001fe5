"""Weights packed by other programs, which are read but not written: mxfp8, nvfp4, int4 in three layouts.

The weight and each companion have one row per output, or a single row for all outputs, so that all can be
cut and joined by rows; tiled scales are converted to rows while loading. Formulas and nibble orders:
comfy-kitchen 0.2.40, whose CPU back end the tests compare with.
"""

# Letters: N rows (outputs), K columns (inputs), G columns that share a scale

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

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
from checkpoints.stored.int8 import rotate

_PIECE = 1 << 22  # values decoded at a time: float32 temporaries of 16 MiB
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class PackedRowFormat:
    """Quantization format that can dequantize any of its N rows; each stored tensor has N rows or one row."""

    name: str
    companions: tuple[str, ...] = ()
    decode_rows: Callable[..., Tensor] = torch.Tensor.float
    rotation: int = 0  # number of columns that are rotated together; 0: none
    is_kept_by_default = True

    @property
    def log_description(self) -> str:
        """Description of the format for the log."""
        return f"in {self.name}"

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Raise NotImplementedError, because this format can only be read from files."""
        raise NotImplementedError(f"{self.name} is only read")

    def empty(self, shape: Shape) -> QuantizedWeight:
        """Raise NotImplementedError, because this format can only be read from files."""
        raise NotImplementedError(f"{self.name} is only read")

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight, without padding rows and columns beyond `shape`."""
        assert tensors[0] is not None
        out = torch.empty(shape, dtype=dtype, device=tensors[0].device)
        if out.device.type == "meta":
            return out
        num_rows = max(1, _PIECE // max(1, shape[1]))  # decoded at a time
        for start in range(0, shape[0], num_rows):
            rows = slice(start, min(start + num_rows, shape[0]))
            row_tensors: list[Tensor | None] = []
            for tensor in tensors:
                if tensor is None or len(tensor) == 1:  # applies to all rows, such as a single scale
                    row_tensors.append(tensor)
                else:
                    row_tensors.append(tensor[rows])
            values = self.decode_rows(*row_tensors)
            if self.rotation:
                values = rotate(values, self.rotation)
            out[rows] = values[:, : shape[1]]
        return out

    def multiply(self, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None) -> Tensor:
        """Multiply with the dequantized weight."""
        return dequantize_and_multiply(self, x.to(computed_dtype(x)), tensors, shape=shape, bias=bias)

    def cut(self, stored: QuantizedWeight, first: int, count: int) -> QuantizedWeight | None:
        """Return `count` rows from row `first` on; a tensor with one row (a common scale) is not cut."""
        rows = slice(first, first + count)
        parts: list[Tensor | None] = []
        for tensor in stored.tensors:
            if tensor is not None and len(tensor) != 1:
                tensor = tensor[rows].contiguous()
            parts.append(tensor)
        return QuantizedWeight(self, (count, stored.shape[1]), tuple(parts))

    def join(self, parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """Concatenate packed weights along their rows.

        Returns:
            The joined weight; None if a companion (such as a scale) covers all rows of a part, or if some
            parts lack it.
        """
        joined: list[Tensor | None] = []  # the packed weight, then its companions, such as scales
        for index in range(1 + len(self.companions)):
            tensors = [tensor for part in parts if (tensor := part.tensors[index]) is not None]
            if not tensors:
                joined.append(None)
                continue
            if list(map(len, tensors)) != [len(part.weight) for part in parts]:
                return None
            as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in tensors]
            joined.append(torch.cat(as_bytes).view(tensors[0].dtype))
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        return QuantizedWeight(self, shape, tuple(joined))

    def adopt_compute_settings(self, chosen: QuantizationFormat) -> QuantizationFormat:
        """Return this format: no option changes how it computes."""
        return self

    def check_device(self, device: torch.device) -> None:
        """Accept any device: every device can dequantize these formats."""
        pass


def untile(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Undo cuBLAS's tiling of block scales; return a matrix of `rows` x `columns`.

    A tile of 128 x 4 is stored as 32 lines of 16 values: row 32 a + b of the tile is in line b, starting at
    column 4 a. Stored rows and columns are padded to whole tiles. Source: cuBLAS, "1D block scaling factors
    layout".
    """
    down, across = scales.shape[0] // 128, scales.shape[1] // 4
    tiles = scales.contiguous().view(torch.uint8).view(down, across, 32, 4, 4)
    flat = tiles.permute(0, 3, 2, 1, 4).reshape(scales.shape)
    return flat[:rows, :columns].contiguous().view(scales.dtype)


def _unpack_nibbles(packed: Tensor, high_first: bool = False) -> Tensor:
    """Unpack the two 4-bit codes of each byte, N x K, to integers 0 to 15, uint8 N x 2K."""
    low, high = packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(1)


def _scale_groups(values: Tensor, scales: Tensor) -> Tensor:
    """Multiply values, N x K, by scales, N x K/G, one for each group of G neighboring columns."""
    return (values.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1)


@lru_cache(maxsize=8)
def _levels(device: torch.device, values: tuple[float, ...] = _E2M1) -> Tensor:
    return torch.tensor(values, device=device)  # cached: each copy to a GPU synchronizes


def mxfp8_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """Dequantize N rows of an mxfp8 weight (e4m3, K columns); scales (e8m0, N x K/32) apply to 32 columns."""
    return _scale_groups(weight.float(), scales)


def nvfp4_rows(weight: Tensor, scales: Tensor, scale: Tensor, input_scale: Tensor | None) -> Tensor:
    """Dequantize N rows of nvfp4 (N x K/2 bytes); block scales N x K/16 (e4m3), row scales N x 1.

    `input_scale`, 1 x K, contains factors for the layer's input, which are multiplied into the weight.
    """
    values = _scale_groups(
        _levels(weight.device)[_unpack_nibbles(weight, high_first=True).int()], scales.float() * scale
    )
    return values if input_scale is None else values * input_scale


def w4a4_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Dequantize N rows of a signed int4 weight (N x K/2 bytes) with one scale per row, N x 1."""
    codes = _unpack_nibbles(weight)
    return ((codes ^ 8).float() - 8) * scale


def w4a8_rows(weight: Tensor, scales: Tensor, scale: Tensor, codebook: Tensor | None) -> Tensor:
    """Dequantize N rows of a w4a8 weight (4 bits) with K columns.

    The weight is N x K/2 bytes, block scales are N x K/16, row scales N x 1; the codebook is 1 x 16 values or
    None.
    """
    return _w8(_unpack_nibbles(weight), 8, scales, scale, codebook=codebook)


def w6a8_rows(weight: Tensor, scales: Tensor, scale: Tensor, codebook: Tensor | None) -> Tensor:
    """Dequantize N rows of a w6a8 weight (6 bits) with K columns.

    The weight is N x 3K/4 bytes, block scales are N x K/16, row scales N x 1; `codebook` is None.
    """
    # N 3K/4: the lower four bits of each code, then the upper two
    columns = weight.shape[1] // 3 * 4
    shifts = torch.arange(0, 8, 2, device=weight.device, dtype=torch.uint8)
    upper = weight[:, columns // 2 :].contiguous().view(torch.uint8)[..., None] >> shifts
    codes = _unpack_nibbles(weight[:, : columns // 2].contiguous()) | (upper & 3).flatten(1) << 4
    return _w8(codes, 32, scales, scale, codebook=codebook)


def _w8(codes: Tensor, middle: int, scales: Tensor, scale: Tensor, codebook: Tensor | None) -> Tensor:
    levels = codes.float() - middle if codebook is None else codebook.flatten()[codes.int()]
    return _scale_groups(levels, scales).round_().clamp_(-127, 127) * scale


def awq_rows(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Dequantize N rows of AWQ (N x K/2 bytes), with a scale and zero point per 64 columns (N x K/64)."""
    values = _scale_groups(_unpack_nibbles(weight).float() - 8, scales)
    return (values.unflatten(1, (zeros.shape[1], -1)) + zeros.float()[..., None]).flatten(1)


def int8_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Dequantize N rows of an int8 weight with K columns and one scale per row, N x 1."""
    return weight.float() * scale


@cache
def four_bits(values: tuple[float, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that dequantizes rows of bitsandbytes' nf4 or fp4.

    `values` are the values of the codes 0 to 15.
    """

    def rows(weight: Tensor, largest: Tensor) -> Tensor:
        # N K/2, N K/64: the largest magnitude of a block
        return _scale_groups(
            _levels(weight.device, values)[_unpack_nibbles(weight, high_first=True).int()], largest
        )

    return rows
