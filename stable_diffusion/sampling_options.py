"""Options of sampling: sampler, guidance, noise, sizes, and images that begin small."""

import math
from typing import NamedTuple

from modules.errors import OptionError
from modules.options import Options, option

SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a",
    "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip
TRAINED_STEPS = 1000  # number of timesteps that all models were trained with
MAX_STEPS = TRAINED_STEPS - 1  # timesteps start at 1, so one more step would exceed the last timestep
PNDM_STEPS = 4  # Runge-Kutta steps that pndm begins with, from noise
LARGEST_SIDE = 16384  # pixels; larger images do not fit in any memory
DEFAULT_STRENGTH = 0.8  # default strength of image to image
STEPS_HINT = f"the models know {TRAINED_STEPS} timesteps"
STRENGTH_HINT = "0 keeps the image, 1 replaces it"
_SIZE_HINT = "a multiple of 8 pixels"


class StartNoiseOptions(Options):
    """Options that change the initial noise."""

    pyramid_noise_prob: float | None = option(
        "probability that an image begins with pyramid noise, which adds coarser noise; usually 0",
        minimum=0,
        maximum=1,
        needs="pyramid_noise_discount_range",
    )
    pyramid_noise_discount_range: tuple[float, ...] | None = option(
        "discount of each coarser level of pyramid noise, drawn for each image between these two numbers",
        nargs=2,
        needs="pyramid_noise_prob",
    )
    noise_offset_prob: float | None = option(
        "probability that an image begins with noise with an offset, which makes images darker or "
        "brighter as a whole; usually 0",
        minimum=0,
        maximum=1,
        needs="noise_offset_range",
    )
    noise_offset_range: tuple[float, ...] | None = option(
        "amount of the noise offset, drawn for each image between these two numbers",
        nargs=2,
        needs="noise_offset_prob",
    )

    def __post_init__(self) -> None:
        for flag, limits in {
            "--pyramid_noise_discount_range": self.pyramid_noise_discount_range,
            "--noise_offset_range": self.noise_offset_range,
        }.items():
            if limits is not None and limits[0] > limits[1]:
                raise OptionError(f"{flag} {limits[0]} {limits[1]}: pass the smaller number first")


class SizeOptions(Options, title="sizes that are passed to Stable Diffusion XL"):
    """Size and crop conditioning of SDXL; None means the image's own size and no crop."""

    original_height: int | None = option("original height; usually the height", minimum=1)
    original_height_negative: int | None = option(
        "original height for the negative prompt; usually that of the prompt", minimum=1
    )
    original_width: int | None = option("original width; usually the width", minimum=1)
    original_width_negative: int | None = option(
        "original width for the negative prompt; usually that of the prompt", minimum=1
    )
    crop_top: int | None = option("rows cut off at the top; usually 0")
    crop_left: int | None = option("columns cut off at the left; usually 0")


class SamplingOptions(Options, title="sampling"):
    """Sampler, guidance, noise and size options; a prompt line can override them."""

    width: int | None = option(
        "width, a multiple of 8; usually 512, for XL 1024",
        name="W",
        minimum=8,
        maximum=LARGEST_SIDE,
        hint=_SIZE_HINT,
        often=True,
    )
    height: int | None = option(
        "height, a multiple of 8; usually 512, for XL 1024",
        name="H",
        minimum=8,
        maximum=LARGEST_SIDE,
        hint=_SIZE_HINT,
        often=True,
    )
    steps: int = option(
        "number of steps", default=50, minimum=1, maximum=MAX_STEPS, hint=STEPS_HINT, often=True
    )
    sampler: str = option(
        "how steps are made; k_NAME is the same as NAME", default="ddim", choices=SAMPLERS, often=True
    )
    scale: float = option("guidance: how closely the prompt is followed", default=7.5, often=True)
    negative_scale: float | None = option(
        "how strongly the negative prompt is avoided, apart from --scale; takes a third pass"
    )
    strength: float | None = option(
        f"image to image: fraction of the steps that are run, 0 to 1; usually {DEFAULT_STRENGTH}",
        minimum=0,
        maximum=1,
        hint=STRENGTH_HINT,
        often=True,
    )
    zero_terminal_snr: bool = option("the last timestep is pure noise, for models trained that way")
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
                    f"--{name} {size}: sizes are multiples of 8 pixels. Pass {nearest}, for example"
                )


def check_sampler_steps(option: str, sampler: str, steps: int) -> None:
    """Raise OptionError if a sampler does not support this number of steps."""
    if steps > MAX_STEPS:
        raise OptionError(f"{option} {steps}: {STEPS_HINT}. Pass {MAX_STEPS} at most; 20 to 50 are usual")
    if sampler == "pndm" and steps < PNDM_STEPS:
        raise OptionError(
            f"{option} {steps}: the sampler pndm begins with {PNDM_STEPS} steps of a different kind. Use "
            f"at least {PNDM_STEPS}, or another sampler"
        )


# Images that begin small: two stages, Deep Shrink and Gradual Latent.
DEEPEST = 8


