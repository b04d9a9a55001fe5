"""Which blocks wait in host memory until they are needed."""

import argparse

from modules.options import add_unsupported

NO_SWAP = "the whole model stays on the device; leave the option out, --gradient_checkpointing saves memory in training"


def add_swap_arguments(group: argparse._ArgumentGroup, default: int | None) -> None:
    """Declare what is refused yet. default: of --blocks_to_swap, which means none."""
    add_unsupported(group, "--blocks_to_swap", reason=NO_SWAP, type=int, default=default, help="keep this many blocks on the CPU")
