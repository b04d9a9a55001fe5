"""LoRA: the change of a weight is the product of two low-rank matrices.

The trained layer is in `networks/lora_layer.py`.
Source: Hu et al. 2021, arXiv 2106.09685.
"""

from typing import TYPE_CHECKING

from networks.kinds.contract import NetworkKind
from networks.kinds.factors import BIAS, DOWN, MID, UP

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.lora_algebra import LoraAlgebra


class LoraKind(NetworkKind):
    """LoRA: the change of a weight is the product of two low-rank matrices."""

    name = "LoRA"
    parts = (DOWN, UP, MID, BIAS)
    marks = (DOWN,)
    pairs = ((DOWN, UP),)
    rank_parts = (DOWN,)
    network_module = "networks.lora"
    orders = ((DOWN, UP),)
    is_sized_by_rank = True

    def load_algebra(self) -> "LoraAlgebra":
        """Return the object that computes with low-rank factors."""
        from networks.kinds.lora_algebra import LoraAlgebra  # torch

        return LoraAlgebra()


LORA = LoraKind()