class HighresOptions(Options, title="highres fix: two stages"):
    """Highres fix: a first stage generates a small image, from which a second stage makes a large one."""

    highres_fix_scale: float | None = option(
        "make images in two stages: first at this fraction of width and height, such as 0.5",
        above=0,
        maximum=1,
        hint="the first stage's share of the whole, such as 0.5 where other programs say 2",
        often=True,
    )
    highres_fix_steps: int = option(
        "steps of the first stage",
        default=28,
        minimum=1,
        maximum=MAX_STEPS,
        ignored_without="highres_fix_scale",
        hint=STEPS_HINT,
    )
    highres_fix_strength: float | None = option(
        "fraction of the steps in the second stage, 0 to 1; usually --strength",
        minimum=0,
        maximum=1,
        needs="highres_fix_scale",
        hint=STRENGTH_HINT,
    )
    highres_fix_save_1st: bool = option("also write the images of the first stage", needs="highres_fix_scale")
    highres_fix_latents_upscaling: bool = option(
        "enlarge the latents instead of the image", needs="highres_fix_scale"
    )
    highres_fix_upscaler: str | None = option(
        "enlarge by a module with create_upscaler: one of your own, or stable_diffusion.model_upscaler, "
        "which takes SwinIR and ESRGAN files, or tools.latent_upscaler, which takes sd-scripts' own",
        needs="highres_fix_scale",
        excludes="highres_fix_latents_upscaling",
    )
    highres_fix_upscaler_args: str | None = option(
        "arguments of that module: key=value, several joined by ; as in model=4x.safetensors, for "
        "tools.latent_upscaler weights=FILE",
        needs="highres_fix_upscaler",
    )
    highres_fix_disable_control_net: bool = option(
        "no ControlNet in the second stage", needs="highres_fix_scale"
    )


_BLOCK = "an input block of the U-Net"
_TIMESTEP = "a timestep, 0 to 999"


class DeepShrinkOptions(Options, title="Deep Shrink: large images without repeated motifs"):
    """Kohya's Deep Shrink, which scales U-Net features down during the first steps."""

    ds_depth_1: int | None = option(
        "input block of the U-Net where it begins, 0 to 8", minimum=0, maximum=DEEPEST, hint=_BLOCK
    )
    ds_timesteps_1: int = option(
        "it acts there down to this timestep", default=650, minimum=0, hint=_TIMESTEP
    )
    ds_depth_2: int | None = option(
        "input block where it acts afterwards, 0 to 8",
        minimum=0,
        maximum=DEEPEST,
        needs="ds_depth_1",
        hint=_BLOCK,
    )
    ds_timesteps_2: int = option(
        "it acts there down to this timestep", default=650, minimum=0, hint=_TIMESTEP
    )
    ds_ratio: float = option(
        "size of the features, as a share", default=0.5, above=0, maximum=1, hint="such as 0.5"
    )


class GradualLatentOptions(Options, title="Gradual Latent: begin small and grow (sampler euler_a)"):
    """Gradual Latent: denoising starts with small latents, which are enlarged between steps."""

    gradual_latent_timesteps: int | None = option(
        "latents grow below this timestep, such as 750", minimum=0, hint="a timestep, 0 to 1000"
    )
    gradual_latent_ratio: float = option("size at the beginning", default=0.5, above=0, maximum=1)
    gradual_latent_ratio_step: float = option("how much they grow", default=0.125, above=0)
    gradual_latent_every_n_steps: int = option(
        "number of steps after which they grow again",
        default=3,
        minimum=1,
        flags=("--gradual_latent_every_n_steps", "--gradual_latent_ratio_every_n_steps"),
    )
    gradual_latent_s_noise: float = option(
        "strength of the noise when they grow", default=1.0, minimum=0, hint="1 is the usual noise"
    )
    gradual_latent_unsharp_params: str | None = option(
        "sharpen when they grow: ksize,sigma,strength,target-x, such as 3,0.5,0.5,1 (target-x 1: the step's "
        "result is sharpened, 0: only what it begins with)"
    )

    def __post_init__(self) -> None:
        self.unsharp  # noqa: B018  read once, to raise its errors

    @property
    def unsharp(self) -> "Unsharp | None":
        """Unsharp mask for the steps that enlarge the latents; None if the option is not set.

        Raises:
            OptionError: If its values cannot be parsed.
        """
        text = self.gradual_latent_unsharp_params
        return None if text is None else read_unsharp("--gradual_latent_unsharp_params", text)


class Unsharp(NamedTuple):
    """Unsharp mask x + (x - blur(x)) * strength."""

    ksize: int
    sigma: float
    strength: float
    sharpens_result: bool  # of the step; else the sample that the step begins with is sharpened


def read_unsharp(option: str, text: str) -> Unsharp:
    """Read `ksize,sigma,strength,target-x`, such as `3,0.5,0.5,1`; the last part may be omitted.

    Raises OptionError if the text cannot be read.
    """
    invalid = OptionError(
        f"{option} {text}: pass an odd size of the blur, its sigma, the strength, and 1 (to sharpen the "
        "result of a step) or 0 (to sharpen its input), such as 3,0.5,0.5,1"
    )
    values = [value.strip() for value in text.split(",")]
    if len(values) == 3:
        values.append("1")
    if len(values) != 4 or values[3] not in ("0", "1"):
        raise invalid
    ksize, sigma, strength, target = values
    try:
        unsharp = Unsharp(int(ksize), float(sigma), float(strength), sharpens_result=target == "1")
    except ValueError:
        raise invalid from None
    is_odd = unsharp.ksize > 0 and unsharp.ksize % 2
    if not is_odd or not 0 < unsharp.sigma < math.inf or not math.isfinite(unsharp.strength):
        raise invalid
    return unsharp
