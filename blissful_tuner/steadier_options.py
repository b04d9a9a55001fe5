"""Options of videos that are longer than the model was trained for. Standard library only."""

import argparse

from modules.options import add_unsupported


def add_steadier_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --riflex_index."""
    group = parser.add_argument_group("longer videos")
    add_unsupported(
        group,
        "--riflex_index",
        type=int,
        default=0,
        reason="make videos of the trained length",
        help="longer videos with RIFLEx",
    )
