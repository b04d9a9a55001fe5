"""The factors of a module in a network's file, and the parts of a plain LoRA, which all tools know."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help does without torch
    from torch import Tensor

Factors = Mapping[str, "Tensor"]  # "lora_down.weight" -> tensor: the factors of one module
Shapes = Mapping[str, tuple[int, ...]]  # of factors, by part
DOWN, UP = "lora_down.weight", "lora_up.weight"
MID, BIAS = "lora_mid.weight", "lora_up.bias"
