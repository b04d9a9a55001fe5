"""LoKr: the change of a weight is the Kronecker product of a small and a large matrix, kron(w1, w2).

`lokr_layer.py` has the computations, `networks/train/lokr.py` builds the trained layers. Factors have
LyCORIS' names and shapes: each matrix is stored as is or as two factors. The large matrix may have a core
(lokr_t2), which can be used but not trained.
Source: Yeh et al. 2023, arXiv 2309.14859.
"""
# Letters: out = l * k and in = m * n: w1 is l x m, w2 is k x n

import math
from typing import TYPE_CHECKING

from networks.kinds.contract import NetworkKind
from networks.kinds.factors import Shapes

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.lokr_layer import LokrAlgebra

CORE = "lokr_t2"
MARKS = ("lokr_w1", "lokr_w1_a")
FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def make_shapes(weight: tuple[int, ...], rank: int, factor: int = -1, decompose_both: bool = False) -> Shapes:
    """Return the shapes of the factors `lokr_w1`, `lokr_w2` and so on.

    A matrix is stored as two factors only if its larger side is more than twice the rank.

    Args:
        weight: Shape of the weight, out x in (x kernel).
        rank: Rank of the factors.
        factor: One of the two numbers into which each axis is split, if it divides the axis; -1 makes them as
            equal as possible.
        decompose_both: Whether the small matrix is stored as two factors too.
    """
    kernel = weight[2:]
    # the weight is kron(w1, w2): out = l * k, in = m * n
    l, k = split_size(weight[0], factor)  # noqa: E741
    m, n = split_size(weight[1], factor)
    first: Shapes = {"lokr_w1": (l, m)}
    if decompose_both and rank < max(l, m) / 2:
        first = {"lokr_w1_a": (l, rank), "lokr_w1_b": (rank, m)}
    if rank < max(k, n) / 2:
        return {**first, "lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * math.prod(kernel))}
    return {**first, "lokr_w2": (k, n, *kernel)}


def split_size(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`, smaller number first.

    Args:
        size: Number to split.
        factor: One of the two numbers if it divides the size. Otherwise, the smaller number is the largest
            divisor up to `factor`. -1 makes both numbers as equal as possible.
    """
    if factor > 0 and size % factor == 0:
        other = size // factor
        return min(factor, other), max(factor, other)
    maximum = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    small = next(number for number in range(maximum, 0, -1) if size % number == 0)
    return small, size // small


class LokrKind(NetworkKind):
    """LoKr: the change of a weight is the Kronecker product of two matrices."""

    name = "LoKr"
    parts = (*FACTORS, CORE)
    marks = MARKS
    pairs = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))
    rank_parts = ("lokr_w2_b", "lokr_w1_b")
    cores = (CORE,)
    network_module = "networks.lokr"
    orders = (FACTORS,)

    def load_algebra(self) -> "LokrAlgebra":
        """Return the object that computes with the factors of a Kronecker product (LoKr)."""
        from networks.kinds.lokr_layer import LokrAlgebra  # torch

        return LokrAlgebra()


LOKR = LokrKind()
