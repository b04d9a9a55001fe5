"""Options of pictures made in two stages. Standard library only."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_most
from stable_diffusion.sampling_options import check_steps, check_strength


@dataclass(frozen=True)
class HighresOptions:
    """The first stage makes a small picture, the second makes a large one from it."""

    highres_fix_scale: float | None  # of the first stage's sides; None: there is one stage
    highres_fix_steps: int  # of the first stage
    highres_fix_strength: float | None  # None: that of image to image
    highres_fix_save_1st: bool
    highres_fix_latents_upscaling: bool
    highres_fix_upscaler: str | None  # a module
    highres_fix_upscaler_args: str | None  # key=value, several joined by ;
    highres_fix_disable_control_net: bool  # in the second stage

    def __post_init__(self) -> None:
        if self.highres_fix_scale is None:
            for name in (
                *("save_1st", "latents_upscaling", "upscaler", "upscaler_args", "disable_control_net"),
                "strength",
            ):
                if getattr(self, f"highres_fix_{name}") not in (None, False):
                    raise OptionError(
                        f"--highres_fix_{name} needs --highres_fix_scale, the size of the first stage"
                    )
            return
        if self.highres_fix_scale <= 0:
            raise OptionError(
                f"--highres_fix_scale {self.highres_fix_scale}: give the size of the first stage as a "
                "share of the whole, such as 0.5"
            )
        check_at_most(
            "--highres_fix_scale",
            self.highres_fix_scale,
            1,
            "the first stage's share of the whole, such as 0.5 where other programs say 2",
        )
        check_steps("--highres_fix_steps", self.highres_fix_steps)
        check_strength("--highres_fix_strength", self.highres_fix_strength)
        if self.highres_fix_upscaler is not None and self.highres_fix_latents_upscaling:
            raise OptionError("--highres_fix_upscaler and --highres_fix_latents_upscaling: give one of them")
        if self.highres_fix_upscaler_args is not None and self.highres_fix_upscaler is None:
            raise OptionError("--highres_fix_upscaler_args needs --highres_fix_upscaler")


def add_highres_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `HighresOptions`."""
    group = parser.add_argument_group("highres fix: two stages")
    group.add_argument(
        "--highres_fix_scale",
        type=float,
        help="make pictures in two stages: first at this share of width and height, such as 0.5",
    )
    group.add_argument("--highres_fix_steps", type=int, default=28, help="steps of the first stage")
    group.add_argument(
        "--highres_fix_strength",
        type=float,
        help="share of the steps in the second stage, 0 to 1; usually --strength",
    )
    group.add_argument(
        "--highres_fix_save_1st", action="store_true", help="also write the pictures of the first stage"
    )
    group.add_argument(
        "--highres_fix_latents_upscaling",
        action="store_true",
        help="enlarge the latents instead of the picture",
    )
    group.add_argument(
        "--highres_fix_upscaler",
        help="enlarge by a module with create_upscaler: one of your own, or stable_diffusion.model_upscaler, "
        "which takes SwinIR and ESRGAN files",
    )
    group.add_argument(
        "--highres_fix_upscaler_args",
        help="arguments of that module: key=value, several joined by ; as in model=4x.safetensors",
    )
    group.add_argument(
        "--highres_fix_disable_control_net", action="store_true", help="no ControlNet in the second stage"
    )
