"""Types for the factors of a module, and the names of the parts of a plain LoRA."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help must not import torch
    from torch import Tensor

Factors = Mapping[str, "Tensor"]  # the factors of one module by part, such as "lora_down.weight"
Shapes = Mapping[str, tuple[int, ...]]  # shapes of factors by part
DOWN = "lora_down.weight"
UP = "lora_up.weight"
MID = "lora_mid.weight"  # core of a convolution with a Tucker decomposition
BIAS = "lora_up.bias"
