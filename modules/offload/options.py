"""Options that keep blocks and input layers in host memory until they are needed."""

import argparse

from modules.errors import OptionError
from modules.options import Options, not_needed, option

AUTO = "auto"
SLOTS = 2  # slots of a list of blocks on the device: for the block that computes and for the next one


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


class SwapOptions(Options):
    """How much of the transformer stays in host memory."""

    # None and 0: none. `AUTO`: as many as memory requires
    blocks_to_swap: int | str | None = option(
        "keep that many of the transformer's blocks in host memory and copy each to the device before it "
        "runs; a number, or auto; at most all but one. Exact, and costs little time if a block computes "
        "longer than its copy takes",
        type=number_or_auto,
        metavar="N",
        least=0,
        often=True,
    )
    img_in_txt_in_offloading: bool = option(
        "keep the weights of the input layers in host memory except while they run: saves little memory, "
        "costs little time"
    )
    block_swap_ring_size: int = option(
        "how many swapped blocks are on the device at a time, the one that computes among them; they count "
        "towards the blocks that --blocks_to_swap leaves there. More than 2 help if copies take unevenly "
        "long",
        default=SLOTS,
        least=SLOTS,
        hint="one block computes while the next one is copied",
    )
    use_pinned_memory_for_block_swap = not_needed(
        "for a CUDA device swapped blocks always wait in pinned memory"
    )
    block_swap_h2d_only = not_needed("frozen weights are copied to the device only, never back")

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
