"""Options of what is written, and where. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from generation.request_options import NO_VIDEOS, add_video_only
from generation.script_options import ScriptDefaults
from modules.errors import OptionError
from modules.media.options import FormatOptions, add_format_arguments
from modules.options import NO_PIXELS, OF_DECODING
from modules.parser import refuse_values

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


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    save_path: Path
    output_type: str  # video, images, latent, both, latent_images
    no_metadata: bool
    trim_tail_frames: int = field(metadata=OF_DECODING)
    no_progressive_save: bool
    prompt_in_name: bool = field(metadata=NO_PIXELS)
    save_last_frame: bool  # also as NAME_last.png
    numbers_single: bool  # a single picture is NAME_000.png, never in a folder
    pictures: bool = field(metadata=NO_PIXELS)  # only such are made: NAME.png with --output_type images too
    # how files are called: "" TIME_SEED, "released" TIME_seedSEED_PROMPT, "time" TIME alone
    naming: str = field(metadata=NO_PIXELS)
    format: FormatOptions

    def __post_init__(self) -> None:
        if self.trim_tail_frames < 0:
            raise OptionError(
                f"--trim_tail_frames {self.trim_tail_frames}: give 0 or the number of frames to cut off"
            )
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


def add_output_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    """Declare the options of `OutputOptions` that the script has."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=str, required=True, help="output folder; created if missing")
    kind = group.add_argument(
        "--output_type",
        type=str,
        default=defaults.output_types[0],
        choices=list(defaults.output_types),
        help=_output_help(defaults.output_types),
    )
    if defaults.pictures:
        refuse_values(kind, dict.fromkeys(("video", "both"), NO_VIDEOS))
    group.add_argument(
        "--no_metadata", action="store_true", help="do not write the prompt, seed and settings into the files"
    )
    group.add_argument(
        "--prompt_in_name",
        action="store_true",
        help="add the first words of the prompt to the file's name, after time and seed",
    )
    if defaults.pictures:
        add_video_only(group, "--trim_tail_frames", type=int, default=0)
        for flag in ("--save_last_frame", "--keep_pngs"):
            add_video_only(group, flag, action="store_true")
        for flag, usual in (("--codec", "h264"), ("--container", "mp4")):
            add_video_only(group, flag, type=str, default=usual)
        parser.set_defaults(no_progressive_save=False)
        return
    group.add_argument(
        "--trim_tail_frames",
        type=int,
        default=0,
        help="number of frames to cut off the end, e.g. 3 that an end image has spoiled",
    )
    group.add_argument(
        "--save_last_frame",
        action="store_true",
        help="also write the last frame of each video as NAME_last.png, to continue from",
    )
    if defaults.in_sections:
        group.add_argument(
            "--no_progressive_save",
            action="store_true",
            help="do not write NAME_progress.mp4, a preview updated after each section and removed when the "
            "video is finished; it makes the VAE decode about two more sections for each one. There is none "
            "with a tool of --post that hides something",
        )
    else:
        parser.set_defaults(no_progressive_save=False)
    add_format_arguments(parser)


def _output_help(types: Sequence[str]) -> str:
    return "what to write: " + ", ".join(f"{name} ({OUTPUT_TYPES[name]})" for name in types)
