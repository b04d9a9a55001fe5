"""How a kind of network computes with the factors of a module: what `networks.delta` needs of each kind.

A kind's own algebra stands in its heavy half, such as `loha_layer.py`. Most add a product of factors to the
weight; one normalizes the sum (`Magnitudes`), and one rotates inputs (`InputRotation`).
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from networks.kinds.factors import Factors, Shapes


class MismatchError(RuntimeError):
    """The shapes of factors do not go together."""


class Magnitudes(Protocol):
    """Normalize the changed weight: one number for each output (out x 1 ...) or each input (1 x in ...)."""

    @property
    def part(self) -> str:
        """End of the tensor's name."""

    def decompose(self, weight: Tensor, delta: Tensor, magnitudes: Tensor, by_frozen_norms: bool) -> Tensor:
        """Return the addition to a weight that gives the changed weight the norms of the magnitudes, float32.

        Args:
            weight: The frozen weight, out in (kernel).
            delta: Change by the other factors, of the same shape.
            magnitudes: Norms of the rows or columns.
            by_frozen_norms: Whether magnitudes by output refer to the norms of the frozen weight alone.
        """


class InputRotation(Protocol):
    """Rotate the input of a layer, y = W (x R), in place of adding to its weight.

    The tensors do not show how many outputs a layer has, and all parts of a fused layer can share them.
    """

    @property
    def part(self) -> str:
        """Name of the only part, which holds the values of the rotation."""

    @property
    def title(self) -> str:
        """Name with its article for messages, such as "an OFT"."""

    def make(self, values: Tensor, strength: float) -> Tensor:
        """Return R - I in the form that `of_input` and `of_weight` take."""

    def of_input(self, x: Tensor, made: Tensor) -> Tensor:
        """Return x (R - I) for inputs `x`, ... in."""

    def of_weight(self, weight: Tensor, made: Tensor) -> Tensor:
        """Return W (R^T - I), float32."""

    def find_misfit(self, values: Tensor, weight: Tensor, name: str) -> str:
        """Return why the values do not fit a weight of this name, as half a sentence; "" if they fit."""


class Algebra:
    """Computations with the factors of one kind of network. A kind overrides only what applies to it."""

    magnitudes: Magnitudes | None = None
    rotation: InputRotation | None = None
    indivisible: str = ""  # title of a kind whose factors have no rows of the change: "a LoKr"
    # returns which part is absent that these factors need, beyond `NetworkKind.pairs`, or which has a shape
    # that is impossible for this kind; None if there is none. A kind with such rules overrides it.
    find_error: Callable[[Factors], str | None] | None = None

    def shape(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Return the shape of the change, out in (kernel); None if nothing is added to the weight.

        Args:
            shapes: Shapes of the factors by part.

        Raises:
            MismatchError: If the factors have no product.
            KeyError: If a factor is missing.
            IndexError: If a factor has too few axes.
        """
        return None

    def change(self, factors: Factors, scale: float) -> Tensor | None:
        """Return the change of a weight, out in (kernel), as a new tensor; None if there is no change.

        Args:
            factors: Factors in float32 on one device.
            scale: alpha / rank.
        """
        return None

    def row_parts(self, factors: Factors) -> set[str] | None:
        """Return the parts whose first axis is that of the weight's rows; None if rows are another axis."""
        return set()

    def rows(self, factors: Factors, rows: slice | Tensor) -> Factors | None:
        """Return what replaces the factors of the full change for some of its rows; None if nothing can.

        Args:
            factors: Factors of the full change.
            rows: A slice, for views, or row indices in any order.
        """
        return {}

    def blocks(self, factors: Factors, height: int, start: int, stop: int) -> Factors | None:
        """Return the factors of the rows from `start` to `stop`; None if these are no full blocks.

        Used for kinds that do not implement `rows`.

        Args:
            factors: Factors of the full change.
            height: Number of rows of the change.
            start: First row.
            stop: Last row + 1.
        """
        return None
