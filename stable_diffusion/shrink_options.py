"""Options of Deep Shrink and Gradual Latent, which begin small. Standard library only."""

import argparse
import math
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most

DEEPEST = 8


@dataclass(frozen=True)
class DeepShrinkOptions:
    """Features of the U-Net are scaled down early in denoising (Kohya's Deep Shrink)."""

    ds_depth_1: int | None  # None: no Deep Shrink
    ds_timesteps_1: int
    ds_depth_2: int | None
    ds_timesteps_2: int
    ds_ratio: float

    def __post_init__(self) -> None:
        for name in ("ds_depth_1", "ds_depth_2"):
            check_at_least(f"--{name}", getattr(self, name), 0, "an input block of the U-Net, 0 to 8")
            check_at_most(f"--{name}", getattr(self, name), DEEPEST, "an input block of the U-Net, 0 to 8")
        for name in ("ds_timesteps_1", "ds_timesteps_2"):
            check_at_least(f"--{name}", getattr(self, name), 0, "a timestep, 0 to 999")
        if not self.ds_ratio > 0:
            raise OptionError(f"--ds_ratio {self.ds_ratio}: give a share above 0, such as 0.5")
        check_at_most("--ds_ratio", self.ds_ratio, 1, "a share of the features' size, such as 0.5")


@dataclass(frozen=True)
class GradualLatentOptions:
    """Denoising begins with small latents, which grow."""

    gradual_latent_timesteps: int | None  # they grow below it; None: no Gradual Latent
    gradual_latent_ratio: float
    gradual_latent_ratio_step: float
    gradual_latent_every_n_steps: int
    gradual_latent_s_noise: float
    gradual_latent_unsharp_params: str | None  # ksize,sigma,strength,target-x

    def __post_init__(self) -> None:
        check_at_least(
            "--gradual_latent_timesteps", self.gradual_latent_timesteps, 0, "a timestep, 0 to 1000"
        )
        for name in ("ratio", "ratio_step"):
            share = getattr(self, f"gradual_latent_{name}")
            if not share > 0:
                raise OptionError(f"--gradual_latent_{name} {share}: give a share above 0, such as 0.5")
        check_at_most("--gradual_latent_ratio", self.gradual_latent_ratio, 1, "a share of the size")
        check_at_least("--gradual_latent_every_n_steps", self.gradual_latent_every_n_steps, 1, "steps")
        check_at_least("--gradual_latent_s_noise", self.gradual_latent_s_noise, 0, "1 is the usual noise")
        if self.gradual_latent_unsharp_params is not None:
            read_unsharp("--gradual_latent_unsharp_params", self.gradual_latent_unsharp_params)


def read_unsharp(option: str, text: str) -> tuple[int, float, float, bool]:
    """Read `ksize,sigma,strength,target-x`, such as `3,0.5,0.5,1`. Raises OptionError."""
    try:
        ksize, sigma, strength, *rest = text.split(",")
        target = {(): True, ("1",): True, ("0",): False}[tuple(map(str.strip, rest))]
        values = int(ksize), float(sigma), float(strength), target
    except (ValueError, KeyError):
        values = (0, 0.0, 0.0, False)
    if values[0] < 1 or values[0] % 2 == 0 or not 0 < values[1] < math.inf or not math.isfinite(values[2]):
        raise OptionError(
            f"{option} {text}: give an odd size of the blur, its sigma, the strength, and 1 or 0 (what is "
            "sharpened: the result of a step or what it begins with), such as 3,0.5,0.5,1"
        )
    return values


def add_shrink_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `DeepShrinkOptions` and `GradualLatentOptions`."""
    group = parser.add_argument_group("Deep Shrink: large pictures without repeated motifs")
    group.add_argument("--ds_depth_1", type=int, help="input block of the U-Net where it begins, 0 to 8")
    group.add_argument("--ds_timesteps_1", type=int, default=650, help="it acts there down to this timestep")
    group.add_argument("--ds_depth_2", type=int, help="input block where it acts afterwards, 0 to 8")
    group.add_argument("--ds_timesteps_2", type=int, default=650, help="it acts there down to this timestep")
    group.add_argument("--ds_ratio", type=float, default=0.5, help="size of the features, as a share")
    group = parser.add_argument_group("Gradual Latent: begin small and grow (sampler euler_a)")
    group.add_argument(
        "--gradual_latent_timesteps", type=int, help="latents grow below this timestep, such as 750"
    )
    group.add_argument("--gradual_latent_ratio", type=float, default=0.5, help="size at the beginning")
    group.add_argument("--gradual_latent_ratio_step", type=float, default=0.125, help="how much they grow")
    group.add_argument(
        *("--gradual_latent_every_n_steps", "--gradual_latent_ratio_every_n_steps"),
        dest="gradual_latent_every_n_steps",
        type=int,
        default=3,
        help="they grow every so many steps",
    )
    group.add_argument(
        "--gradual_latent_s_noise", type=float, default=1.0, help="strength of the noise when they grow"
    )
    group.add_argument(
        "--gradual_latent_unsharp_params",
        help="sharpen when they grow: ksize,sigma,strength,target-x, such as 3,0.5,0.5,1 (target-x 1: the "
        "step's result is sharpened, 0: only what it begins with)",
    )
