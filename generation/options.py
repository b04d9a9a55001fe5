"""Options of the generation scripts that all families share. Standard library only."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from blissful_tuner.options import (
    FormatOptions,
    GuidanceOptions,
    add_format_arguments,
    add_guidance_arguments,
    add_later_arguments,
    add_rescale_argument,
    add_video_to_video_arguments,
    refuse_video_to_video,
)
from generation.preset_options import add_preset_argument, use_preset
from generation.prompt_lines import GENERATION_OPTIONS, LineOption
from modules.command import Parser
from modules.errors import OptionError
from modules.options import (
    NO_PIXELS,
    OF_DECODING,
    OF_REQUEST,
    SETTING,
    facts_of,
    option_values,
    read_options,
    refuse_unsupported,
)
from modules.speed_options import GenerationSpeedOptions, add_generation_speed_arguments
from networks.options import (
    LoraOptions,
    LoraPatternOptions,
    add_lora_arguments,
    add_lora_pattern_arguments,
    check_output_file,
    require_files,
)

T = TypeVar("T")

ALWAYS_RECORDED = frozenset({"sample_solver", "guidance_rescale"})  # by the known tools too
MOST_FPS = 1000  # more is a slip of the finger
LATENT_OUTPUTS = ("latent", "both", "latent_images")
IMAGE_OUTPUTS = ("images", "latent_images")
# --optimized, of every family
FASTER: Mapping[str, Any] = {"attn_mode": "sageattn", "compile": True, "fp8_scaled": True}
MEDIA = {
    "image_path": "first image, for image-to-video",
    "end_image_path": "last image",
    "control_path": "control video or folder of images, for Fun-Control",
}


@dataclass(frozen=True)
class ScriptDefaults:
    """Defaults of the shared options in one family's script, and which of them the script has.

    None means the task's default, unless the field says otherwise.
    """

    fps: int
    guidance_scale: float
    video_length: int | None = None
    infer_steps: int | None = None
    flow_shift: float | None = None
    sample_solver: str = "unipc"
    embedded_guidance: float | None = None  # None: no such option
    # the image and video inputs that the script accepts
    media: frozenset[str] = frozenset({"image_path", "end_image_path", "control_path"})
    joins_guidance: bool = False  # the passes of guidance are one batch, unless --split_uncond
    blocks_to_swap: int | None = 0
    has_length: bool = True  # whether there is a --video_length
    rescales_guidance: bool = False  # whether there is a --guidance_rescale
    noise_on_cpu: bool = False  # always, so that there is no --cpu_noise
    # options of the family -> their names in Request.extra
    extras: Mapping[str, str] = field(default_factory=dict)
    # options of a prompt line, by letter
    line_options: Mapping[str, LineOption] = field(default_factory=lambda: GENERATION_OPTIONS)
    output_types: tuple[str, ...] = ("video", "images", "latent", "both")
    in_sections: bool = False  # videos are made section by section and can be watched while they grow
    numbers_single: bool = False  # a single picture is NAME_000.png, never in a folder
    # what --optimized turns on
    optimized: Mapping[str, Any] = field(default_factory=lambda: {**FASTER, "fp8_fast": True})


@dataclass(frozen=True)
class RequestOptions:
    """Options of each video on the command line; a prompt line can override them.

    None means the task's default.
    """

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
    sample_solver: str = field(metadata=SETTING)  # unipc, dpm++, vanilla
    image_path: Path | None
    end_image_path: Path | None
    control_path: Path | None
    video_path: Path | None
    strength: float | None
    embedded_guidance: float | None = field(metadata={"option": "embedded_cfg_scale"})
    # options of the family: their names in Request.extra -> their values
    extras: Mapping[str, tuple[str, Any]]

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise OptionError(f"--fps {self.fps:g}: give a number above 0")
        if self.fps > MOST_FPS:
            raise OptionError(f"--fps {self.fps:g}: give at most {MOST_FPS}")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise OptionError(f"--strength {self.strength:g}: give a share of the steps from 0 to 1")


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    save_path: Path
    output_type: str  # video, images, latent, both, latent_images
    no_metadata: bool
    trim_tail_frames: int = field(metadata=OF_DECODING)
    no_progressive_save: bool
    prompt_in_name: bool = field(metadata=NO_PIXELS)
    numbers_single: bool  # a single picture is NAME_000.png, never in a folder
    format: FormatOptions

    def __post_init__(self) -> None:
        if self.trim_tail_frames < 0:
            raise OptionError(
                f"--trim_tail_frames {self.trim_tail_frames}: give 0 or the number of frames to cut off"
            )
        if self.save_path.exists() and not self.save_path.is_dir():
            raise OptionError(
                f"--save_path {self.save_path}: it is a file; give a folder, it will be created"
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


@dataclass(frozen=True)
class GenerationOptions:
    """One run of a generation script."""

    request: RequestOptions = field(metadata=OF_REQUEST)
    output: OutputOptions = field(metadata=NO_PIXELS)
    guidance: GuidanceOptions
    speed: GenerationSpeedOptions
    lora: LoraOptions = field(metadata=OF_REQUEST)
    lora_patterns: LoraPatternOptions
    lycoris: bool = field(metadata=NO_PIXELS)  # files say it themselves
    cpu_noise: bool
    split_uncond: bool  # the passes of guidance one after the other
    save_merged_model: Path | None = field(metadata=NO_PIXELS)
    from_file: Path | None = field(metadata=NO_PIXELS)
    interactive: bool = field(metadata=NO_PIXELS)
    latent_path: tuple[Path, ...] | None = field(metadata=NO_PIXELS)
    device: str | None = field(metadata=OF_REQUEST)
    line_options: Mapping[str, LineOption]  # what the letters of a prompt line mean
    settings: Mapping[str, Any]  # options that were given, the family's too, as metadata record them
    decoding_options: frozenset[str]  # which of all there are say how latents are decoded

    @property
    def splits_guidance(self) -> bool:
        """Whether the guidance passes run one after the other."""
        return self.split_uncond or self.forces_split

    @property
    def forces_split(self) -> bool:
        """Whether they do so only because attention takes one sample at a time."""
        return self.speed.attention.split_attn and not self.split_uncond

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
            raise OptionError("--from_file and --interactive cannot be used together: give one of them")
        if self.latent_path and (self.from_file is not None or self.interactive):
            raise OptionError("--latent_path only decodes: leave out --from_file and --interactive")
        if self.save_merged_model is not None:
            check_output_file("--save_merged_model", self.save_merged_model)
        if self.latent_path and self.output.keeps_latents:
            raise OptionError(
                f"--latent_path with --output_type {self.output.output_type}: the latents exist already. "
                "Use video or images"
            )
        is_empty = self.request.prompt is not None and not self.request.prompt.strip()
        if is_empty and self.save_merged_model is None:
            raise OptionError("--prompt is empty: say what the video should show, or leave the option out")
        require_files("--from_file", () if self.from_file is None else (self.from_file,))
        require_files("--latent_path", self.latent_path or (), "write latents with --output_type latent")


def read_generation(
    description: str | None,
    defaults: ScriptDefaults,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    record: type[T],
    argv: Sequence[str] | None,
) -> tuple[GenerationOptions, T]:
    """Read the options of a generation script. defaults, add_arguments, record: the family's own."""
    parser = generation_parser(description, defaults)
    add_arguments(parser)
    args = read_arguments(parser, argv)
    options, own = read_options(GenerationOptions, args), read_options(record, args)
    values = option_values(options) | option_values(own)
    given = {
        action.dest
        for action in parser._actions
        if getattr(args, action.dest, action.default) != action.default
    }
    facts = facts_of(GenerationOptions) | facts_of(record)
    of_decoding = frozenset(
        name for name, own_facts in facts.items() if own_facts.items() >= OF_DECODING.items()
    )
    elsewhere = {
        name for name, own_facts in facts.items() if own_facts.get("record") in {"request", "nothing"}
    }
    settings = {name: values[name] for name in values if name in (given | ALWAYS_RECORDED) - elsewhere}
    return replace(options, settings=settings, decoding_options=of_decoding), own


