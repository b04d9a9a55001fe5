"""Records of loading: where and how a network's weights are placed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from modules.attention.options import SDPA, AttentionChoice
from modules.fp8.options import Quantisation


@dataclass(frozen=True)
class TensorInfo:
    """Hold the facts about a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# (parameter name, loaded weight) -> weight with LoRA deltas added, same dtype
WeightPatch = Callable[[str, Tensor], Tensor]


class HostPlace(Protocol):
    """Keep weights in host memory although their network computes on a device."""

    def hold(self, network: nn.Module, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Tensor]:
        """Return memory for the weights that are to stay, by name.

        network: may be on the meta device. tensors: all that it has.
        """
        ...

    @property
    def is_filled_here(self) -> bool: ...  # if not, another process writes them

    def finish(self) -> None: ...  # call when all are written; returns when those of other processes are too


@dataclass(frozen=True)
class Placement:
    """Hold where and how a network is loaded."""

    device: torch.device
    # None: as the file stores it (fp8 files: upcast to the compute dtype)
    storage_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None  # None: that of the file's block weights (fp8 files: bfloat16)
    # default compute dtype of fp8 files; None: bfloat16
    fp8_compute_dtype: torch.dtype | None = None
    keep_file_dtypes: bool = False  # every tensor as the file stores it, if it mixes dtypes
    attention: AttentionChoice = SDPA
    patch: WeightPatch | None = None  # LoRA deltas to add while loading, before any rounding
    # how the linear layers of the blocks are kept in 8 bits; None: they are not
    fp8: Quantisation | None = None
    host: HostPlace | None = None  # keeps some weights in host memory; None: all go to the device
    # called before each tensor, in place of showing how far loading is; may raise to end it
    check: Callable[[], None] | None = None
