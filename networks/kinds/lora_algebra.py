"""The product of a LoRA's factors; a part of `lora.py` that imports torch."""

import math

import torch
from torch import Tensor

from networks.kinds.algebra import Algebra, MismatchError
from networks.kinds.factors import BIAS, DOWN, MID, UP, Factors, Shapes


class LoraAlgebra(Algebra):
    """up @ down, with a core (`MID`) in between for some convolutions."""

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the shape of the change, out x in (x kernel); raise MismatchError if the ranks differ."""
        if DOWN not in shapes:
            return None
        out_features, *up_columns = shapes[UP]
        rank, in_features, *kernel = shapes[DOWN]
        if MID in shapes:  # a core with the kernel between two 1 x 1 convolutions, as in LyCORIS' use_tucker
            core_rank, core_inputs, *core_kernel = shapes[MID]
            in_features = math.prod((in_features, *kernel))
            kernel = core_kernel
            if core_inputs != rank:
                raise MismatchError(f"{MID} {list(shapes[MID])} is not for the rank {rank}")
            rank = core_rank
        # the up factor of a convolution has more axes of size 1
        if math.prod(up_columns) != rank:
            raise MismatchError(f"{UP} {list(shapes[UP])} is not for the rank {rank}")
        return out_features, in_features, *kernel

    def compute_change(self, factors: Factors, scale: float) -> Tensor | None:
        """Return up @ down, or up @ core @ down if the convolution has a core."""
        if DOWN not in factors:
            return None
        down = factors[DOWN]  # r x in (x kernel)
        up = factors[UP] * scale  # out x r (x 1 x 1)
        if MID in factors:
            down = torch.einsum("r s ..., s i -> r i ...", factors[MID], down.flatten(1))
        return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])

    def find_factors_with_rows(self, factors: Factors) -> set[str] | None:
        """Return the factors with one row per output row: the up factor and its bias."""
        return factors.keys() & {UP, BIAS}

    def select_rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return some rows of the up factor and of the bias; the down factor is shared by all rows."""
        return {part: factors[part][rows] for part in (UP, BIAS) if part in factors}
