"""Compute the rotations of an OFT, which rotates the inputs of frozen layers block by block.

This is the part of `oft.py` that imports torch.

A layer computes y = W (x R) + bias. Its input is cut into blocks of b values, and each block has its own
rotation, which is computed from a skew-symmetric matrix Q. W is unchanged and may be quantized. Merging
replaces it by W' = W R^T.

Sources: Qiu et al. 2023, arXiv 2306.07280; the rotation of inputs and the series, Qiu et al. 2025,
arXiv 2506.19847. Files have the names and values of PEFT's OFT.
"""
# Letters: n blocks of b values; in = n * b

import math

import torch
from torch import Tensor

from networks.kinds.algebra import Algebra
from networks.kinds.factors import Factors


def find_block_size(columns: int) -> int | None:
    """Return the block size b for a row of b (b - 1) / 2 values; None if no b fits."""
    size = (1 + math.isqrt(1 + 8 * columns)) // 2
    return size if columns and size * (size - 1) // 2 == columns else None


def compute_rotations(values: Tensor, strength: float = 1.0) -> Tensor:
    """Return R - I for the rotation R(strength * Q) of each block, n x b x b, float32.

    R is I + 2Q + 2Q^2 + 2Q^3 + Q^4, a truncated series for (I + Q) (I - Q)^-1: PEFT's `use_cayley_neumann`
    with its 5 terms. I is subtracted because 16-bit rounding would lose small angles next to it.

    Args:
        values: Upper triangle of Q row by row, n x b(b-1)/2.
        strength: Multiplier of Q.
    """
    num_blocks, columns = values.shape
    size = find_block_size(columns)
    assert size is not None, columns
    rows_and_columns = torch.triu_indices(size, size, 1, device=values.device)
    upper = values.new_zeros(num_blocks, size, size, dtype=torch.float32)
    upper[:, rows_and_columns[0], rows_and_columns[1]] = strength * values.float()
    # Q is skew-symmetric: Q^T = -Q
    skew = upper - upper.transpose(1, 2)
    square = skew @ skew
    # 2Q + 2Q^2 + 2Q^3 + Q^4 = 2Q + Q^2 (2 I + 2Q + Q^2)
    return 2 * skew + 2 * square + square @ (2 * skew + square)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Return x (R - I), the change of the input by block rotations R.

    Args:
        x: Input, ... x in.
        rotations: R - I of each block, n x b x b, or 1 x b x b if all blocks share one rotation.
    """
    size = rotations.shape[-1]
    blocks = x.reshape(-1, x.shape[-1] // size, size)  # N n b
    changes = torch.matmul(blocks.transpose(0, 1), rotations).transpose(0, 1)
    return changes.reshape(x.shape)


def rotate_weight(weight: Tensor, rotations: Tensor) -> Tensor:
    """Return the change W (R^T - I) of a weight, out x in, in float32."""
    return rotate(weight.float(), rotations.float().transpose(1, 2))


class OftAlgebra(Algebra):
    """OFT: rotates the input. Nothing is added to the weight, and all of its rows share the factors."""

    title = "an OFT"

    def __init__(self, factor_name: str) -> None:
        """Set the name of the tensor with the rotation values, such as `oft_R.weight`."""
        self.factor_name = factor_name
        self.rotation = self  # this class implements the protocol `InputRotation` too

    def find_error(self, factors: Factors) -> str | None:
        """Return an error message if no block size has this number of values; otherwise None."""
        shape = factors[self.factor_name].shape
        if len(shape) == 2 and find_block_size(shape[1]) is not None:
            return None
        return f"its {self.factor_name} has the shape {list(shape)}, but no block size has so many values"

    def compute_rotations(self, values: Tensor, strength: float) -> Tensor:
        """Return R - I for the rotation R of each block, as a tensor n x b x b."""
        return compute_rotations(values, strength)

    def input_change(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Return x (R - I), the change of the layer's input x; `rotations` contains R - I of each block."""
        return rotate(x, rotations)

    def weight_change(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """Return W (R^T - I), the change of a weight; `rotations` contains R - I of each block."""
        return rotate_weight(weight, rotations)

    def find_misfit(self, values: Tensor, weight: Tensor, name: str) -> str:
        """Return why the parameters do not fit a weight, as the end of an error message; "" if they fit."""
        return find_misfit(values, weight, name)


def find_misfit(values: Tensor, weight: Tensor, name: str) -> str:
    """Return why rotations do not fit a weight, as the end of an error message; "" if they fit."""
    num_blocks, columns = values.shape
    size = find_block_size(columns)
    assert size is not None
    if weight.ndim != 2:
        return (
            f"{name} is not a linear layer, and programs disagree on what an OFT does to other layers.\n"
            "  Pass a file that rotates only linear layers."
        )
    width = weight.shape[1]
    is_shared = num_blocks == 1 and width % size == 0  # one rotation for all blocks
    if num_blocks * size == width or is_shared:
        return ""
    return (
        f"for {name} it rotates {num_blocks} blocks of {size} inputs, but the model has {width} inputs.\n"
        "  Pass an OFT that was trained for this model."
    )
