"""Options that trade speed, memory and precision: attention, fp8 weights, block swap, compilation."""

from dataclasses import replace
from typing import TypeVar

from modules.attention.options import GenerationAttentionOptions, TrainingAttentionOptions
from modules.compile_options import GenerationCompileOptions, TrainingCompileOptions
from modules.fp8.options import GenerationFp8Options, TrainingFp8Options
from modules.offload.options import SwapOptions
from modules.options import FREE, HABIT, NO_PIXELS, Options, not_needed, option
from modules.planning.options import PlanOptions

_READ_IN_PIECES = not_needed("safetensors files are read in pieces, never mapped")


class TrainingSpeedOptions(Options, title="memory and speed"):
    """Speed and memory options of training."""

    attention: TrainingAttentionOptions = option(facts=FREE)
    fp8: TrainingFp8Options = option(facts=HABIT)
    swap: SwapOptions = option(facts=FREE)
    compilation: TrainingCompileOptions
    disable_numpy_memmap = _READ_IN_PIECES
    plan: PlanOptions = option(facts=FREE)


class GenerationSpeedOptions(Options, title="memory and speed"):
    """Speed and memory options of generation."""

    attention: GenerationAttentionOptions
    fp16_accumulation: bool = option(
        "accumulate fp16 matrix products in fp16: faster on some GPUs, less exact"
    )
    fp8: GenerationFp8Options
    swap: SwapOptions = option(facts=NO_PIXELS)  # equal to the bit
    compilation: GenerationCompileOptions
    disable_numpy_memmap = _READ_IN_PIECES
    plan: PlanOptions = option(facts=NO_PIXELS)
    by_preset: tuple[str, ...] = option(default=(), facts=NO_PIXELS)  # what --optimized has turned on
    not_by_preset: tuple[str, ...] = option(default=(), facts=NO_PIXELS)  # what is given instead


Speed = TypeVar("Speed", TrainingSpeedOptions, GenerationSpeedOptions)


def set_blocks_to_swap(speed: Speed, blocks: int) -> Speed:
    """Return the options with that number of blocks to swap, as after resolving --blocks_to_swap auto."""
    return replace(speed, swap=replace(speed.swap, blocks_to_swap=blocks))
