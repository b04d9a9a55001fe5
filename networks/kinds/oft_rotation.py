"""Compute the rotations of an OFT, which turns the inputs of frozen layers block by block.

This is the heavy half of `oft.py`.

A layer computes y = W (x R) + bias. Its input is cut into blocks of b values, and each block has a rotation
of its own, which is made from a skew-symmetric matrix Q. W stays as it is, however it is stored, and the
change of the weight is W' = W R^T, so that it can be merged.

Sources: Qiu et al. 2023, arXiv 2306.07280; the rotation of inputs and the series, Qiu et al. 2025,
arXiv 2506.19847. Files have the names and values of PEFT's OFT.
"""
# Letters: n blocks of b values; in = n * b

import math

import torch
from torch import Tensor

from networks.kinds.algebra import Algebra
from networks.kinds.factors import Factors


def block_size_of(columns: int) -> int | None:
    """Return b for the b (b - 1) / 2 values of a block; None if no b has that many."""
    size = (1 + math.isqrt(1 + 8 * columns)) // 2
    return size if columns and size * (size - 1) // 2 == columns else None


def turns(values: Tensor, strength: float = 1.0) -> Tensor:
    """Return R - I of each block, n b b, float32, for the rotation R(strength * Q).

    R is the series I + 2Q + 2Q^2 + 2Q^3 + Q^4, which is (I + Q) (I - Q)^-1 cut off: PEFT's
    `use_cayley_neumann` with its 5 terms. I is left out because small angles would be rounded away next to it
    in 16 bits.

    Args:
        values: Upper triangle of Q row by row, n x b(b-1)/2.
        strength: Factor on Q.
    """
    num_blocks, columns = values.shape
    size = block_size_of(columns)
    assert size is not None, columns
    rows_and_columns = torch.triu_indices(size, size, 1, device=values.device)
    upper = values.new_zeros(num_blocks, size, size, dtype=torch.float32)
    upper[:, rows_and_columns[0], rows_and_columns[1]] = strength * values.float()
    skew = upper - upper.transpose(1, 2)
    square = skew @ skew
    # 2Q + 2Q^2 + 2Q^3 + Q^4 = 2Q + Q^2 (2 I + 2Q + Q^2)
    return 2 * skew + 2 * square + square @ (2 * skew + square)


def turn(x: Tensor, by: Tensor) -> Tensor:
    """Return x (R - I), the change of an input by a rotation.

    Args:
        x: Input, ... in.
        by: R - I of each block, n b b, or 1 b b if all blocks share one rotation.
    """
    size = by.shape[-1]
    blocks = x.reshape(-1, x.shape[-1] // size, size)  # N n b
    turned = torch.matmul(blocks.transpose(0, 1), by).transpose(0, 1)
    return turned.reshape(x.shape)


def turned_weight(weight: Tensor, by: Tensor) -> Tensor:
    """Return the change W (R^T - I) of a weight, out x in, float32."""
    return turn(weight.float(), by.float().transpose(1, 2))


class OftAlgebra(Algebra):
    """A rotation of inputs: nothing is added to the weight, and all of its rows share the values."""

    title = "an OFT"

    def __init__(self, part: str) -> None:
        """Remember the end of the name of the values."""
        self.part = part
        self.rotation = self

    def find_error(self, factors: Factors) -> str | None:
        """Return the error if the number of values per block fits no block size; None if it fits one."""
        shape = factors[self.part].shape
        if len(shape) == 2 and block_size_of(shape[1]) is not None:
            return None
        return f"its {self.part} has the shape {list(shape)}, of which no block has so many values"

    def make(self, values: Tensor, strength: float) -> Tensor:
        """Return R - I of all blocks at a strength, as `turns` computes it."""
        return turns(values, strength)

    def of_input(self, x: Tensor, made: Tensor) -> Tensor:
        """Return x (R - I), the change of an input."""
        return turn(x, made)

    def of_weight(self, weight: Tensor, made: Tensor) -> Tensor:
        """Return W (R^T - I), the change of a weight."""
        return turned_weight(weight, made)

    def find_misfit(self, values: Tensor, weight: Tensor, name: str) -> str:
        """Return why the values do not fit a weight, as the end of a sentence; "" if they do."""
        return find_misfit(values, weight, name)


def find_misfit(values: Tensor, weight: Tensor, name: str) -> str:
    """Return why rotations do not fit a weight, as the end of a sentence; "" if they do."""
    num_blocks, columns = values.shape
    size = block_size_of(columns)
    assert size is not None
    if weight.ndim != 2:
        return (
            f"{name} is no linear layer, and programs do not agree on what an OFT does with others.\n"
            "  Give a file that rotates linear layers alone."
        )
    width = weight.shape[1]
    is_shared = num_blocks == 1 and width % size == 0  # one rotation for all blocks
    if num_blocks * size == width or is_shared:
        return ""
    return (
        f"for {name} it rotates {num_blocks} blocks of {size} inputs, the model has {width} inputs.\n"
        "  Give an OFT that was trained for this model."
    )
