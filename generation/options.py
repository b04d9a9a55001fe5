"""Options of the generation scripts that all families share. Standard library only."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from blissful_tuner.guidance_options import GuidanceOptions, add_guidance_arguments
from blissful_tuner.preview_options import PreviewOptions, add_preview_arguments
from blissful_tuner.prompt_options import PromptOptions, add_prompt_arguments
from blissful_tuner.prompt_rewrite_options import PromptRewriteOptions, add_prompt_rewrite_arguments
from blissful_tuner.steadier_options import SteadierOptions, add_steadier_arguments
from blissful_tuner.step_cache_options import StepCacheOptions, add_step_cache_arguments
from blissful_tuner.video_to_video_options import add_video_to_video_arguments
from generation.expert_options import ExpertOptions, add_expert_arguments
from generation.output_options import OutputOptions, add_output_arguments
from generation.post_options import POST, PostOptions, add_post_arguments
from generation.preset_options import add_preset_argument, given_among, use_preset
from generation.prompt_lines import LineOption
from generation.request_options import RequestOptions, add_request_arguments
from generation.script_options import ScriptDefaults
from generation.sheet_options import Axis, SheetOptions, add_sheet_arguments
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import NO_PIXELS, OF_DECODING, OF_REQUEST, facts_of, option_values, read_options
from modules.output_files import check_output_file
from modules.parser import Parser, refuse_unsupported
from modules.speed_options import GenerationSpeedOptions, add_generation_speed_arguments
from networks.options import (
    LoraOptions,
    LoraPatternOptions,
    add_lora_arguments,
    add_lora_pattern_arguments,
    require_files,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

ALWAYS_RECORDED = frozenset({"sample_solver", "guidance_rescale"})  # by the known tools too


@dataclass(frozen=True)
class GenerationOptions:
    """One run of a generation script."""

    request: RequestOptions = field(metadata=OF_REQUEST)
    output: OutputOptions = field(metadata=NO_PIXELS)
    post: PostOptions
    sheet: SheetOptions = field(metadata=NO_PIXELS)
    guidance: GuidanceOptions
    prompts: PromptOptions
    rewriting: PromptRewriteOptions
    preview: PreviewOptions = field(metadata=NO_PIXELS)
    step_cache: StepCacheOptions
    speed: GenerationSpeedOptions
    steadier: SteadierOptions
    lora: LoraOptions = field(metadata=OF_REQUEST)
    lora_patterns: LoraPatternOptions
    experts: ExpertOptions
    lycoris: bool = field(metadata=NO_PIXELS)  # files say it themselves
    cpu_noise: bool
    split_uncond: bool  # the passes of guidance one after the other
    save_merged_model: Path | None = field(metadata=NO_PIXELS)
    from_file: Path | None = field(metadata=NO_PIXELS)
    interactive: bool = field(metadata=NO_PIXELS)
    num_videos: int = field(metadata=NO_PIXELS)  # of the prompt, each with its own seed
    latent_path: tuple[Path, ...] | None = field(metadata=NO_PIXELS)
    remembers_lines: bool = field(metadata=NO_PIXELS)  # --interactive: options of a line hold for later ones
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

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The options that a comparison sheet varies; none without --sheet."""
        return self.sheet.axes(self.line_options)

    def __post_init__(self) -> None:
        given = {
            "--prompt": self.request.prompt is not None or self.sheet.has_prompts,
            "--from_file": self.from_file is not None,
            "--interactive": self.interactive,
            "--latent_path": bool(self.latent_path),
            "--save_merged_model": self.save_merged_model is not None,
        }
        if not any(given.values()):
            raise OptionError(f"nothing to do: give one of {', '.join(given)}")
        check_at_least("--num_videos", self.num_videos, 1, "how many videos to make of the prompt")
        check_at_most("--num_videos", self.num_videos, 10_000, "how many videos to make of the prompt")
        if self.num_videos > 1 and self.request.prompt is None:
            raise OptionError(f"--num_videos {self.num_videos} needs --prompt: it repeats a single prompt")
        if self.num_videos > 1 and (self.from_file is not None or self.interactive):
            raise OptionError("--num_videos is for one --prompt: leave out --from_file and --interactive")
        if self.num_videos > 1 and self.sheet.is_asked:
            raise OptionError("--num_videos and --sheet: give the seeds to the sheet, --sheet seed=1,2,3")
        if self.from_file is not None and self.interactive:
            raise OptionError("--from_file and --interactive cannot be used together: give one of them")
        if self.request.prompt is not None and (self.from_file is not None or self.interactive):
            source = "--interactive" if self.interactive else "--from_file"
            logger.warning("--prompt is ignored because the prompts come from %s", source)
        if self.latent_path and (self.from_file is not None or self.interactive):
            raise OptionError("--latent_path only decodes: leave out --from_file and --interactive")
        if self.post.tools and not self.output.decodes:
            raise OptionError(
                f"{POST} with --output_type latent: no frames are decoded. Use --output_type both, or give "
                f"{POST} when the latents are decoded (--latent_path)"
            )
        shows = self.preview.preview_latent_every is not None and not self.latent_path
        if shows and self.post.hiding is not None:
            raise OptionError(
                f"--preview_latent_every with {POST} {self.post.hiding}: previews would show what it hides. "
                "Leave one of them out"
            )
        if self.sheet.is_asked:
            self._check_sheet()
        if self.save_merged_model is not None:
            check_output_file("--save_merged_model", self.save_merged_model)
        if self.latent_path:
            self._tell_unused_by_decoding()
        if self.latent_path and self.output.keeps_latents:
            raise OptionError(
                f"--latent_path with --output_type {self.output.output_type}: the latents exist already. "
                f"Use {'images' if self.output.pictures else 'video or images'}"
            )
        is_empty = self.request.prompt is not None and not self.request.prompt.strip()
        if is_empty and self.save_merged_model is None:
            what = "picture" if self.output.pictures else "video"
            raise OptionError(f"--prompt is empty: say what the {what} should show, or leave the option out")
        require_files("--from_file", () if self.from_file is None else (self.from_file,))
        require_files("--latent_path", self.latent_path or (), "write latents with --output_type latent")

    def _tell_unused_by_decoding(self) -> None:
        given = {
            "--num_videos": self.num_videos > 1,
            "--prompt_rewrite": self.rewriting.prompt_rewrite is not None,
            "--preview_latent_every": self.preview.preview_latent_every is not None,
        }
        for option in (option for option, is_given in given.items() if is_given):
            logger.warning("%s is ignored because --latent_path only decodes", option)

    def _check_sheet(self) -> None:
        """Raise OptionError if there is nothing that a sheet could show, or if its axes cannot be read."""
        for option, is_given in {
            "--latent_path": bool(self.latent_path),
            "--save_merged_model": self.save_merged_model is not None,
            "--output_type latent": not self.output.decodes,
            POST: bool(self.post.tools),
        }.items():
            if is_given:
                raise OptionError(
                    f"--sheet and {option} cannot be used together: a sheet shows new videos. Leave one out"
                )
        if self.sheet.has_prompts and (self.from_file is not None or self.interactive):
            raise OptionError("--sheet prompt: the prompts are those of the lines. Vary another option")
        _ = self.axes


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
    values["post"] = options.post.in_words  # no folders
    settings = {name: values[name] for name in values if name in (given | ALWAYS_RECORDED) - elsewhere}
    return replace(options, settings=settings, decoding_options=of_decoding), own


