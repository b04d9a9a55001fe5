"""Dequantize the formats of GGUF files. A row of a weight consists of blocks, each with its own scales.

Source: ggml's block layouts; the tests compare with the package `gguf`, whose own functions (numpy, on the
CPU) read the kinds that are not in `KINDS`.
"""

# Letters: B blocks. Each function takes the bytes of blocks, B x size, and returns B x weights, float32

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy
import torch
from torch import Tensor


def _read_float16(blocks: Tensor, start: int) -> Tensor:
    """Read a float16 value from each block at byte offset `start`, B x 1."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _unpack_fields(codes: Tensor, bits: int) -> Tensor:
    """Unpack bytes, B x n, into `bits`-bit fields, B x 8/bits x n; all lowest fields come first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes[:, None] >> shifts[:, None]) & ((1 << bits) - 1)


def _unpack_fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Unpack the 32 fifth bits of B blocks from four bytes at `start`; return 0 or 16 for each, B x 32."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, start : start + 4, None] >> shifts & 1) << 4).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _read_float16(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _read_float16(blocks, 0) * (_unpack_fields(blocks[:, 2:], 4).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _read_float16(blocks, 0) * _unpack_fields(blocks[:, 4:], 4).flatten(1) + _read_float16(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _unpack_fields(blocks[:, 6:], 4).flatten(1) | _unpack_fifth_bits(blocks, 2)
    return _read_float16(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _unpack_fields(blocks[:, 8:], 4).flatten(1) | _unpack_fifth_bits(blocks, 4)
    return _read_float16(blocks, 0) * codes + _read_float16(blocks, 2)


def _unpack_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 6-bit scales and minima of Q4_K or Q5_K blocks from 12 bytes each: two tensors, B x 8."""
    first = packed[:, :4]
    second = packed[:, 4:8]
    third = packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    return scales, torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Dequantize codes, B x 8 x 32, with the scale and minimum of each group of 32."""
    scales, minima = _unpack_six_bits(blocks[:, 4:16])
    scales, minima = _read_float16(blocks, 0) * scales, _read_float16(blocks, 2) * minima
    return (scales[..., None] * codes - minima[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    # 4 x 32 bytes, each two times 32 codes
    return _with_minima(blocks, _unpack_fields(blocks[:, 16:].reshape(-1, 32), 4).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _unpack_fields(blocks[:, 48:].reshape(-1, 32), 4).reshape(-1, 8, 32)
    return _with_minima(blocks, low | _unpack_fields(blocks[:, 16:48], 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    # two halves of 128 weights: 64 bytes of low nibbles, 32 of the upper two bits
    low = _unpack_fields(blocks[:, :128].reshape(-1, 64), 4).reshape(-1, 2, 128)
    codes = low | _unpack_fields(blocks[:, 128:192].reshape(-1, 32), 2).reshape(-1, 2, 128) << 4
    scales = _read_float16(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return (scales[..., None] * (codes.reshape(-1, 16, 16).float() - 32)).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    codes = _unpack_fields(blocks[:, 16:80].reshape(-1, 32), 2).reshape(-1, 16, 16)
    scales, minima = (
        _read_float16(blocks, 80) * (blocks[:, :16] & 15),
        _read_float16(blocks, 82) * (blocks[:, :16] >> 4),
    )
    return (scales[..., None] * codes - minima[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _unpack_fields(blocks[:, 32:96].reshape(-1, 32), 2).reshape(-1, 8, 32)
    codes = (low | _unpack_fields(blocks[:, :32], 1) << 2).float() - 4
    packed = blocks[:, 96:108]  # 16 scales of 6 bits: 8 bytes of nibbles, 4 of the upper two bits
    scales = _unpack_fields(packed[:, :8], 4).flatten(1) | _unpack_fields(packed[:, 8:], 2).flatten(1) << 4
    scales = _read_float16(blocks, 108) * (scales.float() - 32)
    return (scales[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


@dataclass(frozen=True)
class Kind:
    """A GGUF quantization type: the layout of its blocks, and the function that dequantizes them.

    `weights` is the number of weights in a block, `size` its bytes, and `halves` the byte offsets of its
    float16 values.
    """

    name: str
    weights: int
    size: int
    halves: tuple[int, ...]
    values: Callable[[Tensor], Tensor]

    def rows(self, packed: Tensor) -> Tensor:
        """Dequantize packed rows to N x K values.

        Args:
            packed: Bytes of N rows; each row has K / weights blocks of `size` bytes.
        """
        return self.values(packed.reshape(-1, self.size)).view(len(packed), -1)

    def is_sound(self, packed: Tensor) -> bool:
        """Return whether all float16 values (scales) in packed rows are finite."""
        blocks = packed.reshape(-1, self.size)
        return all(bool(_read_float16(blocks, start).isfinite().all()) for start in self.halves)


KINDS = {  # by the number in files
    2: Kind("Q4_0", 32, 18, halves=(0,), values=_q4_0),
    3: Kind("Q4_1", 32, 20, halves=(0, 2), values=_q4_1),
    6: Kind("Q5_0", 32, 22, halves=(0,), values=_q5_0),
    7: Kind("Q5_1", 32, 24, halves=(0, 2), values=_q5_1),
    8: Kind("Q8_0", 32, 34, halves=(0,), values=_q8_0),
    10: Kind("Q2_K", 256, 84, halves=(80, 82), values=_q2_k),
    11: Kind("Q3_K", 256, 110, halves=(108,), values=_q3_k),
    12: Kind("Q4_K", 256, 144, halves=(0, 2), values=_q4_k),
    13: Kind("Q5_K", 256, 176, halves=(0, 2), values=_q5_k),
    14: Kind("Q6_K", 256, 210, halves=(208,), values=_q6_k),
}


@cache  # so that equal types are one object
def get_gguf_kind(number: int) -> Kind | None:
    """Return the GGUF quantization type with this number; None if the package `gguf` cannot decode it.

    Raises:
        ImportError: If the package is missing.
    """
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        weights_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[kind]
        # raises NotImplementedError if the package cannot decode the type
        gguf.quants.dequantize(numpy.zeros((1, bytes_per_block), numpy.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None

    def values(blocks: Tensor) -> Tensor:
        if type(blocks) is not Tensor:  # a fake tensor, which has no values
            return torch.empty(len(blocks), weights_per_block, device=blocks.device)
        dequantized = gguf.quants.dequantize(blocks.cpu().numpy(), kind)
        return torch.from_numpy(dequantized).to(blocks.device)

    return Kind(kind.name, weights_per_block, bytes_per_block, halves=(), values=values)
