"""Options of pictures that begin small: two stages, Deep Shrink and Gradual Latent. Standard library only."""

import math
from typing import NamedTuple

from modules.errors import OptionError
from modules.options import Options, option
from stable_diffusion.sampling_options import MOST_STEPS, STEPS_HINT, STRENGTH_HINT

DEEPEST = 8


class HighresOptions(Options, title="highres fix: two stages"):
    """The first stage makes a small picture, the second makes a large one from it."""

    highres_fix_scale: float | None = option(
        "make pictures in two stages: first at this share of width and height, such as 0.5",
        above=0,
        most=1,
        hint="the first stage's share of the whole, such as 0.5 where other programs say 2",
        often=True,
    )
    highres_fix_steps: int = option(
        "steps of the first stage", default=28, least=1, most=MOST_STEPS, hint=STEPS_HINT
    )
    highres_fix_strength: float | None = option(
        "share of the steps in the second stage, 0 to 1; usually --strength",
        least=0,
        most=1,
        needs="highres_fix_scale",
        hint=STRENGTH_HINT,
    )
    highres_fix_save_1st: bool = option(
        "also write the pictures of the first stage", needs="highres_fix_scale"
    )
    highres_fix_latents_upscaling: bool = option(
        "enlarge the latents instead of the picture", needs="highres_fix_scale"
    )
    highres_fix_upscaler: str | None = option(
        "enlarge by a module with create_upscaler: one of your own, or stable_diffusion.model_upscaler, "
        "which takes SwinIR and ESRGAN files",
        needs="highres_fix_scale",
        excludes="highres_fix_latents_upscaling",
    )
    highres_fix_upscaler_args: str | None = option(
        "arguments of that module: key=value, several joined by ; as in model=4x.safetensors",
        needs="highres_fix_upscaler",
    )
    highres_fix_disable_control_net: bool = option(
        "no ControlNet in the second stage", needs="highres_fix_scale"
    )


_BLOCK = "an input block of the U-Net"
_TIMESTEP = "a timestep, 0 to 999"


class DeepShrinkOptions(Options, title="Deep Shrink: large pictures without repeated motifs"):
    """Features of the U-Net are scaled down early in denoising (Kohya's Deep Shrink)."""

    ds_depth_1: int | None = option(
        "input block of the U-Net where it begins, 0 to 8", least=0, most=DEEPEST, hint=_BLOCK
    )
    ds_timesteps_1: int = option("it acts there down to this timestep", default=650, least=0, hint=_TIMESTEP)
    ds_depth_2: int | None = option(
        "input block where it acts afterwards, 0 to 8",
        least=0,
        most=DEEPEST,
        needs="ds_depth_1",
        hint=_BLOCK,
    )
    ds_timesteps_2: int = option("it acts there down to this timestep", default=650, least=0, hint=_TIMESTEP)
    ds_ratio: float = option(
        "size of the features, as a share", default=0.5, above=0, most=1, hint="such as 0.5"
    )


class GradualLatentOptions(Options, title="Gradual Latent: begin small and grow (sampler euler_a)"):
    """Denoising begins with small latents, which grow."""

    gradual_latent_timesteps: int | None = option(
        "latents grow below this timestep, such as 750", least=0, hint="a timestep, 0 to 1000"
    )
    gradual_latent_ratio: float = option("size at the beginning", default=0.5, above=0, most=1)
    gradual_latent_ratio_step: float = option("how much they grow", default=0.125, above=0)
    gradual_latent_every_n_steps: int = option(
        "they grow every so many steps",
        default=3,
        least=1,
        flags=("--gradual_latent_every_n_steps", "--gradual_latent_ratio_every_n_steps"),
    )
    gradual_latent_s_noise: float = option(
        "strength of the noise when they grow", default=1.0, least=0, hint="1 is the usual noise"
    )
    gradual_latent_unsharp_params: str | None = option(
        "sharpen when they grow: ksize,sigma,strength,target-x, such as 3,0.5,0.5,1 (target-x 1: the step's "
        "result is sharpened, 0: only what it begins with)"
    )

    def __post_init__(self) -> None:
        self.unsharp  # noqa: B018  reads it once, for its errors

    @property
    def unsharp(self) -> "Unsharp | None":
        """The unsharp mask of steps that make latents grow. Raises OptionError if it cannot be read."""
        text = self.gradual_latent_unsharp_params
        return None if text is None else read_unsharp("--gradual_latent_unsharp_params", text)


class Unsharp(NamedTuple):
    """An unsharp mask: x + (x - blur(x)) * strength."""

    ksize: int
    sigma: float
    strength: float
    target_x: bool  # of the step's result; else only of what it begins with


def read_unsharp(option: str, text: str) -> Unsharp:
    """Read `ksize,sigma,strength,target-x`, such as `3,0.5,0.5,1`. Raises OptionError."""
    try:
        ksize, sigma, strength, *rest = text.split(",")
        target = {(): True, ("1",): True, ("0",): False}[tuple(map(str.strip, rest))]
        read = Unsharp(int(ksize), float(sigma), float(strength), target)
        if read.ksize > 0 and read.ksize % 2 and 0 < read.sigma < math.inf and math.isfinite(read.strength):
            return read
    except (ValueError, KeyError):
        pass
    raise OptionError(
        f"{option} {text}: give an odd size of the blur, its sigma, the strength, and 1 or 0 (what is "
        "sharpened: the result of a step or what it begins with), such as 3,0.5,0.5,1"
    )
