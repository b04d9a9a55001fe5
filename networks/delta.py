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
from networks.kinds import KINDS, composing
from networks.kinds.algebra import Algebra, InputRotation, Magnitudes, MismatchError
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import Factors
from networks.module_factors import (
    BIAS_FACTORS,
    CPU,
    FACTOR_NAMES,
    ROW_RANGE,
    SET_WEIGHT,
    compute_scaling,
    is_number,
    make_bias_change,
    read_row_range,
    without_alpha,
)

_FULL_SIZE_FACTORS = {"diff", "diff_b", SET_WEIGHT}  # as large as the weight or the bias
# names of tensors that are not multiplied with other factors
_NOT_IN_PRODUCT = {"alpha", "diff", SET_WEIGHT, MAGNITUDES, ROW_RANGE, *BIAS_FACTORS}


@dataclass
class Delta:
    """The factors of one module in a LoRA file, and how they change the module's weight and bias."""

    factors: Factors  # by the ending of the tensor's name: "lora_up.weight" -> tensor
    kinds: tuple[Algebra, ...]  # how each kind (LoRA, LoKr, DoRA) computes with its factors
    # whether a tensor replaces the model's weight, as in ComfyUI
    replaces_weight: bool = field(init=False)
    # whether a tensor is as large as the weight: a full difference or a replacement
    has_full_matrix: bool = field(init=False)
    # whether the factors belong to a larger layer, of which only the rows in `ROW_RANGE` are used
    has_row_range: bool = field(init=False)
    rotation: InputRotation | None = field(init=False)  # rotation of the input; None: the change is added
    normalization: Magnitudes | None = field(init=False)  # DoRA's; None: the weight is not normalized

    def __post_init__(self) -> None:
        rotations = (kind.rotation for kind in self.kinds if kind.rotation is not None)
        normalizations = (kind.magnitudes for kind in self.kinds if kind.magnitudes is not None)
        self.replaces_weight = SET_WEIGHT in self.factors
        self.has_full_matrix = SET_WEIGHT in self.factors or "diff" in self.factors
        self.has_row_range = ROW_RANGE in self.factors
        self.rotation = next(rotations, None)
        self.normalization = next(normalizations, None)

    @property
    def magnitudes(self) -> Tensor | None:
        """Trained norms of the changed weight, out x 1 (x 1 ...) or 1 x in (x 1 ...); None without DoRA."""
        return None if self.normalization is None else self.factors[self.normalization.factor_name]

    @property
    def has_input_magnitudes(self) -> bool:
        """Whether DoRA magnitudes are norms of columns, which all rows of a weight share."""
        magnitudes = self.magnitudes
        return magnitudes is not None and len(magnitudes) < magnitudes.numel()

    @property
    def depends_on_weight(self) -> bool:
        """Whether the change cannot be computed without the frozen weight (DoRA, OFT)."""
        return self.rotation is not None or self.normalization is not None

    def to(self, device: torch.device) -> "Delta":
        """Return a copy with factors on the device; alpha and `ROW_RANGE`, read by the host, stay."""
        moved = dict(self.factors)
        for name, tensor in self.factors.items():
            if name not in ("alpha", ROW_RANGE):
                moved[name] = tensor.to(device)
        return replace(self, factors=moved)

    # --- the change

    def compute_change(self, device: torch.device) -> Tensor | None:
        """Return the change of the weight at multiplier 1, out x in (x kernel), as a new float32 tensor.

        DoRA magnitudes are not applied.

        Returns:
            The change; None for an input rotation, for a replacement weight, and if only the bias changes.

        Raises:
            RuntimeError: If the shapes of the factors do not match.
        """
        factors: dict[str, Tensor] = {}
        for name, tensor in self.factors.items():
            if name != ROW_RANGE:
                factors[name] = tensor.to(device, torch.float32)
        changes = [factors["diff"].clone()] if "diff" in factors else []
        scaling = compute_scaling(self.factors)
        for kind in self.kinds:
            change = kind.compute_change(factors, scaling)
            if change is not None:
                changes.append(change)
        if not changes:
            return None
        total = functools.reduce(Tensor.add_, changes)
        if not self.has_row_range:
            return total
        start, stop = read_row_range(self.factors)
        return total[start:stop]

    def change_shape(self) -> tuple[int, ...] | None:
        """Return the shape of the change, out x in (x kernel), from the shapes of the factors.

        Returns None for an input rotation, for a replacement weight, and if only the bias changes. Meta
        tensors are avoided, because the first operation on them loads torch's compiler, which takes seconds.

        Raises:
            MismatchError: If the shapes of the factors do not match.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.factors.items()}
        change_shapes = [shapes["diff"]] if "diff" in shapes else []  # they are added, so all must be equal
        try:
            for kind in self.kinds:
                shape = kind.shape(shapes)
                if shape is not None:
                    change_shapes.append(shape)
        except (KeyError, IndexError, ValueError) as error:
            raise MismatchError(f"{error} is absent or has too few axes") from error
        if not change_shapes:
            return None
        if len(set(change_shapes)) > 1:
            raise MismatchError(f"changes of {' and '.join(str(list(shape)) for shape in change_shapes)}")
        if not self.has_row_range:
            return change_shapes[0]
        # the factors are for a fused layer, such as qkv, but this change uses only some rows, such as q
        num_layer_rows, *columns = change_shapes[0]
        start, stop = read_row_range(self.factors)
        num_rows = len(range(num_layer_rows)[start:stop])
        return num_rows, *columns

    def compute_normalized_change(
        self, weight: Tensor, device: torch.device, uses_frozen_norms: bool
    ) -> Tensor | None:
        """Return the float32 change of a weight at multiplier 1, with DoRA magnitudes applied.

        Returns None for an input rotation, for a replacement weight, and if only the bias changes.

        Args:
            weight: Weight before any change, out x in (x kernel); used only if there are magnitudes.
            device: Device to compute on, the weight's own.
            uses_frozen_norms: Whether rows are divided by the norms of the frozen weight instead of the norms
                of the changed weight.
        """
        delta = self.compute_change(device)
        if delta is None or self.normalization is None:
            return delta
        magnitudes = self.factors[self.normalization.factor_name]
        return self.normalization.decompose(weight, delta, magnitudes, uses_frozen_norms)

    def compute_rows(self, rows: slice | Tensor, device: torch.device) -> "Delta":
        """Return some rows of this change as a dense difference, for factors (LoKr) that cannot be sliced."""
        dense = self.compute_change(device)
        assert dense is not None
        factors = {"diff": dense[rows]}
        if self.normalization is not None:
            name = self.normalization.factor_name
            factors[name] = self.factors[name][rows]
        bias = self.compute_bias_change(device)
        if bias is not None:
            factors["diff_b"] = bias[rows]
        return read_delta(factors)

    def compute_bias_change(self, device: torch.device) -> Tensor | None:
        """Return the change of the bias at multiplier 1 as a new float32 tensor; None if there is none."""
        return make_bias_change(self.factors, device)

    def without_bias(self) -> "Delta":
        """Return a copy that changes only the weight."""
        factors = {name: tensor for name, tensor in self.factors.items() if name not in BIAS_FACTORS}
        return replace(self, factors=factors)

    def bias_in_file_dtype(self) -> Tensor | None:
        """Return the change of the module's bias in the file's dtype; None if the bias is not changed."""
        bias = self.compute_bias_change(CPU)
        if bias is None:
            return None
        name = next(name for name in BIAS_FACTORS if name in self.factors)
        return bias.to(self.factors[name].dtype)

    # --- sizes

    def matrix_size(self) -> tuple[int, int] | None:
        """Return the rows and columns of the changed weight; None if it is unknown or not a matrix.

        If the factors belong to a larger layer (`has_row_range`), the size of that layer is returned.
        """
        names_in_product = [
            name for name in self.factors if name in FACTOR_NAMES and name not in _NOT_IN_PRODUCT
        ]
        if any(self.factors[name].ndim != 2 for name in names_in_product):
            return None
        full_matrix = self.factors.get("diff", self.factors.get(SET_WEIGHT))
        if full_matrix is not None:
            return (full_matrix.shape[0], full_matrix.shape[1]) if full_matrix.ndim == 2 else None
        if not composing.TUCKER_CORES.isdisjoint(self.factors):  # a convolution with a Tucker core
            return None
        layer_factors = {name: tensor for name, tensor in self.factors.items() if name != ROW_RANGE}
        try:
            shape = replace(self, factors=layer_factors).change_shape()
        except MismatchError:
            return None
        return None if shape is None else (shape[0], math.prod(shape[1:]))

    def count_rows(self) -> int | None:
        """Return the number of rows of the module's weight; None if the factors do not reveal it."""
        if self.has_row_range:
            first, last = read_row_range(self.factors)
            return last - first
        size = self.matrix_size()
        return None if size is None else size[0]

    # --- rows

    def select_rows(self, rows: slice | Tensor) -> "Delta | None":
        """Return a delta for some rows of the change, such as q's rows in qkv; None if that is impossible.

        It is impossible for LoKr, whose factors have no row for each row of the change, for per-input
        magnitudes, whose norms need all rows, and for a delta that already has a row range.

        Args:
            rows: A slice, which gives views, or row indices in any order.
        """
        if self.has_row_range:
            return None
        factors = dict(self.factors)
        for name in _FULL_SIZE_FACTORS & self.factors.keys():
            factors[name] = self.factors[name][rows]
        for kind in self.kinds:
            # slice the factors that have one row per output, such as up
            sliced_factors = kind.select_rows(self.factors, rows)
            if sliced_factors is None:
                return None
            factors.update(sliced_factors)
        return replace(self, factors=factors)

    def slice_rows(self, start: int, stop: int) -> "Delta":
        """Return a delta for the rows from `start` to `stop` (exclusive) of a fused layer, such as q in qkv.

        Factors are cut if their kind allows it. Otherwise (LoKr), all factors stay, and `ROW_RANGE` records
        the rows; only biases and per-row magnitudes are cut.
        """
        sliced = self.select_rows(slice(start, stop))
        if sliced is not None:
            factors = dict(sliced.factors)
        else:
            factors = {**self.factors, ROW_RANGE: torch.tensor([start, stop])}
            names_with_rows = {*BIAS_FACTORS} if self.has_input_magnitudes else {MAGNITUDES, *BIAS_FACTORS}
            for name in self.factors.keys() & names_with_rows:
                factors[name] = self.factors[name][start:stop]
        # copies, because safetensors files cannot contain tensors that share memory
        return replace(self, factors={name: tensor.clone() for name, tensor in factors.items()})

    def find_factors_with_rows(self) -> set[str] | None:
        """Return the factors that have one row per row of the weight; None if rows cannot be cut out."""
        all_names = set(self.factors.keys() & _FULL_SIZE_FACTORS)
        for kind in self.kinds:
            factor_names = kind.find_factors_with_rows(self.factors)
            if factor_names is None:
                return None
            all_names |= factor_names
        return all_names

    def slice_factors(self, start: int, stop: int) -> Factors | None:
        """Return the factors for the rows from `start` to `stop`; None if their kind cannot be cut there.

        A LoKr can be cut only between blocks of rows. The result has no `ROW_RANGE`, the tensor that says
        which rows of a layer a part covers.
        """
        size = self.matrix_size()
        if size is None:
            return None
        num_rows, _ = size
        layer_factors = {name: tensor for name, tensor in self.factors.items() if name != ROW_RANGE}
        for kind in self.kinds:
            factors = kind.slice_factors(layer_factors, num_rows, start, stop)
            if factors is not None:
                return factors
        return None

    def describe_indivisible_kind(self) -> str:
        """Return the kind that prevents cutting these factors by rows, with its article: "a LoKr"."""
        titles = (kind.indivisible for kind in self.kinds if kind.indivisible)
        return next(titles, "this network")

    # --- errors

    def find_error(self) -> str | None:
        """Return why the factors are unusable, for a message: "it has ..."; None if they are usable."""
        factors = self.factors
        # factors that are only useful together, such as up and down, or that exclude each other
        for first, second in composing.FACTOR_PAIRS:
            if first in factors and second not in factors:
                return f"it has {first} but no {second}"
            if second in factors and first not in factors:
                return f"it has {second} but no {first}"
        if self.rotation is not None:
            rotation_name = self.rotation.factor_name
            other_names = [name for name in factors if name not in (rotation_name, "alpha")]
            if other_names:
                other_list = ", ".join(other_names)
                return f"it has {other_list} next to a rotation ({rotation_name}), which is not supported"
        if not factors.keys() & {*composing.KIND_BY_FACTOR, *_FULL_SIZE_FACTORS}:
            return f"it has only {', '.join(factors)}"
        # shapes that no change can have
        for name, tensor in factors.items():
            if name not in _NOT_IN_PRODUCT and (tensor.ndim < 2 or not tensor.numel()):
                return f"its {name} has the shape {list(tensor.shape)}"
        for kind in self.kinds:
            error = None if kind.find_error is None else kind.find_error(factors)
            if error is not None:
                return error
        # wrong dtypes, and values that are not finite
        if "alpha" in factors and not is_number(factors["alpha"]):
            return "its alpha is NaN or infinite, or more than one number"
        for name, tensor in factors.items():
            if name == ROW_RANGE:
                continue
            if name != "alpha" and not tensor.is_floating_point():
                return f"its {name} is of the type {dtype_name(tensor.dtype)}, which no factor is"
            if not is_finite(tensor):
                num_non_finite = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
                return f"{num_non_finite} of {tensor.numel()} values of its {name} are NaN or infinite"
        # shapes that contradict each other
        try:
            shape = self.change_shape()
        except MismatchError:
            return f"its factors do not match each other: {self._show_shapes()}"
        if shape is None or BIAS_FACTORS.isdisjoint(factors):
            return None
        bias = self.compute_bias_change(CPU)
        assert bias is not None
        rows = shape[0] if shape else 0
        if bias.numel() != rows:
            return f"its bias has {bias.numel()} values, its weight {rows} rows: {self._show_shapes()}"
        return None

    def _show_shapes(self) -> str:
        """Describe the shapes of the factors, for error messages."""
        sized = without_alpha(self.factors)
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sized.items())

    def describe_channel_mismatch(self, weight: Tensor) -> str | None:
        """Return a message if this change fits a first layer except for its number of input channels.

        Returns None if the change fits, or if it does not fit for other reasons. Image-to-video models have
        more input channels than the text-to-video models that many LoRAs are trained for.

        Args:
            weight: Weight of the layer, out x in x kernel.
        """
        shape = self.change_shape()
        if shape is None or len(shape) != weight.ndim or len(shape) < 2:
            return None
        out_channels, in_channels, *kernel = shape
        weight_out_channels, weight_in_channels, *weight_kernel = weight.shape
        if in_channels == weight_in_channels:
            return None
        if out_channels != weight_out_channels or kernel != weight_kernel:
            return None
        return f"its first layer takes {in_channels} channels, the model's {weight_in_channels}"


def read_deltas(modules: Mapping[str, Factors]) -> dict[str, Delta]:
    """Return the `Delta` of each module; kinds are looked up only once for modules with equal factors."""
    kinds_by_names: dict[frozenset[str], tuple[Algebra, ...]] = {}
    deltas: dict[str, Delta] = {}
    for module, factors in modules.items():
        factor_names = frozenset(factors)
        if factor_names not in kinds_by_names:
            kinds_by_names[factor_names] = _find_algebras(factor_names)
        deltas[module] = Delta(factors, kinds_by_names[factor_names])
    return deltas


def read_delta(factors: Factors) -> Delta:
    """Return the `Delta` of one module, given its factors. `read_deltas` is faster for a whole file."""
    return Delta(factors, _find_algebras(factors))


def _find_algebras(factor_names: Iterable[str]) -> tuple[Algebra, ...]:
    """Return the `Algebra` of each network kind that has one or more of these factors."""
    factor_names = set(factor_names)
    algebras: list[Algebra] = []
    for kind in KINDS:
        algebra = None if factor_names.isdisjoint(kind.parts) else kind.load_algebra()
        if algebra is not None:
            algebras.append(algebra)
    return tuple(algebras)
