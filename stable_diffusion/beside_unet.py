"""What stands next to a U-Net and sees each of its calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BesideUnet:
    """A network next to a U-Net, held without registering it as a submodule."""

    # given control images, B 3 H W in 0..1 (None: there are none), their strength and the arguments of a
    # call of the U-Net: further arguments for it
    see: Callable[[Tensor | None, float, Mapping[str, Any]], dict[str, Any]]
