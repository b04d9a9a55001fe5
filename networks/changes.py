"""What one LoRA adds to one parameter of a model: placed in it, compared with it, added to its rows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError
from networks.deltas import (
    DORA,
    Factors,
    bias_delta,
    decompose,
    has_input_magnitudes,
    rows_of,
    weight_delta,
)
from networks.module_names import Relative
from networks.parts import part_rows

_BLOCK_ELEMENTS = 1 << 20  # of a weight that are changed at once: 4 MB in float32
_META = torch.device("meta")


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one parameter of a model."""

    path: Path  # of the LoRA
    multiplier: float
    factors: Factors
    delta: Callable[[Factors, torch.device], Tensor | None]
    rows: slice | None = None  # of the parameter, where the LoRA is for a part of it; None: all

    def on(self, device: torch.device) -> "Change":
        """Return the change with its factors on `device`."""
        return replace(
            self, factors={part: t if part == "alpha" else t.to(device) for part, t in self.factors.items()}
        )

    def placed(self, relative: Relative | None, weight: Tensor) -> "Change":
        """The same for a weight that is part of the LoRA's module, or of which that module is a part.

        Where the heights do not go together it stays as it is, to be found out by its shape.
        """
        if relative is None:
            return self
        own, whole = self._height(), len(weight)
        rows = (
            part_rows(relative.part, own, whole) if relative.is_part else part_rows(relative.part, whole, own)
        )
        if rows is None:
            return self
        if isinstance(rows, slice) and relative.is_part:
            return replace(self, rows=rows)
        if rows == slice(0, own):
            return self
        if has_input_magnitudes(self.factors):
            raise RuntimeError(
                "DoRA magnitudes by input belong to the whole weight, of which this model has parts"
            )
        factors = rows_of(self.factors, rows)
        if factors is None:  # LoKr: made whole, then cut
            delta = self.delta(self.factors, weight.device)
            assert delta is not None
            factors = {
                "diff": delta[rows],
                **({DORA: self.factors[DORA][rows]} if DORA in self.factors else {}),
            }
        return replace(self, factors=factors)

    def add_to(self, total: Tensor, block: slice | None, weight: Tensor) -> None:
        """Add the change to a sum over some rows of the parameter, float32.

        block: which rows; None: all. weight: these rows of the parameter before any change.
        """
        if self.rows is not None:
            start = 0 if block is None else block.start
            begin, end = max(start, self.rows.start), min(start + len(total), self.rows.stop)
            if begin >= end:
                return
            block, total = (
                slice(begin - self.rows.start, end - self.rows.start),
                total[begin - start : end - start],
            )
            weight = weight[begin - start : end - start]
        # LoKr comes whole, see `blocks`
        factors = (None if block is None else rows_of(self.factors, block)) or self.factors
        delta = self.delta(factors, total.device)
        assert delta is not None
        if self.decomposes:
            delta = decompose(weight, delta, factors[DORA])
        total.add_(delta.reshape(total.shape), alpha=self.multiplier)

    @property
    def decomposes(self) -> bool:
        """Whether this is a change by DoRA, which depends on the weight."""
        return DORA in self.factors and self.delta is weight_delta

    def _height(self) -> int:
        """Rows of the whole change."""
        delta = self.delta({part: t for part, t in self.factors.items() if part != "alpha"}, _META)
        assert delta is not None
        return len(delta)


def leaves(factors: Factors) -> Mapping[str, Callable[[Factors, torch.device], Tensor | None]]:
    """Which parameters of a module the factors change, and what makes the delta of each."""
    bias = {"diff_b", "lora_up.bias"}
    return ({"bias": bias_delta} if factors.keys() & bias else {}) | (
        {"weight": weight_delta} if factors.keys() - bias - {"alpha"} else {}
    )


def blocks(weight: Tensor, changes: Sequence[Change]) -> Iterator[slice | None]:
    """Yield the rows to change at a time; a single None if the weight is small or a change has no rows."""
    if not changes or not weight.numel():
        return
    step = max(1, _BLOCK_ELEMENTS * len(weight) // weight.numel()) if weight.ndim else 1
    if (
        weight.ndim == 0
        or step >= len(weight)
        or any(rows_of(change.factors, slice(0, 1)) is None for change in changes)
    ):
        yield None
        return
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def fit(change: Change, relative: Relative | None, weight: Tensor, name: str, model: str) -> Change:
    """Return the change for this weight. Raises CheckpointError if the shapes differ; computes nothing."""
    path = change.path
    try:
        change = change.placed(relative, weight)
        factors = {part: t for part, t in change.factors.items() if part != "alpha"}
        delta = change.delta(factors, _META)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: the factors for {name} do not go together ({error}).", path
        ) from error
    assert delta is not None
    found, wanted = list(delta.shape), list((weight if change.rows is None else weight[change.rows]).shape)
    if delta.numel() != math.prod(wanted) or found[:1] != wanted[:1]:
        raise CheckpointError(
            f"{path} does not fit {model}: for {name} it has {found}, the model {wanted}.\n"
            "  Give a LoRA that was trained for a model of this size.",
            path,
        )
    if change.decomposes:
        magnitudes = change.factors[DORA]
        axis = 1 if has_input_magnitudes(change.factors) else 0
        if len(wanted) < 2 or magnitudes.numel() != wanted[axis]:
            raise CheckpointError(
                f"{path} does not fit {model}: for {name} it has {magnitudes.numel()} DoRA magnitudes, the "
                f"model {wanted}.",
                path,
            )
    return change
