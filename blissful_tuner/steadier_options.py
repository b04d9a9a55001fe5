"""Options of videos that are longer than the model was trained for. Standard library only."""

import argparse
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.options import NO_PIXELS


@dataclass(frozen=True)
class SteadierOptions:
    """Which frequency of the frames' positions is slowed down."""

    riflex_index: int  # from 1; 0: none
    # what the script's family has; no options
    riflex_frequencies: int = field(metadata=NO_PIXELS)
    riflex_beyond: int = field(metadata=NO_PIXELS)  # frames: videos of up to so many are left as they are

    def __post_init__(self) -> None:
        if not 0 <= self.riflex_index <= self.riflex_frequencies:
            raise OptionError(
                f"--riflex_index {self.riflex_index}: the model has {self.riflex_frequencies} frequencies "
                "for the positions of frames. Give a number from 1 to "
                f"{self.riflex_frequencies}, or 0 for none"
            )


def add_steadier_arguments(parser: argparse.ArgumentParser, frequencies: int | None, beyond: int) -> None:
    """Declare --riflex_index. frequencies, beyond: see `SteadierOptions`; None: there is no such option."""
    parser.set_defaults(riflex_frequencies=frequencies or 0, riflex_beyond=beyond)
    if frequencies is None:
        parser.set_defaults(riflex_index=0)
        return
    group = parser.add_argument_group("longer videos")
    only = f" of more than {beyond} frames" if beyond else ""
    group.add_argument(
        "--riflex_index",
        type=int,
        default=0,
        help=f"RIFLEx, against repetition in long videos{only}: which frequency of the frames' positions is "
        f"slowed down, 1 to {frequencies}; 0 turns it off. Its period becomes 1.1 times the number of "
        "frames, as in the known tools (the paper counts latent frames)",
    )
