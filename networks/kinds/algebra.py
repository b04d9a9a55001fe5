"""Protocols for computing with a module's factors, which each network kind (LoRA, LoHa, ...) implements.

A kind implements `Algebra` in its file that imports torch, such as `loha_layer.py`. Most kinds add a product
of factors to the weight. DoRA normalizes the sum (`Magnitudes`), and OFT rotates inputs (`InputRotation`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from networks.kinds.factors import Factors, Shapes


class MismatchError(RuntimeError):
    """The shapes of a module's factors do not match each other."""


class Magnitudes(Protocol):
    """Trained norms of the changed weight: one per output (out x 1 ...) or per input (1 x in ...)."""

    @property
    def factor_name(self) -> str:
        """End of the tensor's name."""

    def decompose(self, weight: Tensor, delta: Tensor, magnitudes: Tensor, uses_frozen_norms: bool) -> Tensor:
        """Return the float32 addition to a weight that gives its rows or columns the new norms.

        Args:
            weight: The frozen weight, out x in (x kernel).
            delta: Change by the other factors, of the same shape.
            magnitudes: New norms of the rows or columns.
            uses_frozen_norms: Whether rows are divided by the norms of the frozen weight instead of the norms
                of the changed weight.
        """


class InputRotation(Protocol):
    """Rotates a layer's input, y = W (x R), instead of adding to its weight.

    The tensors do not depend on the number of output rows, so all parts of a fused layer can share them.
    """

    @property
    def factor_name(self) -> str:
        """Name of the module's only tensor, which contains the rotation parameters."""

    @property
    def title(self) -> str:
        """Name with an article for messages, such as "an OFT"."""

    def compute_rotations(self, values: Tensor, strength: float) -> Tensor:
        """Return R - I at a LoRA strength, as input for `input_change` and `weight_change`."""

    def input_change(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Return x (R - I) for inputs `x`, ... x in; `rotations` is the result of `compute_rotations`."""

    def weight_change(self, weight: Tensor, rotations: Tensor) -> Tensor:
        """Return W (R^T - I) in float32; `rotations` is the result of `compute_rotations`."""

    def find_misfit(self, values: Tensor, weight: Tensor, name: str) -> str:
        """Return why the rotation parameters do not fit a weight of this name; "" if they fit.

        The result is the end of an error message that begins with the path of the file.
        """


class Algebra:
    """Computations with the factors of one network kind (LoHa, ...). Kinds override only what they need."""

    magnitudes: Magnitudes | None = None
    rotation: InputRotation | None = None
    indivisible: str = ""  # name of a kind whose factors cannot be cut by rows, such as "a LoKr"
    # Returns which required part is missing (other than `NetworkKind.pairs`), or which has an impossible
    # shape; None if there is no error. None instead of a function means that the kind has no such rules
    find_error: Callable[[Factors], str | None] | None = None

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the shape of the change, out x in (x kernel); None if nothing is added to the weight.

        Args:
            shapes: Shapes by factor name.

        Raises:
            MismatchError: If the factors cannot be multiplied.
            KeyError: If a factor is missing.
            IndexError: If a factor has too few axes.
        """
        return None

    def compute_change(self, factors: Factors, scale: float) -> Tensor | None:
        """Return the change of a weight, out x in (x kernel), as a new tensor; None if there is no change.

        Args:
            factors: Factors in float32 on one device.
            scale: alpha / rank.
        """
        return None

    def find_factors_with_rows(self, factors: Factors) -> set[str] | None:
        """Return the factors whose axis 0 is the weight's rows; None if rows are another axis of a factor."""
        return set()

    def select_rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return the factors to replace to keep only some rows of the change; None if that is impossible.

        Args:
            factors: Factors of the full change.
            rows: A slice, which gives views, or row indices in any order.
        """
        return {}

    def slice_factors(self, factors: Factors, height: int, start: int, stop: int) -> Factors | None:
        """Return factors for the rows from `start` to `stop`; None if the kind cannot cut at these rows.

        For kinds that can be cut only between blocks of rows, and whose `select_rows` therefore returns None.

        Args:
            factors: Factors of the full change.
            height: Number of rows of the change.
            start: First row.
            stop: End of the rows (exclusive).
        """
        return None


def is_by_input(magnitudes: Tensor) -> bool:
    """Return whether there is one magnitude per input (1 x in ...), not one per output (out x 1 ...)."""
    return len(magnitudes) < magnitudes.numel()


def compute_norms(weight: Tensor, axis: int = 0) -> Tensor:
    """Return the float32 norms of a weight's rows (axis 0) or columns (axis 1), plus epsilon."""
    summed_axes = [other for other in range(weight.ndim) if other != axis]
    norms = torch.linalg.vector_norm(weight, dim=summed_axes, keepdim=True, dtype=torch.float32)
    return norms + torch.finfo(torch.float32).eps  # as in LyCORIS and ComfyUI
