"""Estimate how many numbers an operator of an ONNX graph makes, from what it is given and from constants.

Sizes of single axes are not followed: the estimates of operators that enlarge are upper bounds where their
inputs' counts are, those of others follow what detectors are made of. Source of the operators:
onnx.ai/onnx/operators.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_SIDE = 640  # of an input that the file leaves open


class Constant(NamedTuple):
    """A tensor in the file that may contain sizes or weights."""

    dims: tuple[int, ...]
    values: tuple[float, ...] = ()  # of a short one; of others none
    is_float: bool = False


@dataclass(frozen=True)
class Node:
    """One operator: its type, inputs and attributes."""

    kind: str
    inputs: Sequence[str]
    settings: Mapping[str, Sequence[int]]


def input_count(shape: Sequence[int | None]) -> float:
    """Return the number of values in an input.

    Undefined sizes are 1 for the batch, else `DEFAULT_SIDE`.
    """
    count = 1.0
    for axis, size in enumerate(shape):
        if size is None:
            size = 1 if axis == 0 else DEFAULT_SIDE
        count *= float(size)
    return count


def output_count(node: Node, counts: Mapping[str, float], constants: Mapping[str, Constant]) -> float:
    """Estimate the number of values in each output of an operator.

    Args:
        node: The operator.
        counts: Number of values in each earlier result, by name.
        constants: Tensors in the file, by name.
    """
    input_counts = [counts[name] for name in node.inputs if name in counts]
    first = counts.get(node.inputs[0], 1.0) if node.inputs else 1.0
    operands = [constants[name] for name in node.inputs[1:] if name in constants]
    weight = operands[0].dims if operands else ()
    match node.kind:
        case "Conv" | "ConvTranspose" if len(weight) > 2:
            return _count_convolved(first, node, weight)
        case "MaxPool" | "AveragePool":
            return first / _read_strides(node)
        case "MatMul" | "Gemm" if len(weight) == 2:
            # which axis is summed over depends on the operator: assume the smaller one
            smaller, larger = sorted(weight)
            return first * larger / max(1, smaller)
        case "Concat":
            return sum(input_counts)
        case "Gather":
            indices = constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
            return first if indices is None else first * max(1, math.prod(indices.dims))
        case "Tile" | "OneHot":
            repeats = map(_multiply_constant, operands)
            return first * max(repeats, default=1.0)
        case "Expand":
            expanded_counts = (_count_expanded(first, shape) for shape in operands)
            return max(expanded_counts, default=first)
        case "Resize" | "Upsample":
            return _count_resized(first, operands)
        case _:
            return max(input_counts, default=1.0)


def _count_convolved(count: float, node: Node, weight: Sequence[int]) -> float:
    """Return the number of values in the result of a convolution or a transposed convolution."""
    groups = next(iter(node.settings.get("group", ())), 1)
    if node.kind == "Conv":
        outputs, inputs_of_group, *_ = weight
        return count * outputs / max(1, inputs_of_group * groups) / _read_strides(node)
    inputs, outputs_of_group, *_ = weight
    return count * outputs_of_group * groups / max(1, inputs) * _read_strides(node)


def _read_strides(node: Node) -> float:
    return math.prod(map(float, node.settings.get("strides", ()))) or 1.0


def _count_resized(count: float, operands: Sequence[Constant]) -> float:
    """Return the number of values after resizing by factors or to sizes."""
    products = [
        _multiply_constant(sizes) * (count if sizes.is_float else 1) for sizes in operands if sizes.values
    ]
    return max(products, default=count)


def _multiply_constant(constant: Constant) -> float:
    return math.prod(max(1.0, value) for value in constant.values if value < 2**63 - 1)


def _count_expanded(count: float, shape: Constant) -> float:
    """Return the number of values after expanding to a shape, in which 1 keeps the input's size."""
    keeps_size = any(value <= 1 for value in shape.values[1:])
    return max(count, _multiply_constant(shape) * (count if keeps_size else 1))
