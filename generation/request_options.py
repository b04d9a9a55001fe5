"""Options of each video, and of the files that are written. Standard library only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blissful_tuner.guidance_options import NAG
from blissful_tuner.video_to_video_options import SourceOptions
from generation.prompt_lines import MOST_FPS
from modules.errors import OptionError
from modules.media.options import FormatOptions
from modules.options import NO_PIXELS, OF_DECODING, SETTING, Options, option

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


LATENT_OUTPUTS = ("latent", "both", "latent_images")
IMAGE_OUTPUTS = ("images", "latent_images")
OUTPUT_TYPES = {
    "video": "a video",
    "images": "PNG files",
    "latent": "latents to decode later",
    "both": "latents and a video",
    "latent_images": "latents and PNG files",
}


OF_RESULTS = {".mp4", ".mkv", ".mov", ".webm", ".gif", ".png", ".jpg", ".jpeg", ".webp"}


class OutputOptions(Options, title="output"):
    """Output files: form and place."""

    save_path: Path = option("output folder; created if missing", required=True)
    output_type: str = option("what is written", often=True)
    no_metadata: bool = option("do not write the prompt, seed and settings into the files")
    trim_tail_frames: int = option(
        "number of frames to cut off the end, e.g. 3 that an end image has spoiled",
        default=0,
        least=0,
        facts=OF_DECODING,
    )
    no_progressive_save: bool = option(
        "do not write NAME_progress.mp4, a preview updated after each section and removed when the video is "
        "finished; it makes the VAE decode about two more sections for each one. There is none with a tool "
        "of --post that hides something"
    )
    prompt_in_name: bool = option(
        "add the first words of the prompt to the file's name, after time and seed", facts=NO_PIXELS
    )
    save_last_frame: bool = option(
        "also write the last frame of each video as NAME_last.png, to continue from"
    )
    format: FormatOptions
    # what the script has; no options
    numbers_single: bool = option(default=False)  # a single picture is NAME_000.png, never in a folder
    # only such are made: NAME.png with --output_type images too
    pictures: bool = option(default=False, facts=NO_PIXELS)
    # how files are called: "" TIME_SEED, "released" TIME_seedSEED_PROMPT, "time" TIME alone
    naming: str = option(default="", facts=NO_PIXELS)

    def __post_init__(self) -> None:
        if self.save_last_frame and not self.decodes:
            raise OptionError(
                "--save_last_frame with --output_type latent: no frames are decoded. Use --output_type both, "
                "or give --save_last_frame when the latents are decoded (--latent_path)"
            )
        if self.save_path.exists() and not self.save_path.is_dir():
            raise OptionError(
                f"--save_path {self.save_path}: it is a file; give a folder, it will be created"
            )
        if self.save_path.suffix.lower() in OF_RESULTS and not self.save_path.exists():
            raise OptionError(
                f"--save_path {self.save_path}: results get names of their own. Give a folder for them, such "
                f"as {self.save_path.with_suffix('')}"
            )

    @property
    def keeps_latents(self) -> bool:
        """Whether latent files are part of the result."""
        return self.output_type in LATENT_OUTPUTS

    @property
    def writes_images(self) -> bool:
        """Whether pixels are written as PNG images even if they are a video."""
        return self.output_type in IMAGE_OUTPUTS

    @property
    def shows_progress(self) -> bool:
        """Whether a video made in sections has a preview that grows with it."""
        return self.decodes and not self.no_progressive_save

    @property
    def decodes(self) -> bool:
        """Whether pixels are part of the result."""
        return self.output_type != "latent"


def output_help(types: Sequence[str]) -> str:
    return "what to write: " + ", ".join(f"{name} ({OUTPUT_TYPES[name]})" for name in types)
