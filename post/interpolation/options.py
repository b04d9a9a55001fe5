"""Options of interpolation. Standard library only."""

from fractions import Fraction

from modules.errors import OptionError
from modules.options import Options, option
from post.run_options import ToolNetworkOptions

WITH_RAFT, WITH_FLOWFORMER = "gimmvfi_r", "gimmvfi_f"
MOST_FACTOR = 16
SMALLEST_PART = 8  # the denominators of --ds_factor go up to this
ROUNDED = 0.004  # 0.33 and 0.67 mean a third and two
ALIGNMENT = 32  # the networks need sides that are multiples of this


class InterpolationOptions(Options, title="interpolation"):
    """How many pictures are made between two, and how."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "folder with the GIMM-VFI files and those of its optical flow"}}
    )
    mode: str = option("gimmvfi_r (RAFT) or gimmvfi_f (FlowFormer: better, slower)", default=WITH_FLOWFORMER)
    factor: int = option(
        f"how many times as many pictures a second: usually 2 to 8, at most {MOST_FACTOR}",
        default=2,
        least=1,
        most=MOST_FACTOR,
        hint="1 leaves the pictures as they are",
    )
    ds_factor: float = option(
        "compute flow at this part of the size: 0.5 for 2K, 0.25 for 4K", default=1.0, above=0, most=1
    )
    scene_threshold: float = option(
        "from this distance of two pictures on, 0 to 1, a new scene begins: the picture before it is "
        "repeated instead of mixed with it. The distance is sqrt(structure * colours): 1 minus the best "
        "correlation of small grey copies moved against each other, and the part of colours that changes. "
        "Lower finds more cuts; 0 turns it off",
        default=0.25,
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        if (WITH_RAFT in self.mode.lower()) == (WITH_FLOWFORMER in self.mode.lower()):
            raise OptionError(f"--mode {self.mode}: use {WITH_RAFT} or {WITH_FLOWFORMER}")
        if abs(float(self.part) - self.ds_factor) > ROUNDED:
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
        """Return the divisor of pictures' sides, so that sides of the scaled part are multiples of 32."""
        step = ALIGNMENT / self.part  # whole steps of this; the first whole number among them
        return step.numerator
