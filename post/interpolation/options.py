"""Options of interpolation. Standard library only."""

import argparse
from dataclasses import dataclass
from fractions import Fraction

from modules.errors import OptionError
from post.network_options import ToolNetworkOptions, add_network_arguments

WITH_RAFT, WITH_FLOWFORMER = "gimmvfi_r", "gimmvfi_f"
MOST_FACTOR = 16
SMALLEST_PART = 8  # the denominators of --ds_factor go up to this
ROUNDED = 0.004  # 0.33 and 0.67 mean a third and two
ALIGNMENT = 32  # the networks need sides that are multiples of this


@dataclass(frozen=True)
class InterpolationOptions:
    """How many pictures are made between two, and how."""

    network: ToolNetworkOptions
    mode: str
    factor: int
    ds_factor: float
    scene_threshold: float

    def __post_init__(self) -> None:
        if (WITH_RAFT in self.mode.lower()) == (WITH_FLOWFORMER in self.mode.lower()):
            raise OptionError(f"--mode {self.mode}: use {WITH_RAFT} or {WITH_FLOWFORMER}")
        if not 1 <= self.factor <= MOST_FACTOR:
            raise OptionError(
                f"--factor {self.factor}: give 2 to {MOST_FACTOR}, or 1 for the pictures as they are"
            )
        if not 0 <= self.scene_threshold <= 1:
            raise OptionError(f"--scene_threshold {self.scene_threshold}: give 0 (off) to 1")
        if not 0 < self.ds_factor <= 1 or abs(float(self.part) - self.ds_factor) > ROUNDED:
            raise OptionError(
                f"--ds_factor {self.ds_factor}: give a simple part, such as 1, 0.75, 0.5 or 0.25"
            )

    @property
    def kind(self) -> str:
        """gimmvfi_r or gimmvfi_f."""
        return WITH_RAFT if WITH_RAFT in self.mode.lower() else WITH_FLOWFORMER

    @property
    def part(self) -> Fraction:
        """The part of the size that flow is computed at, exactly."""
        return Fraction(self.ds_factor).limit_denominator(SMALLEST_PART)

    @property
    def alignment(self) -> int:
        """What sides of pictures have to be multiples of, so that they are one of 32 at the part."""
        step = ALIGNMENT / self.part  # whole steps of this; the first whole number among them
        return step.numerator


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
        "--factor",
        type=int,
        default=2,
        help=f"how many times as many pictures a second: usually 2 to 8, at most {MOST_FACTOR}",
    )
    group.add_argument(
        "--ds_factor",
        type=float,
        default=1.0,
        help="compute flow at this part of the size: 0.5 for 2K, 0.25 for 4K",
    )
    group.add_argument(
        "--scene_threshold",
        type=float,
        default=0.25,
        help="from this distance of two pictures on, 0 to 1, a new scene begins: the picture before it is "
        "repeated instead of mixed with it. The distance is sqrt(structure * colours): 1 minus the best "
        "correlation of small grey copies moved against each other, and the part of colours that changes. "
        "Lower finds more cuts; 0 turns it off (default: %(default)s)",
    )
