"""Options of sampling: sampler, guidance, noise, sizes. Standard library only."""

import argparse
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most

SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a") + (
    *("dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)
TRAINED_STEPS = 1000  # timesteps that all models know
PNDM_STEPS = 4  # Runge-Kutta steps that pndm begins with, from noise
LARGEST_SIDE = 16384  # pixels
USUAL_STRENGTH = 0.8  # of image to image


@dataclass(frozen=True)
class StartNoiseOptions:
    """How the start noise of some pictures is changed."""

    pyramid_noise_prob: float | None
    pyramid_noise_discount_range: tuple[float, ...] | None
    noise_offset_prob: float | None
    noise_offset_range: tuple[float, ...] | None

    def __post_init__(self) -> None:
        for name in ("pyramid_noise", "noise_offset"):
            share = getattr(self, f"{name}_prob")
            check_at_least(f"--{name}_prob", share, 0, "a probability")
            check_at_most(f"--{name}_prob", share, 1, "a probability")
        ranges = {
            "--pyramid_noise_discount_range": self.pyramid_noise_discount_range,
            "--noise_offset_range": self.noise_offset_range,
        }
        shares = (self.pyramid_noise_prob, self.noise_offset_prob)
        for share, (option, limits) in zip(shares, ranges.items(), strict=True):
            if limits is not None and limits[0] > limits[1]:
                raise OptionError(f"{option} {limits[0]} {limits[1]}: give the smaller number first")
            if (share is None) != (limits is None):
                prob = option.replace("discount_", "").replace("range", "prob")
                raise OptionError(f"{prob} and {option} belong together: give both")


@dataclass(frozen=True)
class SizeOptions:
    """What SDXL is told about sizes and crops; None: the picture's own size, and 0."""

    original_width: int | None
    original_height: int | None
    original_width_negative: int | None
    original_height_negative: int | None
    crop_top: int | None
    crop_left: int | None

    def __post_init__(self) -> None:
        for name in ("original_width", "original_height"):
            for option in (name, f"{name}_negative"):
                check_at_least(f"--{option}", getattr(self, option), 1, "a size in pixels")


@dataclass(frozen=True)
class SamplingOptions:
    """Sampler, guidance, noise and sizes, where a prompt's line says nothing else."""

    sampler: str
    steps: int
    scale: float
    negative_scale: float | None
    width: int | None = field(metadata={"option": "W"})  # None: the kind's usual size
    height: int | None = field(metadata={"option": "H"})
    strength: float | None  # None: USUAL_STRENGTH
    zero_terminal_snr: bool
    force_scheduler_zero_steps_offset: bool
    noise: StartNoiseOptions
    sizes: SizeOptions

    def __post_init__(self) -> None:
        check_steps("--steps", self.steps)
        check_size("--W", self.width)
        check_size("--H", self.height)
        check_strength("--strength", self.strength)


def check_sampler_steps(option: str, sampler: str, steps: int) -> None:
    """Raise OptionError if a sampler cannot make so few steps from noise."""
    if sampler == "pndm" and steps < PNDM_STEPS:
        raise OptionError(
            f"{option} {steps}: --sampler pndm begins with {PNDM_STEPS} steps of another kind. Give at least "
            f"{PNDM_STEPS}, or another sampler"
        )


def check_steps(option: str, steps: int) -> None:
    """Raise OptionError if a number of steps is below 1, or as many as the timesteps that models know: as the
    lowest is 1, the highest would be beyond the last one.
    """
    check_at_least(option, steps, 1, "one step is the least")
    check_at_most(option, steps, TRAINED_STEPS - 1, f"the models know {TRAINED_STEPS} timesteps")


def check_size(option: str, size: int | None) -> None:
    """Raise OptionError if a width or height is no positive multiple of 8, or beyond all memories."""
    check_at_most(option, size, LARGEST_SIDE, "no memory holds more; usually 512 to 2048")
    if size is not None and (size < 8 or size % 8):
        nearest = max(8, round(size / 8) * 8)
        raise OptionError(f"{option} {size}: sizes are multiples of 8 pixels. Give {nearest}, for example")


def check_strength(option: str, strength: float | None) -> None:
    """Raise OptionError if a share of the steps is not in 0..1."""
    check_at_least(option, strength, 0, "0 keeps the picture, 1 makes it anew")
    check_at_most(option, strength, 1, "0 keeps the picture, 1 makes it anew")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `SamplingOptions`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--W", type=int, help="width, a multiple of 8; usually 512, for XL 1024")
    group.add_argument("--H", type=int, help="height, a multiple of 8; usually 512, for XL 1024")
    group.add_argument("--steps", type=int, default=50, help="number of steps")
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="ddim", help="how steps are made; k_NAME is the same as NAME"
    )
    group.add_argument(
        "--scale", type=float, default=7.5, help="guidance: how closely the prompt is followed"
    )
    group.add_argument(
        "--negative_scale",
        type=float,
        help="how strongly the negative prompt is avoided, apart from --scale; takes a third pass",
    )
    group.add_argument(
        "--strength",
        type=float,
        help=f"image to image: share of the steps that are made, 0 to 1; usually {USUAL_STRENGTH}",
    )
    group.add_argument(
        "--zero_terminal_snr",
        action="store_true",
        help="the last timestep is noise alone, for models trained so",
    )
    group.add_argument(
        "--force_scheduler_zero_steps_offset",
        action="store_true",
        help="timesteps begin at 0 instead of 1, as old versions of sd-scripts had it",
    )
    _add_noise_arguments(group)
    _add_size_arguments(parser.add_argument_group("sizes that Stable Diffusion XL is told"))


def _add_noise_arguments(group: argparse._ArgumentGroup) -> None:
    for name, what, limits, meaning in (
        (
            "pyramid_noise",
            "pyramid noise, which adds coarser noise",
            "--pyramid_noise_discount_range",
            "discount of each coarser level of pyramid noise",
        ),
        (
            "noise_offset",
            "noise with an offset, which makes pictures darker or brighter as a whole",
            "--noise_offset_range",
            "amount of the noise offset",
        ),
    ):
        group.add_argument(
            f"--{name}_prob", type=float, help=f"probability that a picture begins with {what}; usually 0"
        )
        group.add_argument(
            limits, type=float, nargs=2, help=f"{meaning}, drawn for each picture between these two numbers"
        )


def _add_size_arguments(group: argparse._ArgumentGroup) -> None:
    for side in ("height", "width"):
        group.add_argument(f"--original_{side}", type=int, help=f"original {side}; usually the {side}")
        group.add_argument(
            f"--original_{side}_negative",
            type=int,
            help=f"original {side} for the negative prompt; usually that of the prompt",
        )
    group.add_argument("--crop_top", type=int, help="rows cut off at the top; usually 0")
    group.add_argument("--crop_left", type=int, help="columns cut off at the left; usually 0")
