"""Options of each video: what to make. Standard library only."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blissful_tuner.video_to_video_options import SourceOptions
from generation.prompt_lines import MOST_FPS
from generation.script_options import ScriptDefaults
from modules.errors import OptionError
from modules.options import SETTING
from modules.parser import add_unsupported

SOLVERS = {  # --sample_solver -> as `modules.flow.solvers` names it
    "unipc": "unipc",
    "dpm++": "dpm++",
    "vanilla": "euler",
    "dpm++sde": "dpm++sde",
    "lcm": "lcm",
}
NO_VIDEOS = "this script makes pictures, and a picture has one frame. Leave it out"
MEDIA = {
    "image_path": "first image, for image-to-video",
    "end_image_path": "last image",
    "control_path": "control video or folder of images, for Fun-Control",
}


@dataclass(frozen=True)
class RequestOptions:
    """Options of each video on the command line; a prompt line can override them.

    None means the task's default.
    """

    prompt: str | None
    nag_prompt: str | None  # declared beside the other options of this guidance
    prompt_2: str | None  # for the second text encoder
    negative_prompt: str | None
    video_size: tuple[int, ...]  # height, width
    video_length: int | None
    fps: float
    infer_steps: int | None
    seed: str | None  # a number or any text
    guidance_scale: float | None
    guidance_scale_high_noise: float | None  # of the expert for much noise
    cfg_schedule: str | None
    flow_shift: float | None
    sample_solver: str = field(metadata=SETTING)  # a name of SOLVERS
    image_path: Path | None
    end_image_path: Path | None
    control_path: Path | None
    source: SourceOptions
    embedded_guidance: float | None = field(metadata={"option": "embedded_cfg_scale"})
    # options of the family: their names in Request.extra -> their values
    extras: Mapping[str, tuple[str, Any]]

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise OptionError(f"--fps {self.fps:g}: give a number above 0")
        if self.fps > MOST_FPS:
            raise OptionError(f"--fps {self.fps:g}: give at most {MOST_FPS}")


def add_request_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    """Declare the options of `RequestOptions` that the script has."""
    group = parser.add_argument_group("what to make")
    what = "picture" if defaults.pictures else "video"
    group.add_argument("--prompt", type=str, default=None, help=f"what the {what} should show")
    group.add_argument(
        "--negative_prompt",
        type=str,
        default=None,
        help="what to avoid; default: the text of the model's release, if any",
    )
    if defaults.has_second_prompt:
        group.add_argument(
            "--prompt_2",
            type=str,
            default=None,
            help="prompt for the second text encoder, CLIP; default: --prompt",
        )
    else:
        parser.set_defaults(prompt_2=None)
    group.add_argument(
        *(("--image_size", "--video_size") if defaults.pictures else ("--video_size",)),
        dest="video_size",
        type=int,
        nargs=2,
        default=list(defaults.size),
        metavar=("HEIGHT", "WIDTH"),
        help="size in pixels; default {} {}".format(*defaults.size),
    )
    length, steps, shift = defaults.video_length, defaults.infer_steps, defaults.flow_shift
    if defaults.pictures:
        add_video_only(group, "--video_length", type=int, default=1)
        add_video_only(group, "--fps", type=int, default=defaults.fps)
    elif defaults.has_length:
        group.add_argument(
            "--video_length", type=int, default=length, help=f"number of frames, 4n + 1; {_else(length)}"
        )
    else:
        parser.set_defaults(video_length=None)
    if not defaults.pictures:
        group.add_argument(
            "--fps", type=int, default=defaults.fps, help="frames per second of the video file"
        )
    group.add_argument(
        "--infer_steps", type=int, default=steps, help=f"number of denoising steps; {_else(steps)}"
    )
    group.add_argument(
        "--seed", type=str, default=None, help="a number or any text; default: a random seed for each video"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        default=defaults.guidance_scale,
        help=f"weight of the prompt; 1 turns guidance off; {_else(defaults.guidance_scale)}",
    )
    if defaults.has_experts:
        group.add_argument(
            "--guidance_scale_high_noise",
            type=float,
            default=None,
            help="the same for --dit_high_noise; default: the task's",
        )
    else:
        parser.set_defaults(guidance_scale_high_noise=None)
    embedded = defaults.embedded_guidance
    if embedded is None:
        parser.set_defaults(embedded_cfg_scale=None)
    else:
        group.add_argument(
            "--embedded_cfg_scale",
            type=float,
            default=embedded,
            help="guidance scale that the distilled model takes as an input; needs no second pass",
        )
    group.add_argument(
        "--flow_shift", type=float, default=shift, help=f"time shift of the schedule; {_else(shift)}"
    )
    group.add_argument(
        "--sample_solver",
        type=str,
        default=defaults.sample_solver,
        choices=list(SOLVERS),
        help="stepping rule; vanilla is Euler, dpm++sde adds fresh noise in each step, lcm is for distilled "
        "models and LCM LoRAs (4 to 8 steps, --guidance_scale 1)",
    )
    if defaults.solver_names:
        names = ", ".join(f"{name} is {solver}" for name, solver in defaults.solver_names.items())
        group.add_argument(
            "--scheduler",
            type=str,
            default=None,
            choices=list(defaults.solver_names),
            help=f"another spelling of --sample_solver: {names}",
        )
    for name, text in MEDIA.items():
        if name in defaults.media:
            group.add_argument(f"--{name}", type=str, default=None, help=text)
        else:
            parser.set_defaults(**{name: None})


def add_video_only(group: argparse._ArgumentGroup, *flags: str, **settings: Any) -> None:
    """Declare an option of videos in a script that makes pictures: it is refused by name if it is used."""
    add_unsupported(group, *flags, reason=NO_VIDEOS, **settings)


def _else(default: float | None) -> str:
    return "default: the task's" if default is None else f"default {default:g}"
