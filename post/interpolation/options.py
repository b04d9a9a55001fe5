"""Options of interpolation. Standard library only."""

import argparse
from dataclasses import dataclass

from post.network_options import NetworkOptions, add_network_arguments


@dataclass(frozen=True)
class InterpolationOptions:
    """How many pictures are made between two, and how."""

    network: NetworkOptions
    mode: str
    factor: int
    ds_factor: float


def add_interpolation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `InterpolationOptions`."""
    add_network_arguments(parser, "folder with the GIMM-VFI files and those of its optical flow")
    group = parser.add_argument_group("interpolation")
    group.add_argument(
        "--mode",
        type=str,
        default="gimmvfi_f",
        help="gimmvfi_r (RAFT) or gimmvfi_f (FlowFormer: better, slower)",
    )
    group.add_argument(
        "--factor", type=int, default=2, help="how many times as many pictures a second, 2 to 8"
    )
    group.add_argument(
        "--ds_factor",
        type=float,
        default=1.0,
        help="compute flow at this part of the size: 0.5 for 2K, 0.25 for 4K",
    )
