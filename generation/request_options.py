"""Options of each video: texts, size, length and seed. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blissful_tuner.nag_options import NAG
from blissful_tuner.video_to_video_options import SourceOptions
from generation.prompt_lines import MOST_FPS
from modules.options import SETTING, Options, option

SOLVERS = {  # --sample_solver -> as `modules.flow.solvers` names it
    "unipc": "unipc",
    "dpm++": "dpm++",
    "vanilla": "euler",
    "dpm++sde": "dpm++sde",
    "lcm": "lcm",
}
MEDIA = ("image_path", "end_image_path", "control_path")


class RequestOptions(Options, title="what to make"):
    """Options of each video on the command line; a prompt line can override them.

    None means the task's default.
    """

    prompt: str | None = option("what the picture or video should show", often=True)
    nag_prompt: str | None = option("what to steer away from; default: the negative prompt", title=NAG)
    prompt_2: str | None = option("prompt for the second text encoder, CLIP; default: --prompt")
    negative_prompt: str | None = option(
        "what to avoid; default: the text of the model's release, if any", often=True
    )
    video_size: tuple[int, ...] = option(
        "size in pixels", default=(256, 256), nargs=2, metavar=("HEIGHT", "WIDTH"), often=True
    )
    video_length: int | None = option("number of frames, 4n + 1; {default}", often=True)
    fps: float = option("frames per second of the video file", type=int, above=0, most=MOST_FPS)
    infer_steps: int | None = option("number of denoising steps; {default}", often=True)
    seed: str | None = option(
        "a number or any text; default: a random seed for each video", type=str, often=True
    )
    guidance_scale: float | None = option("weight of the prompt; 1 turns guidance off; {default}", often=True)
    # of the expert for much noise
    guidance_scale_high_noise: float | None = option("the same for --dit_high_noise; default: the task's")
    cfg_schedule: str | None = option(
        "steps with guidance, counted from 1: numbers, ranges, every n-th, with their own scale, or "
        "excluded, e.g. '1-10, e~3:6.5, !7'",
        title="guidance",
    )
    flow_shift: float | None = option("time shift of the schedule; {default}", often=True)
    sample_solver: str = option(  # a name of SOLVERS
        "stepping rule; vanilla is Euler, dpm++sde adds fresh noise in each step, lcm is for distilled "
        "models and LCM LoRAs (4 to 8 steps, --guidance_scale 1)",
        default="unipc",
        choices=tuple(SOLVERS),
        facts=SETTING,
    )
    image_path: Path | None = option("first image, for image-to-video", often=True)
    end_image_path: Path | None = option("last image")
    control_path: Path | None = option("control video or folder of images, for Fun-Control")
    source: SourceOptions
    embedded_guidance: float | None = option(
        "guidance scale that the distilled model takes as an input; needs no second pass",
        name="embedded_cfg_scale",
        often=True,
    )
    # options of the family: their names in Request.extra -> their values
    extras: Mapping[str, tuple[str, Any]] = option(default={})
