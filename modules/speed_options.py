"""Options that trade speed, memory and precision: attention, fp8 weights, block swap, compilation."""

import argparse
import logging
from dataclasses import dataclass, field, replace
from typing import TypeVar

from modules.attention.options import (
    GenerationAttentionOptions,
    TrainingAttentionOptions,
    add_generation_attention_arguments,
    add_training_attention_arguments,
)
from modules.compile_options import (
    GenerationCompileOptions,
    TrainingCompileOptions,
    add_generation_compile_arguments,
    add_training_compile_arguments,
)
from modules.fp8.options import (
    GenerationFp8Options,
    TrainingFp8Options,
    add_generation_fp8_arguments,
    add_training_fp8_arguments,
)
from modules.offload.options import SwapOptions, add_swap_arguments
from modules.options import FREE, HABIT, NO_PIXELS
from modules.planning.options import PlanOptions, add_plan_argument

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadingOptions:
    """How checkpoints are read: what another tuner's option asks for is always so."""

    disable_numpy_memmap: bool

    def __post_init__(self) -> None:
        if self.disable_numpy_memmap:
            logger.info(
                "--disable_numpy_memmap is not needed: safetensors files are read in pieces, never mapped"
            )


@dataclass(frozen=True)
class TrainingSpeedOptions:
    """Speed and memory options of training."""

    attention: TrainingAttentionOptions = field(metadata=FREE)
    fp8: TrainingFp8Options = field(metadata=HABIT)
    swap: SwapOptions = field(metadata=FREE)
    plan: PlanOptions = field(metadata=FREE)
    reading: ReadingOptions = field(metadata=FREE)
    compilation: TrainingCompileOptions


@dataclass(frozen=True)
class GenerationSpeedOptions:
    """Speed and memory options of generation."""

    attention: GenerationAttentionOptions
    fp8: GenerationFp8Options
    compilation: GenerationCompileOptions
    fp16_accumulation: bool
    swap: SwapOptions = field(metadata=NO_PIXELS)  # equal to the bit
    plan: PlanOptions = field(metadata=NO_PIXELS)
    reading: ReadingOptions = field(metadata=NO_PIXELS)
    by_preset: tuple[str, ...] = field(metadata=NO_PIXELS)  # options that --optimized has turned on
    not_by_preset: tuple[str, ...] = field(metadata=NO_PIXELS)  # those that are given instead


Speed = TypeVar("Speed", TrainingSpeedOptions, GenerationSpeedOptions)


def set_blocks_to_swap(speed: Speed, blocks: int) -> Speed:
    """Return the options with that number of blocks to swap, as after resolving --blocks_to_swap auto."""
    return replace(speed, swap=replace(speed.swap, blocks_to_swap=blocks))


def add_training_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TrainingSpeedOptions`."""
    add_training_attention_arguments(parser)
    group = parser.add_argument_group("memory and speed")
    add_training_fp8_arguments(group)
    add_swap_arguments(group, None)
    add_training_compile_arguments(group)
    _add_reading_arguments(group)
    add_plan_argument(group)


def add_generation_speed_arguments(parser: argparse.ArgumentParser, blocks_to_swap: int | None = 0) -> None:
    """Add the arguments of `GenerationSpeedOptions`.

    blocks_to_swap: default of --blocks_to_swap, which means none.
    """
    group = parser.add_argument_group("memory and speed")
    add_generation_attention_arguments(parser, group)
    group.add_argument(
        "--fp16_accumulation",
        action="store_true",
        help="accumulate fp16 matrix products in fp16: faster on some GPUs, less exact",
    )
    add_generation_fp8_arguments(group)
    add_swap_arguments(group, blocks_to_swap)
    add_generation_compile_arguments(group)
    _add_reading_arguments(group)
    add_plan_argument(group)
    parser.set_defaults(by_preset=(), not_by_preset=())


def _add_reading_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--disable_numpy_memmap",
        action="store_true",
        help="not needed: safetensors files are read in pieces, never mapped",
    )
