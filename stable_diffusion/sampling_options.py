"""Options of sampling: sampler, guidance, noise, sizes. Standard library only."""

from modules.errors import OptionError
from modules.options import Options, option

SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a") + (
    *("dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)
TRAINED_STEPS = 1000  # timesteps that all models know
MOST_STEPS = TRAINED_STEPS - 1  # as the lowest timestep is 1, one more would begin beyond the last one
PNDM_STEPS = 4  # Runge-Kutta steps that pndm begins with, from noise
LARGEST_SIDE = 16384  # pixels; no memory holds more
USUAL_STRENGTH = 0.8  # of image to image
STEPS_HINT = f"the models know {TRAINED_STEPS} timesteps"
STRENGTH_HINT = "0 keeps the picture, 1 makes it anew"
_SIZE_HINT = "a multiple of 8 pixels"


class StartNoiseOptions(Options):
    """How the start noise of some pictures is changed."""

    pyramid_noise_prob: float | None = option(
        "probability that a picture begins with pyramid noise, which adds coarser noise; usually 0",
        least=0,
        most=1,
        needs="pyramid_noise_discount_range",
    )
    pyramid_noise_discount_range: tuple[float, ...] | None = option(
        "discount of each coarser level of pyramid noise, drawn for each picture between these two numbers",
        nargs=2,
        needs="pyramid_noise_prob",
    )
    noise_offset_prob: float | None = option(
        "probability that a picture begins with noise with an offset, which makes pictures darker or "
        "brighter as a whole; usually 0",
        least=0,
        most=1,
        needs="noise_offset_range",
    )
    noise_offset_range: tuple[float, ...] | None = option(
        "amount of the noise offset, drawn for each picture between these two numbers",
        nargs=2,
        needs="noise_offset_prob",
    )

    def __post_init__(self) -> None:
        for flag, limits in {
            "--pyramid_noise_discount_range": self.pyramid_noise_discount_range,
            "--noise_offset_range": self.noise_offset_range,
        }.items():
            if limits is not None and limits[0] > limits[1]:
                raise OptionError(f"{flag} {limits[0]} {limits[1]}: give the smaller number first")


class SizeOptions(Options, title="sizes that Stable Diffusion XL is told"):
    """SDXL's conditions of sizes and crops; None: the picture's own size, and 0."""

    original_height: int | None = option("original height; usually the height", least=1)
    original_height_negative: int | None = option(
        "original height for the negative prompt; usually that of the prompt", least=1
    )
    original_width: int | None = option("original width; usually the width", least=1)
    original_width_negative: int | None = option(
        "original width for the negative prompt; usually that of the prompt", least=1
    )
    crop_top: int | None = option("rows cut off at the top; usually 0")
    crop_left: int | None = option("columns cut off at the left; usually 0")


class SamplingOptions(Options, title="sampling"):
    """Sampler, guidance, noise and sizes, where a prompt's line says nothing else."""

    width: int | None = option(
        "width, a multiple of 8; usually 512, for XL 1024",
        name="W",
        least=8,
        most=LARGEST_SIDE,
        hint=_SIZE_HINT,
        often=True,
    )
    height: int | None = option(
        "height, a multiple of 8; usually 512, for XL 1024",
        name="H",
        least=8,
        most=LARGEST_SIDE,
        hint=_SIZE_HINT,
        often=True,
    )
    steps: int = option("number of steps", default=50, least=1, most=MOST_STEPS, hint=STEPS_HINT, often=True)
    sampler: str = option(
        "how steps are made; k_NAME is the same as NAME", default="ddim", choices=SAMPLERS, often=True
    )
    scale: float = option("guidance: how closely the prompt is followed", default=7.5, often=True)
    negative_scale: float | None = option(
        "how strongly the negative prompt is avoided, apart from --scale; takes a third pass"
    )
    strength: float | None = option(
        f"image to image: share of the steps that are made, 0 to 1; usually {USUAL_STRENGTH}",
        least=0,
        most=1,
        hint=STRENGTH_HINT,
        often=True,
    )
    zero_terminal_snr: bool = option("the last timestep is noise alone, for models trained so")
    force_scheduler_zero_steps_offset: bool = option(
        "timesteps begin at 0 instead of 1, as old versions of sd-scripts had it"
    )
    noise: StartNoiseOptions
    sizes: SizeOptions

    def __post_init__(self) -> None:
        for name, size in (("W", self.width), ("H", self.height)):
            if size is not None and size % 8:
                nearest = max(8, round(size / 8) * 8)
                raise OptionError(
                    f"--{name} {size}: sizes are multiples of 8 pixels. Give {nearest}, for example"
                )


def check_sampler_steps(option: str, sampler: str, steps: int) -> None:
    """Raise OptionError if a sampler cannot make so few steps from noise."""
    if sampler == "pndm" and steps < PNDM_STEPS:
        raise OptionError(
            f"{option} {steps}: --sampler pndm begins with {PNDM_STEPS} steps of another kind. Give at least "
            f"{PNDM_STEPS}, or another sampler"
        )