def generation_parser(description: str | None, defaults: ScriptDefaults) -> argparse.ArgumentParser:
    """Build a parser with the shared options, as the family's script has them."""
    parser = Parser(description=description)
    add_request_arguments(parser, defaults)
    add_prompt_arguments(parser)
    add_prompt_rewrite_arguments(parser)
    add_video_to_video_arguments(parser, defaults.source)
    add_guidance_arguments(parser, has_embedded=defaults.embedded_guidance is not None)
    add_steadier_arguments(parser, defaults.riflex_frequencies, defaults.riflex_beyond)
    _add_run_arguments(parser, defaults)
    add_output_arguments(parser, defaults)
    add_post_arguments(parser)
    add_preview_arguments(parser)
    add_sheet_arguments(parser)
    _add_lora_arguments(parser)
    add_expert_arguments(parser, defaults.has_experts)
    add_generation_speed_arguments(parser, defaults.blocks_to_swap)
    add_preset_argument(parser, defaults.optimized)
    add_step_cache_arguments(parser)
    parser.set_defaults(
        extras=defaults.extras,
        line_options=defaults.line_options,
        numbers_single=defaults.numbers_single,
        pictures=defaults.pictures,
        naming="",
        remembers_lines=False,
        solver_names=defaults.solver_names,
    )
    parser.set_defaults(settings={}, decoding_options=frozenset())  # known when all options have been read
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Raises OptionError if an option is not supported yet."""
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    if getattr(args, "scheduler", None) is not None:
        _use_scheduler(parser, args, argv)
    if args.optimized:
        use_preset(parser, args, argv)
    args.extras = {name: (key, getattr(args, name)) for name, key in args.extras.items()}
    return args


def _use_scheduler(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None
) -> None:
    """Set --sample_solver to what --scheduler names. Raises OptionError if both are given and differ."""
    solver = args.solver_names[args.scheduler]
    if args.sample_solver != solver and given_among(parser, argv, {"sample_solver"}):
        raise OptionError(
            f"--scheduler {args.scheduler} is --sample_solver {solver}, but --sample_solver "
            f"{args.sample_solver} is given too: give one of them"
        )
    args.sample_solver = solver


def _add_run_arguments(parser: argparse.ArgumentParser, defaults: ScriptDefaults) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--from_file", type=str, default=None, help="file with a prompt and its options on each line"
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts; Ctrl-C drops the current one, quit ends",
    )
    what = "pictures" if defaults.pictures else "videos"
    group.add_argument(
        *(("--num_images", "--num_videos") if defaults.pictures else ("--num_videos",)),
        dest="num_videos",
        type=int,
        default=1,
        help=f"how many {what} to make of --prompt, with seed, seed + 1, ...",
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
