"""Options that keep blocks and input layers in host memory until they are needed."""

import argparse
import logging
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least

logger = logging.getLogger(__name__)

AUTO = "auto"
SLOTS = 2  # slots of a list of blocks on the device: for the block that computes and for the next one


@dataclass(frozen=True)
class SwapRingOptions:
    """How swapped blocks reach the device: most of it is as other tuners' options ask for anyway."""

    use_pinned_memory_for_block_swap: bool
    block_swap_h2d_only: bool
    block_swap_ring_size: int

    def __post_init__(self) -> None:
        least = "one block computes while the next one is copied"
        check_at_least("--block_swap_ring_size", self.block_swap_ring_size, SLOTS, least)
        if self.use_pinned_memory_for_block_swap:
            logger.info(
                "--use_pinned_memory_for_block_swap is not needed: for a CUDA device swapped blocks always "
                "wait in pinned memory"
            )
        if self.block_swap_h2d_only:
            logger.info(
                "--block_swap_h2d_only is not needed: frozen weights are copied to the device only, never "
                "back"
            )


@dataclass(frozen=True)
class SwapOptions:
    """How much of the transformer stays in host memory."""

    blocks_to_swap: int | str | None  # a number, or `AUTO`: as many as memory requires; None and 0: none
    img_in_txt_in_offloading: bool
    ring: SwapRingOptions

    def __post_init__(self) -> None:
        if isinstance(self.blocks_to_swap, int) and self.blocks_to_swap < 0:
            raise OptionError(f"--blocks_to_swap {self.blocks_to_swap}: give a number of blocks, 0 for none")

    @property
    def is_auto(self) -> bool:
        """Return whether the number of blocks is not chosen yet; `dataclasses.replace` sets it."""
        return self.blocks_to_swap == AUTO

    @property
    def number(self) -> int:
        """Return how many blocks to swap. Raises OptionError if the number is not chosen yet."""
        if isinstance(self.blocks_to_swap, str):
            raise OptionError(
                "--blocks_to_swap auto: the number of blocks is not chosen yet. Give one, such as 20"
            )
        return self.blocks_to_swap or 0


def number_or_auto(text: str) -> int | str:
    """Parse the value of --blocks_to_swap. Raises ArgumentTypeError if it is neither."""
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of blocks nor {AUTO}. Give one of them"
        ) from None


def add_swap_arguments(group: argparse._ArgumentGroup, default: int | None) -> None:
    """Add the arguments of `SwapOptions`. default: of --blocks_to_swap, meaning none."""
    group.add_argument(
        "--blocks_to_swap",
        type=number_or_auto,
        default=default,
        metavar="N",
        help="keep that many of the transformer's blocks in host memory and copy each to the device before "
        "it runs; a number, or auto; at most all but one. Exact, and costs little time if a block computes "
        "longer than its copy takes",
    )
    group.add_argument(
        "--img_in_txt_in_offloading",
        action="store_true",
        help="keep the weights of the input layers in host memory except while they run: saves little "
        "memory, costs little time",
    )
    group.add_argument(
        "--use_pinned_memory_for_block_swap",
        action="store_true",
        help="not needed: for a CUDA device swapped blocks always wait in pinned memory",
    )
    group.add_argument(
        "--block_swap_h2d_only",
        action="store_true",
        help="not needed: frozen weights are never copied back from the device",
    )
    group.add_argument(
        "--block_swap_ring_size",
        type=int,
        default=SLOTS,
        metavar="N",
        help="how many swapped blocks are on the device at a time, the one that computes among them; they "
        "count towards the blocks that --blocks_to_swap leaves there. More than 2 help if copies take "
        "unevenly long",
    )
