"""Compose the memory and speed options of training and generation, and --plan."""

import argparse
import functools
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from modules.compile_options import GenerationCompileOptions, TrainingCompileOptions
from modules.errors import OptionError
from modules.option_values import MEMORY
from modules.options import FREE, HABIT, NO_PIXELS, Options, not_needed, option
from modules.speed_options import (
    SDPA,
    SLOTS,
    GenerationAttentionOptions,
    GenerationFp8Options,
    TrainingAttentionOptions,
    TrainingFp8Options,
    get_attention_flag,
)
from runtime.ways.composing import join_ways, make_way_options_class
from runtime.ways.contract import RunModes

if TYPE_CHECKING:  # records of what the list of ways contains
    TrainingWayOptions = Options
    GenerationWayOptions = Options
else:
    TrainingWayOptions = make_way_options_class(is_training=True)
    GenerationWayOptions = make_way_options_class(is_training=False)

AUTO = "auto"


# options of swapping that act on the blocks of a transformer, or on the layers around them
SWAPPING = ("blocks_to_swap", "img_in_txt_in_offloading")


def number_or_auto(text: str) -> int | str:
    """Parse the value of --blocks_to_swap.

    Raises:
        ArgumentTypeError: If it is neither a number nor `auto`.
    """
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of blocks nor {AUTO}. Pass one of them"
        ) from None


class SwapOptions(Options):
    """Options for keeping a part of the transformer in host memory."""

    # None or 0 swaps no block; `AUTO` as many as memory requires
    blocks_to_swap: int | str | None = option(
        "keep this many transformer blocks in host memory and copy each to the device before it runs; "
        "a number, or auto; at most all but one. Results stay the same, and it costs little time if "
        "computing a block takes longer than copying it",
        type=number_or_auto,
        metavar="N",
        minimum=0,
        off=(0,),
        often=True,
        known_as=("block_swap", "swap_blocks", "block_to_swap"),
    )
    img_in_txt_in_offloading: bool = option(
        "keep the weights of the input layers in host memory except while they run: saves little memory, "
        "costs little time"
    )
    block_swap_ring_size: int = option(
        "number of swapped blocks on the device at a time, including the one being computed; they "
        "count toward the blocks that --blocks_to_swap leaves there. More than 2 helps if copy times "
        "vary",
        default=SLOTS,
        minimum=SLOTS,
        ignored_without="blocks_to_swap",
        hint="one block computes while the next one is copied",
    )
    use_pinned_memory_for_block_swap = not_needed(
        "for a CUDA device swapped blocks always wait in pinned memory"
    )
    block_swap_h2d_only = not_needed("frozen weights are copied to the device only, never back")

    @property
    def is_auto(self) -> bool:
        """Return whether the number of blocks is not chosen yet; `set_blocks_to_swap` sets it."""
        return self.blocks_to_swap == AUTO

    @property
    def used_flag(self) -> str:
        """Return the first active swap option as typed on the command line; "" if there is none."""
        if self.blocks_to_swap:
            return f"--blocks_to_swap {self.blocks_to_swap}"
        return "--img_in_txt_in_offloading" if self.img_in_txt_in_offloading else ""

    def reject_trained(self, steps_in_backward: bool) -> None:
        """Raise OptionError if swapped weights would be trained by a method that does not support swapping.

        Args:
            steps_in_backward: Whether each weight is stepped during the backward pass
                (--fused_backward_pass).
        """
        if self.blocks_to_swap and not steps_in_backward:
            raise OptionError(
                f"--blocks_to_swap {self.blocks_to_swap} with trained weights: each must be stepped "
                "while its block is on the device. Add --fused_backward_pass, or omit it"
            )
        if self.img_in_txt_in_offloading:
            raise OptionError(
                "--img_in_txt_in_offloading: these layers are trained, so they must be on the device. Omit it"
            )

    @property
    def number(self) -> int:
        """Number of blocks to swap.

        Raises:
            OptionError: If it is `auto` and not resolved yet.
        """
        if isinstance(self.blocks_to_swap, str):
            raise OptionError(
                "--blocks_to_swap auto: the number of blocks is not chosen yet. Pass one, such as 20"
            )
        return self.blocks_to_swap or 0


