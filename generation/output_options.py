"""Options of output files: form and place. Standard library only."""

from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError
from modules.media.options import FormatOptions
from modules.options import NO_PIXELS, OF_DECODING, Options, option

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
