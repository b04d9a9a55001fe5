"""The option of all families for the dtype of their transformer. Standard library only."""

import argparse

from modules.errors import OptionError


def add_dit_dtype(group: argparse._ArgumentGroup) -> None:
    """Declare --dit_dtype. Its value is read by `modules.devices.choose_compute_dtype`."""
    group.add_argument(
        "--dit_dtype",
        type=str,
        default=None,
        help="dtype that the transformer computes in; default: that of its file",
    )


def refuse_for_whole(dit_dtype: str | None) -> None:
    """Raise OptionError if --dit_dtype is given to the training of a whole transformer."""
    if dit_dtype is not None:
        raise OptionError(
            "--dit_dtype: trained weights are kept in float32, or in bfloat16 with --full_bf16; leave it out"
        )