def cards_or_size(text: str) -> str:
    """Parse the value of --plan, GIB or NxGIB.

    Raises:
        ArgumentTypeError: If it is malformed.
    """
    match = re.fullmatch(rf"([1-9][0-9]{{0,3}}x(?=.*[1-9]))?{MEMORY}", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of card memory. Pass the GiB of one, such as 24; 2x24 for two; or "
            "nothing for the card of this machine"
        )
    return f"{match[1] or ''}{match[2]}".lower()


class PlanOptions(Options):
    """Options for only predicting the memory of a run, and for which GPUs."""

    plan: str | None = option(  # 0: this machine's card; None: run
        "print the predicted peak of device and host memory by part, and exit; GIB: for a card of that size; "
        "2xGIB: the ways to use two of them, and the cheapest that fits",
        type=cards_or_size,
        nargs="?",
        const="0",
        metavar="GIB",
        often=True,
    )

    @property
    def is_planning(self) -> bool:
        """Whether --plan is given, so that the command only predicts its memory and exits."""
        return self.plan is not None

    @property
    def cards(self) -> tuple[int, float]:
        """Return the number of GPUs to plan for and the GiB of each; 0 GiB: the size of this machine's."""
        count, _, size = (self.plan or "0").rpartition("x")
        return int(count or 1), float(size)


_READ_IN_PIECES = not_needed("safetensors files are read in pieces, never mapped")


class TrainingSpeedOptions(Options, title="memory and speed"):
    """Speed and memory options of training."""

    attention: TrainingAttentionOptions = option(facts=FREE)
    fp8: TrainingFp8Options = option(facts=HABIT)
    swap: SwapOptions = option(facts=FREE)
    ways: TrainingWayOptions = option(facts=FREE)
    compilation: TrainingCompileOptions
    disable_numpy_memmap = _READ_IN_PIECES
    plan: PlanOptions = option(facts=FREE)

    def __post_init__(self) -> None:
        _ = self.modes  # raises OptionError

    @functools.cached_property
    def modes(self) -> RunModes:
        """Return what the active run modes contribute to the run."""
        return join_ways(self)


class GenerationSpeedOptions(Options, title="memory and speed"):
    """Speed and memory options of generation."""

    attention: GenerationAttentionOptions
    fp16_accumulation: bool = option(
        "accumulate fp16 matrix products in fp16: faster on some GPUs, less exact"
    )
    fp8: GenerationFp8Options
    swap: SwapOptions = option(facts=NO_PIXELS)  # bit-identical
    ways: GenerationWayOptions
    compilation: GenerationCompileOptions
    disable_numpy_memmap = _READ_IN_PIECES
    plan: PlanOptions = option(facts=NO_PIXELS)
    by_preset: tuple[str, ...] = option(default=(), facts=NO_PIXELS)  # options that --optimized has turned on
    not_by_preset: tuple[str, ...] = option(default=(), facts=NO_PIXELS)  # options that the user gave instead

    def __post_init__(self) -> None:
        _ = self.modes  # raises OptionError

    @functools.cached_property
    def modes(self) -> RunModes:
        """Return what the active run modes contribute to the run."""
        return join_ways(self)


Speed = TypeVar("Speed", TrainingSpeedOptions, GenerationSpeedOptions)


def say_for_generation(speed: TrainingSpeedOptions) -> dict[str, Any]:
    """Return the generation options, by flag, that match a training run's memory and speed options."""
    swap = speed.swap
    mode = speed.attention.choice.mode
    ring = swap.block_swap_ring_size
    return {
        "--attn_mode": None if mode == SDPA.mode else get_attention_flag(mode, training=False).split()[1],
        **speed.fp8.say_for_generation(),
        "--blocks_to_swap": swap.blocks_to_swap or None,
        "--img_in_txt_in_offloading": swap.img_in_txt_in_offloading,
        "--block_swap_ring_size": None if ring == SLOTS else ring,
        **speed.modes.flags_for_generation,
    }


def set_blocks_to_swap(speed: Speed, blocks: int) -> Speed:
    """Return the options with a different number of swapped blocks."""
    return replace(speed, swap=replace(speed.swap, blocks_to_swap=blocks))
