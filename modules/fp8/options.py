"""Options for 8-bit weights of the transformer and 8-bit products.

Training and generation name them differently.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.errors import OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored in 8 bits, and how layers compute with them."""

    # cast: rounded as they are; tensor, rows: first divided by a scale, one per weight or one per row
    kind: str
    float32_scales: bool = False  # scales and quotients in float32 instead of the weight's dtype
    float32_linear: bool = False  # the layers compute in float32
    fp8_matmul: bool = False  # the layers should multiply in 8 bits
    # the 8-bit product, a modules.fp8.products.Product; None: multiply in 16 bits
    product: Callable[..., Any] | None = None


@dataclass(frozen=True)
class TrainingFp8Options:
    """How training stores the frozen model."""

    fp8_base: bool
    fp8_scaled: bool
    fp8_fast: bool
    upcast_quantization: bool

    def __post_init__(self) -> None:
        for option, is_given in (("--fp8_scaled", self.fp8_scaled), ("--fp8_fast", self.fp8_fast)):
            if is_given and not self.fp8_base:
                raise OptionError(f"{option} needs --fp8_base: give both")

    @property
    def quantisation(self) -> Quantisation | None:
        """Return how to store the weights in 8 bits; None if they keep the dtype that other options set."""
        if not self.fp8_base:
            return None
        kind = "rows" if self.fp8_scaled else "cast"
        return Quantisation(kind, float32_scales=self.upcast_quantization, fp8_matmul=self.fp8_fast)


@dataclass(frozen=True)
class GenerationFp8Options:
    """How generation stores the model."""

    fp8: bool
    fp8_scaled: bool
    fp8_fast: bool
    upcast_linear: bool
    upcast_quantization: bool

    def __post_init__(self) -> None:
        if self.upcast_linear and not self.fp8_scaled:
            raise OptionError(
                "--upcast_linear needs --fp8_scaled: give both. It makes the layers of --fp8_scaled compute "
                "in float32"
            )
        if self.upcast_quantization and not self.fp8_scaled:
            logger.warning("--upcast_quantization is ignored because --fp8_scaled is not given")
        if self.fp8_fast and not (self.fp8 or self.fp8_scaled):
            logger.warning("--fp8_fast is ignored because neither --fp8_scaled nor --fp8 is given")

    @property
    def quantisation(self) -> Quantisation | None:
        """Return how to store the weights in 8 bits, None if neither option is given.

        --fp8_scaled replaces --fp8.
        """
        if self.fp8_scaled:
            return Quantisation("rows", self.upcast_quantization, self.upcast_linear, self.fp8_fast)
        return Quantisation("cast", fp8_matmul=self.fp8_fast) if self.fp8 else None


_BASE = (
    "keep the linear layers of the model's blocks in fp8: half the memory of bf16; weights already in fp8 "
    "stay as they are"
)
_SCALED = (
    "first divide each row of a weight by its own scale: much closer to the file's weights than a plain cast"
)
_FAST = (
    "also multiply the linear layers of the blocks in fp8{when}, with a scale for each token: up to twice as "
    "fast, a little less exact; "
    "for NVIDIA RTX 40, L4, H100 and later"
)
_UPCAST = "with --fp8_scaled: compute scales and rounding in float32 instead of the file's dtype"


def add_training_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of `TrainingFp8Options`."""
    group.add_argument("--fp8_base", action="store_true", help=_BASE)
    group.add_argument("--fp8_scaled", action="store_true", help=f"with --fp8_base: {_SCALED}")
    when = ", both forward and for the gradient of their input"
    group.add_argument("--fp8_fast", action="store_true", help=f"with --fp8_base: {_FAST.format(when=when)}")
    group.add_argument("--upcast_quantization", action="store_true", help=_UPCAST)


def add_generation_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of `GenerationFp8Options`."""
    group.add_argument("--fp8", action="store_true", help=_BASE)
    group.add_argument("--fp8_scaled", action="store_true", help=f"the same, but {_SCALED}; replaces --fp8")
    group.add_argument(
        "--fp8_fast", action="store_true", help=f"with --fp8_scaled or --fp8: {_FAST.format(when='')}"
    )
    group.add_argument(
        "--upcast_linear",
        action="store_true",
        help="with --fp8_scaled: compute these layers in float32; slow",
    )
    group.add_argument("--upcast_quantization", action="store_true", help=_UPCAST)
