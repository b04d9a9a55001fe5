"""Weights of the transformer in 8 bits, and products in 8 bits. Training and generation name them differently."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.options import add_unsupported

NO_FAST = "products in 8 bits are not built yet; leave it out"


@dataclass(frozen=True)
class Quantisation:
    """How weights are kept in 8 bits, and how layers compute with them."""

    kind: str  # cast: rounded as they are; tensor, rows: divided by a scale first, one for each weight or for each of its rows
    float32_scales: bool = False  # scales and quotients in float32, rather than in the weight's dtype
    float32_linear: bool = False  # the layers compute in float32
    fp8_matmul: bool = False  # the layers multiply in 8 bits


@dataclass(frozen=True)
class TrainingFp8Options:
    """How training keeps the frozen model."""

    fp8_base: bool
    fp8_scaled: bool
    upcast_quantization: bool

    def __post_init__(self) -> None:
        if self.fp8_scaled and not self.fp8_base:
            raise OptionError("--fp8_scaled needs --fp8_base: give both")

    @property
    def quantisation(self) -> Quantisation | None:
        """None: weights are kept as the other options say."""
        if not self.fp8_base:
            return None
        return Quantisation("rows" if self.fp8_scaled else "cast", float32_scales=self.upcast_quantization)


@dataclass(frozen=True)
class GenerationFp8Options:
    """How generation keeps the model."""

    fp8: bool
    fp8_scaled: bool
    upcast_linear: bool
    upcast_quantization: bool

    def __post_init__(self) -> None:
        if self.upcast_linear and not self.fp8_scaled:
            raise OptionError("--upcast_linear needs --fp8_scaled: without it there are no layers for it to compute in float32")

    @property
    def quantisation(self) -> Quantisation | None:
        """None: weights are kept as the other options say. --fp8_scaled replaces --fp8."""
        if self.fp8_scaled:
            return Quantisation("rows", float32_scales=self.upcast_quantization, float32_linear=self.upcast_linear)
        return Quantisation("cast") if self.fp8 else None


_BASE = "keep the linear layers of the model's blocks in fp8: half the memory of bf16; a file in fp8 stays as it is"
_SCALED = "divide each row of them by a scale of its own first: much closer to the file's weights than a plain cast"
_UPCAST = "with --fp8_scaled: scales and rounding in float32, rather than in the dtype of the file"


def add_training_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of `TrainingFp8Options`."""
    group.add_argument("--fp8_base", action="store_true", help=_BASE)
    group.add_argument("--fp8_scaled", action="store_true", help=f"with --fp8_base: {_SCALED}")
    group.add_argument("--upcast_quantization", action="store_true", help=_UPCAST)


def add_generation_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of `GenerationFp8Options`, and what is refused."""
    group.add_argument("--fp8", action="store_true", help=_BASE)
    group.add_argument("--fp8_scaled", action="store_true", help=f"the same, but {_SCALED}; replaces --fp8")
    add_unsupported(group, "--fp8_fast", reason=NO_FAST, action="store_true", help="multiply in fp8")
    group.add_argument("--upcast_linear", action="store_true", help="with --fp8_scaled: compute these layers in float32; slow")
    group.add_argument("--upcast_quantization", action="store_true", help=_UPCAST)
