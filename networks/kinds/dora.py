"""DoRA: a LoRA, LoHa or LoKr with magnitudes, the norms of the rows or columns of the changed weight.

`dora_change.py` computes the change, `networks/train/dora.py` trains magnitudes in the layer of a LoRA, and
`networks/magnitudes.py` converts magnitudes to ComfyUI's form and back.
Source: Liu et al. 2024, arXiv 2402.09353.
"""

from typing import TYPE_CHECKING

from networks.kinds.contract import NetworkKind

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.dora_change import DoraAlgebra

PART = "dora_scale"


class DoraKind(NetworkKind):
    """DoRA: a LoRA, LoHa or LoKr that also trains magnitudes (the norms of the changed weight)."""

    name = "DoRA"
    parts = (PART,)
    magnitudes = PART
    needs_weight = True
    switch = "dora_wd"

    def load_algebra(self) -> "DoraAlgebra":
        """Return the object that computes with DoRA magnitudes."""
        from networks.kinds.dora_change import DoraAlgebra  # torch

        return DoraAlgebra(PART)


DORA = DoraKind()
