"""A network that runs next to a U-Net, such as a ControlNet in training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class UnetControl:
    """Hold a control network next to a U-Net, without registering it as a submodule."""

    # called before each U-Net call with control images, B 3 H W in 0..1 (None for none), their strength and
    # the call's arguments; returns additional arguments
    compute_arguments: Callable[[Tensor | None, float, Mapping[str, Any]], dict[str, Any]]
