"""Describe how one of our tensors is made from those of a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from modules.contract.loading import TensorInfo
from modules.fp8.weights import is_fp8


@dataclass(frozen=True)
class TensorSource:
    """Hold how one tensor is made: names in the file, and a function of these tensors.

    `build` None takes the only tensor; it also runs on meta tensors, to compare shapes before anything is
    read. as_fp8: for an 8-bit weight, the same without multiplying it out: the weight, and its scale if it
    has one.
    """

    names: tuple[str, ...]
    build: Callable[..., Tensor] | None = None
    as_fp8: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def then(self, change: Callable[[Tensor], Tensor]) -> "TensorSource":
        """Return the same source with a further step, such as cutting rows or transposing."""
        build = self.build
        return TensorSource(self.names, change if build is None else lambda *tensors: change(build(*tensors)))

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if self.build is None else self.build(*tensors)

    def is_fp8_in(self, tensors: Mapping[str, TensorInfo]) -> bool:
        """Return whether the file, which has these tensors, holds it as an 8-bit weight that can be kept."""
        formats = {tensors[name].dtype for name in self.names if is_fp8(tensors[name].dtype)}
        # rows joined from two formats have no common format
        return self.as_fp8 is not None and len(formats) == 1

    def make_fp8(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the weight in 8 bits, and its scale."""
        assert self.as_fp8 is not None
        return self.as_fp8(*tensors)
