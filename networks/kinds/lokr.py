"""LoKr: the change of a weight is the Kronecker product of a small and a large matrix, kron(w1, w2).

`lokr_layer.py` has the computations and the trained layer. Factors have LyCORIS' names and shapes: each
matrix is stored as is or as two factors. The large matrix may have a core (lokr_t2), which can be used but
not trained.
Source: Yeh et al. 2023, arXiv 2309.14859.
"""
# Letters: out = l * k and in = m * n: w1 is l x m, w2 is k x n

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.errors import OptionError
from networks.kinds.contract import LoraModule, NetworkKind, Settings, Target, TranslatedModules
from networks.kinds.factors import Factors, Shapes
from networks.names.layouts import DIFFUSERS

if TYPE_CHECKING:  # --help must not import torch
    from torch import nn

    from networks.factored import FactoredLayer, MakeShapes
    from networks.kinds.lokr_layer import LokrAlgebra
    from networks.names.layouts import FamilyNames
    from networks.writing import Pieces

CORE = "lokr_t2"
MARKS = ("lokr_w1", "lokr_w1_a")
FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
NAME = "LoKr"
_BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def make_shapes(weight: tuple[int, ...], rank: int, factor: int = -1, decompose_both: bool = False) -> Shapes:
    """Return the shapes of the factors `lokr_w1`, `lokr_w2` and so on.

    A matrix is stored as two factors only if its larger side is more than twice the rank.

    Args:
        weight: Shape of the weight, out x in (x kernel).
        rank: Rank of the factors.
        factor: One of the two numbers into which each axis is split, if it divides the axis; -1 makes them as
            equal as possible.
        decompose_both: Whether the small matrix is stored as two factors too.
    """
    kernel = weight[2:]
    # the weight is kron(w1, w2): out = l * k, in = m * n
    l, k = split_size(weight[0], factor)  # noqa: E741
    m, n = split_size(weight[1], factor)
    first: Shapes = {"lokr_w1": (l, m)}
    if decompose_both and rank < max(l, m) / 2:
        first = {"lokr_w1_a": (l, rank), "lokr_w1_b": (rank, m)}
    if rank < max(k, n) / 2:
        return {**first, "lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n * math.prod(kernel))}
    return {**first, "lokr_w2": (k, n, *kernel)}


def split_size(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`, smaller number first.

    Args:
        size: Number to split.
        factor: One of the two numbers if it divides the size. Otherwise, the smaller number is the largest
            divisor up to `factor`. -1 makes both numbers as equal as possible.
    """
    if factor > 0 and size % factor == 0:
        other = size // factor
        return min(factor, other), max(factor, other)
    maximum = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    small = next(number for number in range(maximum, 0, -1) if size % number == 0)
    return small, size // small


def _translate_to_diffusers(
    name: str, factors: Factors, family: "FamilyNames", is_in_diffusers: bool
) -> "Pieces | str":
    """Return a LoKr as {path in diffusers: factors}, or the reason why diffusers cannot read it."""
    from networks import module_names
    from networks.names.layouts import SWAPPED
    from networks.writing import single_piece

    parts = module_names.find_parts(name, family)
    if any(path_and_part.part.index == SWAPPED for path_and_part in parts):  # a LoKr's rows cannot be swapped
        return "diffusers has its halves in the opposite order, and does not swap those of a LoKr"
    if not is_in_diffusers:
        return single_piece(module_names.module_path(name, family), factors)
    is_renamed = len(parts) == 1
    # None for a module of our layout, such as a fused qkv
    path = parts[0].path if is_renamed else module_names.part_path(name, family)
    return single_piece(path, factors, reason="diffusers splits it, like other layers of the file")


class LokrKind(NetworkKind):
    """LoKr: the change of a weight is the Kronecker product of two matrices."""

    name = NAME
    parts = (*FACTORS, CORE)
    marks = MARKS
    pairs = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))
    rank_parts = ("lokr_w2_b", "lokr_w1_b")
    cores = (CORE,)
    word = "lokr"
    network_module = "networks.lokr"
    algorithms = ("lokr",)
    orders = (FACTORS,)
    is_for_comfyui_alone = True

    def load_algebra(self) -> "LokrAlgebra":
        """Return the object that computes with the factors of a Kronecker product (LoKr)."""
        from networks.kinds.lokr_layer import LokrAlgebra  # torch

        return LokrAlgebra()

    def read_arguments(self, arguments: dict[str, Any]) -> "MakeShapes":
        """Remove LoKr's arguments; return a function that computes the shapes of factors.

        `factor=8` splits each axis into 8 and the quotient; the default -1 makes both as equal as possible.
        With `decompose_both=True`, the small matrix is stored as two factors too.

        Raises:
            OptionError: If the value of an argument is invalid.
        """
        factor_text = arguments.pop("factor", -1)
        decompose_both = str(arguments.pop("decompose_both", False))
        try:
            factor = int(factor_text)
        except ValueError:
            factor = 0  # invalid, for the error below
        if factor < 1 and factor != -1:
            raise OptionError(
                f"--network_args factor={factor_text}: use a whole number from 1, or -1 for equal parts"
            )
        if decompose_both not in _BOOLEANS:
            raise OptionError(f"--network_args decompose_both={decompose_both}: pass True or False")
        return functools.partial(make_shapes, factor=factor, decompose_both=_BOOLEANS[decompose_both])

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: "MakeShapes"
    ) -> "dict[str, nn.Module]":
        """Return a trainable layer for each target module.

        `kind_arguments`, the result of `read_arguments`, computes factor shapes from the shape of a weight
        and the rank.
        """
        from networks.factored_networks import make_layers  # torch
        from networks.kinds.lokr_layer import PRODUCT

        return make_layers(targets, kind_arguments, PRODUCT)

    def make_layer(
        self, module: LoraModule, path: str, factors: Factors, settings: Settings
    ) -> "FactoredLayer":
        """Return a trainable layer for a module, with factors of the same shapes as in a file."""
        from networks.factored_networks import make_layer  # torch
        from networks.kinds.lokr_layer import PRODUCT

        return make_layer(module, path, factors, PRODUCT)

    def find_format_error(self, name: str, family: "FamilyNames | None", has_texts: bool) -> str:
        """Return why diffusers cannot read a LoKr of this family; "" if it can, and for other formats."""
        if name != DIFFUSERS or family is None or NAME in family.kinds_in_diffusers:
            return ""
        return (
            "diffusers cannot read a LoKr for this model. Use --lora_format known, and convert it to a plain "
            "LoRA afterwards (convert_lora.py --target diffusers --bake 64)"
        )

    def write_for_diffusers(
        self, modules: Mapping[str, Factors], family: "FamilyNames"
    ) -> TranslatedModules | None:
        """Return modules in the format that both diffusers and ComfyUI read.

        Returns None if the family has no such format, or if a module has a core, magnitudes or a bias.
        """
        from networks import writing  # only if a file is written
        from networks.module_names import part_path
        from networks.names.layouts import IN_COMFYUI, OURS

        if NAME not in family.kinds_in_diffusers:
            return None
        if not all(factors.keys() <= {"alpha", *FACTORS} for factors in modules.values()):
            return None
        # either all modules are written in diffusers' layout, which has no prefix, or all in ComfyUI's
        is_in_diffusers = any(part_path(name.removeprefix(OURS), family) for name in modules)
        return writing.write_modules(
            modules,
            "" if is_in_diffusers else IN_COMFYUI,
            lambda name, factors: _translate_to_diffusers(name, factors, family, is_in_diffusers),
            writing.in_comfyui,
        )


LOKR = LokrKind()
