"""OFT: adapters that rotate the inputs of frozen layers, block by block.

`oft_rotation.py` computes the rotations, and `networks/train/oft.py` is the trained layer. A file has one
tensor for each layer, `oft_R.weight`: blocks x b (b - 1) / 2 values, for blocks of b inputs.
Sources: Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025, arXiv 2506.19847. Files have the names and values
of PEFT's OFT.
"""

from typing import TYPE_CHECKING

from networks.kinds.contract import NetworkKind, NetworkSize
from networks.kinds.factors import Factors

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.oft_rotation import OftAlgebra

MODULE = "networks.oft"
PART = "oft_R.weight"
DEFAULT_BLOCK = 32  # inputs that are rotated together, as in PEFT and OneTrainer
TERMS = 5  # terms of the series in `oft_rotation.compute_rotations`


def measure_blocks(factors: Factors) -> int | None:
    """Return the block size of a module's rotations; None if it has no rotations."""
    from networks.kinds.oft_rotation import find_block_size  # torch

    if PART not in factors or factors[PART].ndim != 2:
        return None
    return find_block_size(factors[PART].shape[1])


class OftKind(NetworkKind):
    """OFT: rotates blocks of a layer's input channels instead of adding a change to its weight."""

    name = "OFT"
    parts = (PART,)
    marks = (PART,)
    needs_weight = True
    rotates = True
    network_module = MODULE
    dropout_note = "for an OFT, the fraction of blocks that do not rotate"
    size = NetworkSize(
        word="block size",
        default=DEFAULT_BLOCK,
        note=f"its --network_dim is the number of values in a block, {DEFAULT_BLOCK} by default",
        measure=measure_blocks,
    )

    def load_algebra(self) -> "OftAlgebra":
        """Return the object that computes block rotations from the factors (OFT)."""
        from networks.kinds.oft_rotation import OftAlgebra  # torch

        return OftAlgebra(PART)


OFT = OftKind()
