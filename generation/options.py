"""Options of the generation scripts that all families share. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blissful_tuner.options import (
    FormatOptions,
    GuidanceOptions,
    add_format_arguments,
    add_guidance_arguments,
    add_later_arguments,
)
from modules.errors import OptionError
from modules.options import refuse_unsupported
from modules.speed_options import GenerationSpeedOptions, add_generation_speed_arguments
from networks.options import LoraOptions, LoraPatternOptions, add_lora_arguments, add_lora_pattern_arguments, require_files

LATENT_OUTPUTS = ("latent", "both")


@dataclass(frozen=True)
class RequestOptions:
    """What the command line says about each video; a prompt line may say otherwise. None: the task's default."""

    prompt: str | None
    negative_prompt: str | None
    video_size: tuple[int, ...]  # height, width
    video_length: int | None
    fps: float
    infer_steps: int | None
    seed: str | None  # a number or any text
    guidance_scale: float | None
    cfg_schedule: str | None
    flow_shift: float | None
    sample_solver: str  # unipc, dpm++, vanilla
    image_path: Path | None
    end_image_path: Path | None
    control_path: Path | None

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise OptionError(f"--fps {self.fps:g}: has to be above 0")


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    save_path: Path
    output_type: str  # video, images, latent, both
    no_metadata: bool
    trim_tail_frames: int
    format: FormatOptions

    def __post_init__(self) -> None:
        if self.trim_tail_frames < 0:
            raise OptionError(f"--trim_tail_frames {self.trim_tail_frames}: give 0 or the number of frames to cut off")
        if self.save_path.exists() and not self.save_path.is_dir():
            raise OptionError(f"--save_path {self.save_path}: it is a file; give a folder, it will be created")

    @property
    def keeps_latents(self) -> bool:
        """Whether latent files are part of the result."""
        return self.output_type in LATENT_OUTPUTS

    @property
    def decodes(self) -> bool:
        """Whether pixels are part of the result."""
        return self.output_type != "latent"


@dataclass(frozen=True)
class GenerationOptions:
    """One run of a generation script."""

    request: RequestOptions
    output: OutputOptions
    guidance: GuidanceOptions
    speed: GenerationSpeedOptions
    lora: LoraOptions
    lora_patterns: LoraPatternOptions
    lycoris: bool
    cpu_noise: bool
    save_merged_model: Path | None
    from_file: Path | None
    interactive: bool
    latent_path: tuple[Path, ...] | None
    device: str | None

    def __post_init__(self) -> None:
        given = {
            "--prompt": self.request.prompt is not None,
            "--from_file": self.from_file is not None,
            "--interactive": self.interactive,
            "--latent_path": bool(self.latent_path),
            "--save_merged_model": self.save_merged_model is not None,
        }
        if not any(given.values()):
            raise OptionError(f"nothing to do: give one of {', '.join(given)}")
        if self.from_file is not None and self.interactive:
            raise OptionError("--from_file and --interactive: give one of them")
        if self.latent_path and (self.from_file is not None or self.interactive):
            raise OptionError("--latent_path only decodes: give it without --from_file and --interactive")
        if self.latent_path and self.output.keeps_latents:
            raise OptionError(
                f"--latent_path with --output_type {self.output.output_type}: the latents are there already. Use video or images"
            )
        require_files("--from_file", () if self.from_file is None else (self.from_file,))
        require_files("--latent_path", self.latent_path or ())


def generation_parser(description: str | None, fps: int, guidance_scale: float) -> argparse.ArgumentParser:
    """A parser with the shared options. fps, guidance_scale: the family's defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_request_arguments(parser, fps, guidance_scale)
    add_guidance_arguments(parser)
    _add_run_arguments(parser)
    _add_output_arguments(parser)
    add_format_arguments(parser)
    _add_lora_arguments(parser)
    add_generation_speed_arguments(parser)
    add_later_arguments(parser)
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; options that are not supported yet are refused."""
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    return args


def _add_request_arguments(parser: argparse.ArgumentParser, fps: int, guidance_scale: float) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", type=str, default=None)
    group.add_argument("--negative_prompt", type=str, default=None, help="what to avoid; without it the model's own text")
    group.add_argument("--video_size", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    group.add_argument("--video_length", type=int, default=None, help="number of frames, 4n + 1; without it the task's")
    group.add_argument("--fps", type=int, default=fps, help="frames per second of the file")
    group.add_argument("--infer_steps", type=int, default=None, help="number of steps; without it the task's")
    group.add_argument("--seed", type=str, default=None, help="a number or any text; without it every video draws its own")
    group.add_argument("--guidance_scale", type=float, default=guidance_scale, help="weight of the prompt; 1 turns guidance off")
    group.add_argument("--flow_shift", type=float, default=None, help="time shift of the schedule; without it the task's")
    group.add_argument(
        "--sample_solver", type=str, default="unipc", choices=["unipc", "dpm++", "vanilla"], help="vanilla: Euler's steps"
    )
    group.add_argument("--image_path", type=str, default=None, help="first image, for image-to-video")
    group.add_argument("--end_image_path", type=str, default=None, help="last image; cut the tail with --trim_tail_frames 3")
    group.add_argument("--control_path", type=str, default=None, help="control video or folder of images, for Fun-Control")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--from_file", type=str, default=None, help="file with a prompt and its options on each line")
    group.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-C drops the current one, Ctrl-D ends")
    group.add_argument("--latent_path", type=str, nargs="*", default=None, help="latent files to decode, nothing else is done")
    group.add_argument("--device", type=str, default=None, help="cuda, cuda:1, mps or cpu; without it the best there is")
    group.add_argument("--cpu_noise", action="store_true", help="draw the noise on the CPU: the same on every machine")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=str, required=True, help="folder for what is made; created when missing")
    group.add_argument("--output_type", type=str, default="video", choices=["video", "images", "latent", "both"])
    group.add_argument("--no_metadata", action="store_true", help="do not write prompt, seed and settings into the files")
    group.add_argument("--trim_tail_frames", type=int, default=0, help="cut so many frames off the end")


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    add_lora_arguments(group)
    add_lora_pattern_arguments(group)
    group.add_argument("--lycoris", action="store_true", help="not needed: LoHa and LoKr files are recognised without it")
    group.add_argument("--save_merged_model", type=str, default=None, help="write the model with the LoRAs merged in, and end")
