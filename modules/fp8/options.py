"""Options for 8-bit weights of the transformer and 8-bit products.

Training and generation name them differently.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.options import Options, option

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


_BASE = (
    "keep the linear layers of the model's blocks in fp8: half the memory of bf16; weights already in fp8 "
    "stay as they are"
)
_SCALED = (
    "first divide each row of a weight by its own scale: much closer to the file's weights than a plain cast"
)
_FAST = (
    "also multiply the linear layers of the blocks in fp8{when}, with a scale for each token: up to twice as "
    "fast, a little less exact; for NVIDIA RTX 40, L4, H100 and later"
)
_UPCAST = "with --fp8_scaled: compute scales and rounding in float32 instead of the file's dtype"


class TrainingFp8Options(Options):
    """How training stores the frozen model."""

    fp8_base: bool = option(_BASE, often=True)
    fp8_scaled: bool = option(f"with --fp8_base: {_SCALED}", needs="fp8_base", often=True)
    fp8_fast: bool = option(
        "with --fp8_base: " + _FAST.format(when=", both forward and for the gradient of their input"),
        needs="fp8_base",
    )
    upcast_quantization: bool = option(_UPCAST)

    @property
    def quantisation(self) -> Quantisation | None:
        """Return how to store the weights in 8 bits; None if they keep the dtype that other options set."""
        if not self.fp8_base:
            return None
        kind = "rows" if self.fp8_scaled else "cast"
        return Quantisation(kind, float32_scales=self.upcast_quantization, fp8_matmul=self.fp8_fast)


class GenerationFp8Options(Options):
    """How generation stores the model."""

    fp8: bool = option(_BASE, often=True)
    fp8_scaled: bool = option(f"the same, but {_SCALED}; replaces --fp8", often=True)
    fp8_fast: bool = option(f"with --fp8_scaled or --fp8: {_FAST.format(when='')}")
    upcast_linear: bool = option(
        "with --fp8_scaled: compute these layers in float32; slow", needs="fp8_scaled"
    )
    upcast_quantization: bool = option(_UPCAST)

    def __post_init__(self) -> None:
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
