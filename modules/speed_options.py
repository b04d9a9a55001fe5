"""Options that trade speed, memory and exactness, composed: attention, fp8 weights, block swap,
compilation.
"""

import argparse
from dataclasses import dataclass, replace
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
from modules.planning.options import PlanOptions, add_plan_argument


@dataclass(frozen=True)
class TrainingSpeedOptions:
    """What training can choose."""

    attention: TrainingAttentionOptions
    fp8: TrainingFp8Options
    swap: SwapOptions
    plan: PlanOptions
    compilation: TrainingCompileOptions


@dataclass(frozen=True)
class GenerationSpeedOptions:
    """What generation can choose."""

    attention: GenerationAttentionOptions
    fp8: GenerationFp8Options
    compilation: GenerationCompileOptions
    fp16_accumulation: bool
    swap: SwapOptions
    plan: PlanOptions
    by_preset: tuple[str, ...]  # options that --optimized has turned on


Speed = TypeVar("Speed", TrainingSpeedOptions, GenerationSpeedOptions)


def swapping(speed: Speed, blocks: int) -> Speed:
    """The same options with that number of blocks to swap, as where --blocks_to_swap auto was resolved."""
    return replace(speed, swap=replace(speed.swap, blocks_to_swap=blocks))


def add_training_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TrainingSpeedOptions`, and those that are refused."""
    add_training_attention_arguments(parser)
    group = parser.add_argument_group("memory and speed")
    add_training_fp8_arguments(group)
    add_swap_arguments(group, None)
    add_training_compile_arguments(group)
    add_plan_argument(group)


def add_generation_speed_arguments(parser: argparse.ArgumentParser, blocks_to_swap: int | None = 0) -> None:
    """Add the arguments of `GenerationSpeedOptions`, and those that are refused.

    blocks_to_swap: its default, which means none.
    """
    group = parser.add_argument_group("memory and speed")
    add_generation_attention_arguments(parser, group)
    group.add_argument(
        "--fp16_accumulation",
        action="store_true",
        help="sum fp16 matrix products in fp16: faster on some GPUs, less exact",
    )
    add_generation_fp8_arguments(group)
    add_swap_arguments(group, blocks_to_swap)
    add_generation_compile_arguments(group)
    add_plan_argument(group)
    parser.set_defaults(by_preset=())