def generation_parser(description: str | None, defaults: ScriptDefaults) -> argparse.ArgumentParser:
    """Build a parser with the shared options, as the family's script has them."""
    parser = Parser(description=description)
    _add_request_arguments(parser, defaults)
    if "video_path" in defaults.media:
        add_video_to_video_arguments(parser)
    else:
        refuse_video_to_video(parser)
    add_guidance_arguments(parser)
    if defaults.rescales_guidance:
        add_rescale_argument(parser.add_argument_group("guidance's strength"))
    _add_run_arguments(parser, defaults)
    _add_output_arguments(parser, defaults)
    add_format_arguments(parser)
    _add_lora_arguments(parser)
    add_generation_speed_arguments(parser, defaults.blocks_to_swap)
    add_preset_argument(parser, defaults.optimized)
    add_later_arguments(parser)
    parser.set_defaults(
        extras=defaults.extras, line_options=defaults.line_options, numbers_single=defaults.numbers_single
    )
    parser.set_defaults(settings={}, decoding_options=frozenset())  # known when all options have been read
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Raises OptionError if an option is not supported yet."""
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    if args.optimized:
        use_preset(parser, args, argv)
    args.extras = {name: (key, getattr(args, name)) for name, key in args.extras.items()}
    return args


def _add_request_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", type=str, default=None, help="what the video should show")
    group.add_argument(
        "--negative_prompt",
        type=str,
        default=None,
        help="what to avoid; default: the text of the model's release, if any",
    )
    group.add_argument(
        "--video_size",
        type=int,
        nargs=2,
        default=[256, 256],
        metavar=("HEIGHT", "WIDTH"),
        help="size in pixels; default 256 256",
    )
    length, steps, shift = defaults.video_length, defaults.infer_steps, defaults.flow_shift
    if defaults.has_length:
        group.add_argument(
            "--video_length", type=int, default=length, help=f"number of frames, 4n + 1; {_else(length)}"
        )
    else:
        parser.set_defaults(video_length=None)
    group.add_argument("--fps", type=int, default=defaults.fps, help="frames per second of the video file")
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
        help="weight of the prompt; 1 turns guidance off",
    )
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
    solvers = ["unipc", "dpm++", "vanilla"]
    group.add_argument(
        "--sample_solver",
        type=str,
        default=defaults.sample_solver,
        choices=solvers,
        help="stepping rule; vanilla is Euler",
    )
    for name, text in MEDIA.items():
        if name in defaults.media:
            group.add_argument(f"--{name}", type=str, default=None, help=text)
        else:
            parser.set_defaults(**{name: None})


def _else(default: float | None) -> str:
    return "default: the task's" if default is None else f"default {default:g}"


def _add_run_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--from_file", type=str, default=None, help="file with a prompt and its options on each line"
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts; Ctrl-C drops the current one, Ctrl-D ends",
    )
    group.add_argument(
        "--latent_path",
        type=str,
        nargs="*",
        default=None,
        help="latent files to decode; nothing else is done",
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu; default: the best available"
    )
    if defaults.noise_on_cpu:
        parser.set_defaults(cpu_noise=True)
    else:
        group.add_argument(
            "--cpu_noise",
            action="store_true",
            help="draw the noise on the CPU, so that it is the same on every machine",
        )
    if defaults.joins_guidance:
        group.add_argument(
            "--split_uncond",
            action="store_true",
            help="run the guidance passes one after the other, which takes less memory",
        )
    else:
        parser.set_defaults(split_uncond=True)


def _add_output_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=str, required=True, help="output folder; created if missing")
    group.add_argument(
        "--output_type",
        type=str,
        default="video",
        choices=list(defaults.output_types),
        help=_output_help(defaults.output_types),
    )
    group.add_argument(
        "--no_metadata", action="store_true", help="do not write the prompt, seed and settings into the files"
    )
    group.add_argument(
        "--prompt_in_name",
        action="store_true",
        help="add the first words of the prompt to the file's name, after time and seed",
    )
    group.add_argument(
        "--trim_tail_frames",
        type=int,
        default=0,
        help="number of frames to cut off the end, e.g. 3 that an end image has spoiled",
    )
    if defaults.in_sections:
        group.add_argument(
            "--no_progressive_save",
            action="store_true",
            help="do not write NAME_progress.mp4, a preview updated after each section and removed when the "
            "video is finished; it makes the VAE decode about two more sections for each one",
        )
    else:
        parser.set_defaults(no_progressive_save=False)


OUTPUT_TYPES = {
    "video": "a video",
    "images": "PNG files",
    "latent": "latents to decode later",
    "both": "latents and a video",
    "latent_images": "latents and PNG files",
}


def _output_help(types: Sequence[str]) -> str:
    return "what to write: " + ", ".join(f"{name} ({OUTPUT_TYPES[name]})" for name in types)


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    add_lora_arguments(group)
    add_lora_pattern_arguments(group)
    group.add_argument(
        "--lycoris", action="store_true", help="not needed: LoHa and LoKr files are recognised automatically"
    )
    group.add_argument(
        "--save_merged_model",
        type=str,
        default=None,
        help="write the model with the LoRAs merged in, then stop",
    )
