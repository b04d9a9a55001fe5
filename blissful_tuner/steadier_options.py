"""Options of videos that are longer than the model was trained for. Standard library only."""

from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, option

# with the places of: of which videos, the number of frequencies
RIFLEX = (
    "RIFLEx, against repetition in long videos{}: which frequency of the frames' positions is slowed down, "
    "1 to {}; 0 turns it off. Its period becomes 1.1 times the number of frames, as in the known tools "
    "(the paper counts latent frames)"
)


class SteadierOptions(Options, title="longer videos"):
    """Which frequency of the frames' positions is slowed down."""

    riflex_index: int = option(  # from 1; 0: none
        RIFLEX,
        default=0,
    )
    # what the script's family has; no options
    riflex_frequencies: int = option(default=0, facts=NO_PIXELS)
    riflex_beyond: int = option(default=0, facts=NO_PIXELS)  # frames: shorter videos are left as they are

    def __post_init__(self) -> None:
        if not 0 <= self.riflex_index <= self.riflex_frequencies:
            raise OptionError(
                f"--riflex_index {self.riflex_index}: the model has {self.riflex_frequencies} frequencies "
                "for the positions of frames. Give a number from 1 to "
                f"{self.riflex_frequencies}, or 0 for none"
            )
