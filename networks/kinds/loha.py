"""LoHa: the change of a weight is (w1_a w1_b) * (w2_a w2_b), element by element.

`loha_layer.py` has the computations, `networks/train/loha.py` builds the trained layers. Factors have
LyCORIS' names and shapes. Files may have cores (hada_t1, hada_t2), which can be used but not trained.
Source: Yeh et al. 2023, arXiv 2309.14859.
"""

import math
from typing import TYPE_CHECKING

from networks.kinds.contract import NetworkKind
from networks.kinds.factors import Shapes

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.loha_layer import LohaAlgebra

CORES = ("hada_t1", "hada_t2")


def make_shapes(weight: tuple[int, ...], rank: int) -> Shapes:
    """Return the shapes of the factors `hada_w1_a`, `hada_w1_b` and so on.

    Args:
        weight: Shape of the weight, out x in (x kernel).
        rank: Rank of the factors.
    """
    left = (weight[0], rank)
    right = (rank, math.prod(weight[1:]))
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}


class LohaKind(NetworkKind):
    """LoHa: the change of a weight is the element-wise product of two low-rank matrices."""

    name = "LoHa"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *CORES)
    marks = ("hada_w1_a",)
    pairs = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
    rank_parts = ("hada_w1_b",)
    cores = CORES
    network_module = "networks.loha"
    # programs use different orders, which differ in the parameters' shapes
    orders = (
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a"),
    )
    is_sized_by_rank = True

    def load_algebra(self) -> "LohaAlgebra":
        """Return the object that computes with the factors of a LoHa."""
        from networks.kinds.loha_layer import LohaAlgebra  # torch

        return LohaAlgebra()


LOHA = LohaKind()
