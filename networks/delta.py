"""The change that one module of an adapter file makes to a layer, for all kinds (LoRA, LoKr, DoRA, ...).

Factors are named by their parts, the endings of their tensor names in files, such as `lora_up.weight`. The
code of each kind is in `networks/kinds/`.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from checkpoints.finite import is_finite
from modules.devices import dtype_name
from networks.deltas import (
    CPU,
    OF_BIAS,
    PARTS,
    ROWS,
    SET,
    bias_of,
    is_number,
    rows_in,
    strength,
    without_alpha,
)
from networks.kinds import KINDS, composing
from networks.kinds.algebra import Algebra, InputRotation, Magnitudes, MismatchError
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import Factors

_FULL = {"diff", "diff_b", SET}  # parts as large as the weight or the bias
_NOT_FACTORS = {"alpha", "diff", SET, MAGNITUDES, ROWS, *OF_BIAS}  # parts that are not matrices of a product


@dataclass
class Delta:
    """The factors of one module, and how they change its weight and bias."""

    factors: Factors
    algebras: tuple[Algebra, ...]  # the computations of each kind that the factors have
    # whether a tensor replaces the model's weight, as in ComfyUI
    sets_weight: bool = field(init=False)
    # whether a tensor is as large as the weight: a full difference or a replacement
    is_full: bool = field(init=False)
    # whether the factors are those of a larger layer, and only the rows in `ROWS` are used
    is_part: bool = field(init=False)
    rotation: InputRotation | None = field(init=False)  # rotation of the input; None: the change is added
    normalization: Magnitudes | None = field(init=False)  # that of DoRA; None: the weight is not normalized

    def __post_init__(self) -> None:
        rotations = (algebra.rotation for algebra in self.algebras if algebra.rotation is not None)
        normalizations = (algebra.magnitudes for algebra in self.algebras if algebra.magnitudes is not None)
        self.sets_weight = SET in self.factors
        self.is_full = SET in self.factors or "diff" in self.factors
        self.is_part = ROWS in self.factors
        self.rotation = next(rotations, None)
        self.normalization = next(normalizations, None)

    @property
    def magnitudes(self) -> Tensor | None:
        """The norms of the changed weight, out x 1 (x 1 ...) or 1 x in (x 1 ...); None without DoRA."""
        return None if self.normalization is None else self.factors[self.normalization.part]

    @property
    def has_input_magnitudes(self) -> bool:
        """Whether magnitudes are norms of columns, which all rows of a weight share."""
        magnitudes = self.magnitudes
        return magnitudes is not None and len(magnitudes) < magnitudes.numel()

    @property
    def depends_on_weight(self) -> bool:
        """Whether the frozen weight is needed to compute the change."""
        return self.rotation is not None or self.normalization is not None

    def to(self, device: torch.device) -> "Delta":
        """Return this change with its factors on a device, except alpha and `ROWS`, which the host reads."""
        moved = dict(self.factors)
        for part, tensor in self.factors.items():
            if part not in ("alpha", ROWS):
                moved[part] = tensor.to(device)
        return replace(self, factors=moved)

    # --- the change

    def dense(self, device: torch.device) -> Tensor | None:
        """Return the change of the weight at multiplier 1, out in (kernel), float32, as a new tensor.

        Magnitudes of DoRA are not applied.

        Returns:
            None for an input rotation, for a replacement weight, and if only the bias changes.

        Raises:
            RuntimeError: If the shapes of the factors do not match.
        """
        moved = {
            part: tensor.to(device, torch.float32) for part, tensor in self.factors.items() if part != ROWS
        }
        changes = [moved["diff"].clone()] if "diff" in moved else []
        scale = strength(self.factors)
        for algebra in self.algebras:  # each computes with the factors of one kind of network
            change = algebra.change(moved, scale)
            if change is not None:
                changes.append(change)
        if not changes:
            return None
        total = functools.reduce(Tensor.add_, changes)
        # a part's factors are those of the whole layer: return the part's rows only
        if not self.is_part:
            return total
        start, stop = rows_in(self.factors)
        return total[start:stop]

    def shape(self) -> tuple[int, ...] | None:
        """Return the shape of the change, out in (kernel), from the shapes of the factors.

        It is None for an input rotation, for a replacement weight, and if only the bias changes. Meta tensors
        are avoided, because the first operation on them loads torch's compiler, which takes seconds.

        Raises:
            MismatchError: If the shapes of the factors do not match.
        """
        shapes = {part: tuple(tensor.shape) for part, tensor in self.factors.items()}
        change_shapes = [shapes["diff"]] if "diff" in shapes else []
        try:
            for algebra in self.algebras:  # each computes with the factors of one kind of network
                shape = algebra.shape(shapes)
                if shape is not None:
                    change_shapes.append(shape)
        except (KeyError, IndexError, ValueError) as error:
            raise MismatchError(f"{error} is absent or has too few axes") from error
        if not change_shapes:
            return None
        if len(set(change_shapes)) > 1:
            raise MismatchError(f"changes of {' and '.join(str(list(shape)) for shape in change_shapes)}")
        if not self.is_part:
            return change_shapes[0]
        num_rows, *columns = change_shapes[0]
        start, stop = rows_in(self.factors)
        return len(range(num_rows)[start:stop]), *columns

    def addition(self, weight: Tensor, device: torch.device, by_frozen_norms: bool) -> Tensor | None:
        """Return the change of a weight at multiplier 1, float32, with magnitudes applied.

        It is None for an input rotation, for a replacement weight, and if only the bias changes.

        Args:
            weight: Weight before any change, out in (kernel); used only if there are magnitudes.
            device: Device to compute on, that of the weight.
            by_frozen_norms: Whether rows are divided by the norms of the frozen weight, not of the changed
                one.
        """
        delta = self.dense(device)
        if delta is None or self.normalization is None:
            return delta
        magnitudes = self.factors[self.normalization.part]
        return self.normalization.decompose(weight, delta, magnitudes, by_frozen_norms)

    def dense_rows(self, rows: slice | Tensor, device: torch.device) -> "Delta":
        """Return some rows of this delta as a dense difference, as the factors of LoKr cannot be sliced."""
        dense = self.dense(device)
        assert dense is not None
        factors = {"diff": dense[rows]}
        if self.normalization is not None:
            part = self.normalization.part
            factors[part] = self.factors[part][rows]
        return read_delta(factors)

    def bias(self, device: torch.device) -> Tensor | None:
        """Return the change of the bias at multiplier 1, float32, as a new tensor; None if there is none."""
        return bias_of(self.factors, device)

    def stored_bias(self) -> Tensor | None:
        """Return the change of the module's bias in the dtype of the file; None without one."""
        bias = self.bias(CPU)
        if bias is None:
            return None
        part = next(part for part in OF_BIAS if part in self.factors)
        return bias.to(self.factors[part].dtype)

    # --- sizes

    def size(self) -> tuple[int, int] | None:
        """Return rows and columns of the changed matrix; None if the weight is not a matrix or is unknown."""
        matrices = [part for part in self.factors if part in PARTS and part not in _NOT_FACTORS]
        if any(self.factors[part].ndim != 2 for part in matrices):
            return None
        # a full difference or a new weight has the size itself
        full = self.factors.get("diff", self.factors.get(SET))
        if full is not None:
            return (full.shape[0], full.shape[1]) if full.ndim == 2 else None
        if not composing.CORES.isdisjoint(self.factors):  # only convolutions have a core
            return None
        # without `ROWS`, the shape is that of the whole layer, even for a part of it
        full_factors = {part: tensor for part, tensor in self.factors.items() if part != ROWS}
        try:
            shape = replace(self, factors=full_factors).shape()
        except MismatchError:
            return None
        return None if shape is None else (shape[0], math.prod(shape[1:]))

    def height(self) -> int | None:
        """Return the number of rows of the module's weight; None if the factors do not show it."""
        if self.is_part:
            first, last = rows_in(self.factors)
            return last - first
        size = self.size()
        return None if size is None else size[0]

    # --- rows

    def rows(self, rows: slice | Tensor) -> "Delta | None":
        """Return a delta for some rows of the change; None if that is impossible.

        It is impossible for kinds in which a row of the change does not belong to a row of one factor, such
        as LoKr, and for magnitudes by input, whose norms need all rows.

        Args:
            rows: A slice, for views, or row indices in any order.
        """
        if self.is_part:
            return None
        factors = dict(self.factors)
        for part in _FULL & self.factors.keys():  # as large as the weight or the bias: cut directly
            factors[part] = self.factors[part][rows]
        for algebra in self.algebras:  # each cuts the factors of one kind of network
            replaced = algebra.rows(self.factors, rows)
            if replaced is None:
                return None
            factors.update(replaced)
        return replace(self, factors=factors)

    def part(self, first: int, last: int) -> "Delta":
        """Return a delta for one part of a fused layer: the rows from `first` to `last` (exclusive).

        Factors are cut if their kind allows that. Otherwise (LoKr), all factors stay, and `ROWS` records the
        rows; only biases, and magnitudes by output, are cut.
        """
        cut = self.rows(slice(first, last))
        if cut is not None:
            factors = dict(cut.factors)
        else:
            factors = {**self.factors, ROWS: torch.tensor([first, last])}
            for part in self.factors.keys() & {MAGNITUDES, *OF_BIAS}:
                if part != MAGNITUDES or not self.has_input_magnitudes:
                    factors[part] = self.factors[part][first:last]
        # copies, because safetensors files cannot contain tensors that share memory
        return replace(self, factors={part: tensor.clone() for part, tensor in factors.items()})

    def row_parts(self) -> set[str] | None:
        """Return the parts whose first axis is the rows of the weight; None if rows cannot be cut out."""
        all_parts = set(self.factors.keys() & _FULL)
        for algebra in self.algebras:
            parts = algebra.row_parts(self.factors)
            if parts is None:
                return None
            all_parts |= parts
        return all_parts

    def blocks(self, start: int, stop: int) -> Factors | None:
        """Return the factors for the rows from `start` to `stop`; None if their kind cannot be cut there.

        A LoKr can be cut only between blocks of rows. The result lacks `ROWS`, the entry that says which rows
        of a layer the factors are for.
        """
        size = self.size()
        if size is None:
            return None
        num_rows, _ = size
        all_factors = {part: tensor for part, tensor in self.factors.items() if part != ROWS}
        for algebra in self.algebras:  # the first kind of network that can be cut there
            factors = algebra.blocks(all_factors, num_rows, start, stop)
            if factors is not None:
                return factors
        return None

    def name_indivisible(self) -> str:
        """Return the name of the kind that cannot be cut by rows, such as "a LoKr"."""
        titles = (algebra.indivisible for algebra in self.algebras if algebra.indivisible)
        return next(titles, "this network")

    # --- errors

    def find_error(self) -> str | None:
        """Return why the factors are unusable, such as "it has ..."; None if they are usable."""
        error = self._find_incomplete()
        if error is not None:
            return error
        for part, tensor in self.factors.items():
            if part not in _NOT_FACTORS and (tensor.ndim < 2 or not tensor.numel()):
                return f"its {part} has the shape {list(tensor.shape)}"
        for algebra in self.algebras:
            error = None if algebra.find_error is None else algebra.find_error(self.factors)
            if error is not None:
                return error
        return self._find_wrong_value() or self._find_mismatch()

    def _find_incomplete(self) -> str | None:
        """Return why the factors are incomplete or exclude each other; None if they are complete."""
        factors = self.factors
        # factors that are only useful together, such as up and down
        for first, second in composing.PAIRS:
            if first in factors and second not in factors:
                return f"it has {first} but no {second}"
            if second in factors and first not in factors:
                return f"it has {second} but no {first}"
        if self.rotation is not None:
            part = self.rotation.part
            others = [other for other in factors if other not in (part, "alpha")]
            if others:
                return f"it has {', '.join(others)} next to a rotation ({part}), which is not supported"
        if not factors.keys() & {*composing.MARKS, *_FULL}:
            return f"it has only {', '.join(factors)}"
        return None

    def _find_wrong_value(self) -> str | None:
        """Return what is wrong with the values of the factors; None if all are finite numbers."""
        if "alpha" in self.factors and not is_number(self.factors["alpha"]):
            return "its alpha is NaN or infinite, or more than one number"
        for part, tensor in self.factors.items():
            if part == ROWS:
                continue
            if part != "alpha" and not tensor.is_floating_point():
                return f"its {part} is of the type {dtype_name(tensor.dtype)}, which no factor is"
            if not is_finite(tensor):
                num_non_finite = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
                return f"{num_non_finite} of {tensor.numel()} values of its {part} are NaN or infinite"
        return None

    def _find_mismatch(self) -> str | None:
        """Return why the shapes of the factors contradict each other; None if they match."""
        try:
            shape = self.shape()
        except MismatchError:
            return f"its factors do not go together: {self._show_shapes()}"
        if shape is None or OF_BIAS.isdisjoint(self.factors):
            return None
        bias = self.bias(CPU)
        assert bias is not None
        rows = shape[0] if shape else 0
        if bias.numel() != rows:
            return f"its bias has {bias.numel()} values, its weight {rows} rows: {self._show_shapes()}"
        return None

    def _show_shapes(self) -> str:
        """Return the shapes of the factors for messages."""
        sized = without_alpha(self.factors)
        return ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sized.items())

    def find_other_channels(self, weight: Tensor) -> str | None:
        """Return the reason if this change does not fit a first layer only because of the input channels.

        It is None if the change fits, or does not fit for other reasons. Image-to-video models have more
        input channels than the text-to-video models that many LoRAs are for.

        Args:
            weight: Weight of the layer, out in kernel.
        """
        shape = self.shape()
        if shape is None or len(shape) != weight.ndim or len(shape) < 2 or shape[1] == weight.shape[1]:
            return None
        # other outputs or another kernel: a different model
        if shape[0] != weight.shape[0] or shape[2:] != tuple(weight.shape[2:]):
            return None
        return f"its first layer takes {shape[1]} channels, the model's {weight.shape[1]}"


def read_deltas(modules: Mapping[str, Factors]) -> dict[str, Delta]:
    """Return the change of each module of a file; kinds are looked up once for modules with equal parts."""
    algebras: dict[frozenset[str], tuple[Algebra, ...]] = {}
    deltas: dict[str, Delta] = {}
    for module, factors in modules.items():
        parts = frozenset(factors)
        if parts not in algebras:
            algebras[parts] = _find_algebras(parts)
        deltas[module] = Delta(factors, algebras[parts])
    return deltas


def read_delta(factors: Factors) -> Delta:
    """Return the change of one module by its factors. For a whole file, `read_deltas` is faster."""
    return Delta(factors, _find_algebras(factors))


def _find_algebras(parts: Iterable[str]) -> tuple[Algebra, ...]:
    """Return the computations (`Algebra`) of each kind that has one of these parts, or several."""
    parts = set(parts)
    algebras = []
    for kind in KINDS:
        algebra = None if parts.isdisjoint(kind.parts) else kind.load_algebra()
        if algebra is not None:
            algebras.append(algebra)
    return tuple(algebras)
