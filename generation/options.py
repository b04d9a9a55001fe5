"""Options of the generation scripts that all families share. Standard library only."""

import argparse
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from blissful_tuner.options import (
    GuidanceOptions,
    PreviewOptions,
    PromptOptions,
    PromptRewriteOptions,
    SteadierOptions,
    StepCacheOptions,
)
from blissful_tuner.video_to_video_options import SCRIPT_DEPENDENT_OPTIONS
from generation.grid_options import Axis, SheetOptions
from generation.prompt_lines import LineOption, read_prompt_lines
from generation.script_options import (
    LATENT_OUTPUTS,
    OPTIMIZED,
    UNDECODED,
    OutputOptions,
    RequestOptions,
    ScriptDefaults,
)
from modules.command import name_as_typed
from modules.errors import OptionError
from modules.options import (
    DECODING_SETTING,
    NO_PIXELS,
    NOT_COMPARED,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    get_option_info,
    list_given_with,
    not_needed,
    option,
    option_values,
    read_options,
)
from modules.parser import Parser, add_options, reject_unsupported, typed_names
from modules.paths import path_exists
from modules.script_options import read_command_line
from modules.speed_options import EXCLUDES_FP8_SCALED, TO_OTHER_FORMS
from networks.use_options import (
    LoraOptions,
    LoraPatternOptions,
    lora_rounding_option,
    multipliers_for,
    require_files,
    require_loras,
)
from runtime.options import GenerationSpeedOptions


class ExpertOptions(Options, title="two experts"):
    """LoRAs of the high-noise expert, and how the two experts share device memory."""

    lora_weight_high_noise: tuple[Path, ...] | None = option(
        "LoRA files for --dit_high_noise; those of --lora_weight are for --dit. --include_patterns, "
        "--exclude_patterns and --lora_blocks count over both: first the files of --lora_weight, then these",
        place="there",
        facts=REQUEST_SETTING,
    )
    lora_multiplier_high_noise: tuple[float, ...] = option(
        "strength of each file of --lora_weight_high_noise; missing ones are 1",
        default=(1.0,),
        ignored_without="lora_weight_high_noise",
        facts=REQUEST_SETTING,
    )
    offload_inactive_dit: bool = option(
        "keep the idle expert in host memory, even if the device has room for both",
        facts=NO_PIXELS,
    )
    lazy_loading: bool = option(
        "load an expert when its steps begin and free it after them: least host memory, more reading",
        facts=NO_PIXELS,
    )

    def __post_init__(self) -> None:
        files = self.lora_weight_high_noise or ()
        multipliers_for(files, self.lora_multiplier_high_noise, "--lora_multiplier_high_noise")


POST = "--post"


class PostOptions(Options, title="tools for finished videos"):
    """Options of --post and its tools, which process decoded frames."""

    post: tuple[str, ...] | None = option(
        "a tool that decoded frames go through before they are written, in one text with its options: "
        '"upscaler model=x.pth scale=2". The tools: upscaler, GIMMVFI, facefix or yolo_blur; "upscaler '
        '--help" lists the options of one. May be repeated, or hold several with --then between them. '
        "Latents and what is recorded of size and rate stay those of the generation, and so does "
        "NAME_last.png, to continue from, unless a tool hides something (yolo_blur)",
        action="append",
        nargs=None,
        metavar="TOOL ...",
        facts=DECODING_SETTING,
    )

    def __post_init__(self) -> None:
        _ = self.tools  # raises OptionError

    @functools.cached_property
    def tools(self) -> Any:
        """Selected tools in order, as `postprocessing.chain_options.NamedTools`; None if no tool is selected.

        `post` is imported here, because training generates samples with these options and never needs it.

        Raises:
            OptionError: If a tool or one of its options is unknown.
        """
        if not self.post:
            return None
        from postprocessing.chain_options import read_named_tools  # only with --post

        return read_named_tools(self.post, POST)


logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Options)

ALWAYS_RECORDED = frozenset({"sample_solver", "guidance_rescale"})  # by the known tools too


class GenerationOptions(Options, title="run"):
    """All shared options of a generation script."""

    request: RequestOptions = option(facts=REQUEST_SETTING)
    scheduler: str | None = option(
        "another spelling of --sample_solver", title="what to make", facts=REQUEST_SETTING
    )
    prompts: PromptOptions
    rewriting: PromptRewriteOptions
    guidance: GuidanceOptions
    steadier: SteadierOptions
    from_file: Path | None = option(
        "file with a prompt and its options on each line",
        place="there",
        facts=NO_PIXELS,
        often=True,
        excludes="interactive",
    )
    interactive: bool = option(
        "ask for prompts; Ctrl-C drops the current one, quit ends", facts=NO_PIXELS, often=True
    )
    num_videos: int = option(  # each with its own seed
        "number of results for --prompt, with seed, seed + 1, ...",
        default=1,
        minimum=1,
        maximum=10_000,
        facts=NO_PIXELS,
        excludes=("from_file", "interactive"),
    )
    latent_path: tuple[Path, ...] | None = option(
        "latent files to decode; nothing else is done",
        facts=NO_PIXELS,
        excludes=("from_file", "interactive"),
        hint="--latent_path only decodes",
    )
    device: str | None = option(
        "cuda, cuda:1, mps or cpu; default: the best available", facts=REQUEST_SETTING
    )
    cpu_noise: bool = option("draw the noise on the CPU, so that it is the same on every machine")
    split_uncond: bool = option("run the guidance passes one after the other, which takes less memory")
    output: OutputOptions = option(facts=NO_PIXELS)
    post: PostOptions
    preview: PreviewOptions = option(facts=NO_PIXELS)
    sheet: SheetOptions = option(facts=NO_PIXELS)
    lora: LoraOptions = option(facts=REQUEST_SETTING, title="LoRA", defaults={"lora_multiplier": 1.0})
    lora_patterns: LoraPatternOptions = option(title="LoRA")
    lora_rounding: str = lora_rounding_option(title="LoRA")
    lycoris = not_needed("LoHa and LoKr files are recognized automatically")
    textual_inversion_embeddings: tuple[Path, ...] | None = option(
        "files of embeddings (textual inversion): the name of a file is its word in prompts",
        place="there",
        title="LoRA",
    )
    save_merged_model: Path | None = option(
        "write the model with the LoRAs merged in, then stop",
        place="safetensors",
        title="LoRA",
        facts=NO_PIXELS,
    )
    experts: ExpertOptions
    speed: GenerationSpeedOptions
    optimized: bool = option(OPTIMIZED, title="preset", facts=REQUEST_SETTING, often=True)
    step_cache: StepCacheOptions
    # no options:
    # --interactive: the options of a line apply to later ones
    remembers_lines: bool = option(default=False, facts=NO_PIXELS)
    line_options: Mapping[str, LineOption] = option(default={})  # what the letters of a prompt line mean
    # options given, the family's too, as metadata records them
    settings: Mapping[str, Any] = option(default={})
    decoding_options: frozenset[str] = option(default=frozenset())  # which of all say how latents are decoded
    typed_names: Mapping[str, str] = option(default={}, facts=NO_PIXELS)  # see `name_as_typed`
    # options given that do nothing without reference images
    typed_reference_options: tuple[str, ...] = option(default=(), facts=NO_PIXELS)
    # arguments of the options that are typed, with their usual values too
    typed_options: frozenset[str] = option(default=frozenset(), facts={**NO_PIXELS, **NOT_COMPARED})

    @property
    def splits_guidance(self) -> bool:
        """Whether guidance passes run one by one: on request, for --split_attn, or with several processes."""
        return self.split_uncond or self.speed.attention.split_attn or bool(self.speed.modes.divides_passes)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of a comparison sheet; each is an option and the values to compare."""
        return self.sheet.axes(self.line_options)

    def __post_init__(self) -> None:
        """Raise OptionError for options that contradict each other."""
        if self.request.prompt is None or self.num_videos > 1:
            self._check_work()
        if self.post.post:
            self._check_post()
        loras = (self.lora.lora_weight, self.experts.lora_weight_high_noise)
        require_loras(self.lora_rounding, loras, "--lora_weight")
        if self.sheet.sheet is not None:
            self._check_sheet()
        if self.latent_path and self.output.output_type in LATENT_OUTPUTS:
            kinds = "images" if self.output.pictures else "video or images"
            raise OptionError(
                f"--latent_path with --output_type {self.output.output_type}: the latents exist already. "
                f"Use {kinds}"
            )
        prompt = self.request.prompt
        if prompt is not None and (not prompt.strip() or prompt.endswith((".txt", ".json"))):
            self._check_prompt(prompt)
        if self.latent_path:
            require_files("--latent_path", self.latent_path, "write latents with --output_type latent")
        if self.output.file_name:
            self._check_one_result()

    def _check_work(self) -> None:
        """Raise OptionError if there is nothing to do, or nothing for --num_videos to repeat."""
        modes = {
            "--prompt": self.request.prompt is not None or self.sheet.has_prompts,
            "--from_file": self.from_file is not None,
            "--interactive": self.interactive,
            "--latent_path": bool(self.latent_path),
            "--save_merged_model": self.save_merged_model is not None,
        }
        if not any(modes.values()):
            raise OptionError(f"nothing to do: pass one of {', '.join(modes)}")
        if self.num_videos > 1 and self.request.prompt is None:
            raise OptionError(f"--num_videos {self.num_videos} needs --prompt: it repeats a single prompt")
        if self.num_videos > 1 and self.sheet.sheet is not None:
            raise OptionError("--num_videos and --sheet: pass the seeds to the sheet, --sheet seed=1,2,3")

    def _check_post(self) -> None:
        """Raise OptionError if --post has no frames to process, or if previews would show what it hides."""
        if self.post.tools and self.output.output_type in UNDECODED:
            raise OptionError(
                f"{POST} with --output_type latent: no frames are decoded. Use --output_type both, or pass "
                f"{POST} when the latents are decoded (--latent_path)"
            )
        has_previews = self.preview.preview_latent_every is not None and not self.latent_path
        if has_previews and self.post.tools and self.post.tools.content_hiding_tool:
            raise OptionError(
                f"--preview_latent_every with {POST} {self.post.tools.content_hiding_tool}: previews would "
                "show what it hides. Omit one of them"
            )

    def _check_prompt(self, prompt: str) -> None:
        """Raise OptionError if --prompt is empty, or is the name of a .txt or .json file."""
        if not prompt.strip() and self.save_merged_model is None:
            kind = "image" if self.output.pictures else "video"
            has_other_work = self.from_file is not None or self.interactive or bool(self.latent_path)
            or_omit = ", or omit the option" if has_other_work else ""
            raise OptionError(f"--prompt is empty: say what the {kind} should show{or_omit}")
        if prompt.endswith(".txt") and path_exists(Path(prompt)):
            raise OptionError(
                f"--prompt {prompt} is a file. For the prompts in it, pass --from_file {prompt}"
            )
        if prompt.endswith(".json") and not prompt.startswith("@") and path_exists(Path(prompt)):
            raise OptionError(
                f'--prompt {prompt} is a file. For the JSON object in it give --prompt "@{prompt}"'
            )

    def _check_one_result(self) -> None:
        """Raise OptionError if --save_path names a file but there can be several results."""
        several_lines = self.from_file is not None and len(read_prompt_lines(self.from_file)) > 1
        conflicts = {
            f"--num_videos {self.num_videos}": self.num_videos > 1,
            "--interactive": self.interactive,
            "--sheet": self.sheet.sheet is not None,
            "several files of --latent_path": len(self.latent_path or ()) > 1,
            f"several prompts in {self.from_file}": several_lines,
        }
        for conflict, is_given in conflicts.items():
            if is_given:
                path = self.output.save_path / self.output.file_name
                raise OptionError(
                    f"--save_path {path} with {conflict}: one file has room for one result. Pass a folder, "
                    f"such as {path.with_suffix('')}; results get their own names there"
                )

    def _check_sheet(self) -> None:
        """Raise OptionError if --sheet conflicts with another option, or if its axes cannot be parsed."""
        conflicts = {
            "--latent_path": bool(self.latent_path),
            "--save_merged_model": self.save_merged_model is not None,
            "--output_type latent": self.output.output_type in UNDECODED,
            POST: bool(self.post.tools),
        }
        for conflict, is_given in conflicts.items():
            if is_given:
                raise OptionError(
                    f"--sheet and {conflict} cannot be used together: a sheet shows new videos. Omit one"
                )
        if self.sheet.has_prompts and (self.from_file is not None or self.interactive):
            raise OptionError("--sheet prompt: the prompts are those of the lines. Vary another option")
        _ = self.axes  # parsed only to raise its OptionError now

    def warn_about_ignored_options(self) -> None:
        """Warn about options that other options disable; not in a check, because records are rebuilt."""
        if self.request.prompt is not None and (self.from_file is not None or self.interactive):
            source = "--interactive" if self.interactive else "--from_file"
            logger.warning("--prompt is ignored because the prompts come from %s", source)
        if not self.latent_path:
            return
        ignored = {
            "--num_videos": self.num_videos > 1,
            "--prompt_rewrite": self.rewriting.prompt_rewrite is not None,
            "--preview_latent_every": self.preview.preview_latent_every is not None,
        }
        for name, is_given in ignored.items():
            if is_given:
                logger.warning("%s is ignored because --latent_path only decodes", name)


def read_generation(
    description: str | None,
    defaults: ScriptDefaults,
    record: type[R],
    argv: Sequence[str] | None,
    add_more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[GenerationOptions, R]:
    """Read the options of a generation script; return (shared options, the family's own options).

    Args:
        description: Docstring of the script.
        defaults: Defaults of the family.
        record: Class of the family's own options.
        argv: Arguments of the command line; None for the process's own.
        add_more: Adds options of the script to the parser.
    """

    def build_parser() -> Parser:
        parser = generation_parser(description, defaults)
        add_options(parser, record)
        add_more(parser)
        return parser

    # parse the command line into the records of shared options and of the family's own
    parser, parsed = read_command_line(argv, build_parser)
    info = get_option_info(GenerationOptions) | get_option_info(record)
    extras = {name: option_info["extra"] for name, option_info in info.items() if "extra" in option_info}
    values = script_values(parser, defaults) | vars(parsed) | {"extras": extras}
    args = fill_arguments(parser, argparse.Namespace(**values))
    with name_as_typed(typed_names(args)):
        options = read_options(GenerationOptions, args)
        family_options = read_options(record, args)
    values = option_values(options) | option_values(family_options)
    if options.post.post:
        values["post"] = options.post.tools.in_words  # without the paths of its model files
    recorded_names = _select_recorded(parser, args, info)
    # options that do nothing without an image to edit, by the marks in their declarations
    reference_options: tuple[str, ...] = ()
    if any(option_info.items() >= REFERENCES_ONLY.items() for option_info in info.values()):
        reference_options = list_given_with(family_options, REFERENCES_ONLY)
    options = replace(
        options,
        settings={name: value for name, value in values.items() if name in recorded_names},
        # options that only change how latents are decoded, likewise
        decoding_options=frozenset(
            name for name, option_info in info.items() if option_info.items() >= DECODING_SETTING.items()
        ),
        typed_reference_options=reference_options,
        # a --save_path with a file name is split into folder and name
        output=options.output.in_folder() if options.output.names_file else options.output,
    )
    return options, family_options


def request_extras(record: type[Any]) -> dict[str, str]:
    """Map the names of the family's own options to the keys that store their values in a request.

    Args:
        record: Class of the family's own options.
    """
    info = get_option_info(GenerationOptions) | get_option_info(record)
    return {name: option_info["extra"] for name, option_info in info.items() if "extra" in option_info}


def _select_recorded(
    parser: argparse.ArgumentParser, args: argparse.Namespace, info: Mapping[str, Mapping[str, Any]]
) -> set[str]:
    """Return the names of options to record in metadata: changed ones, except those recorded elsewhere."""
    recorded = {
        action.dest
        for action in parser._actions
        if getattr(args, action.dest, action.default) != action.default
    }
    recorded |= ALWAYS_RECORDED
    for name, option_info in info.items():
        if option_info.get("record") in {"request", "nothing"}:
            recorded.discard(name)
    return recorded


def generation_parser(description: str | None, defaults: ScriptDefaults) -> Parser:
    """Build the argument parser of a model family's generation script, with the shared options."""
    parser = Parser(description=description)
    parser.shown_flags = {name: flags[0] for name, flags in defaults.flags_by_option.items()}
    add_options(parser, GenerationOptions, **defaults.declared())
    parser.set_defaults(**script_values(parser, defaults))
    parser.changes_values = True  # by --optimized, --scheduler and what the model decides
    return parser


def script_values(parser: Parser, defaults: ScriptDefaults) -> dict[str, Any]:
    """Return the fields of `GenerationOptions` that come from the family's script, not from an option."""
    return {
        "extras": {},
        "line_options": defaults.line_options,
        "numbers_single": defaults.numbers_single,
        "pictures": defaults.pictures,
        "solver_names": defaults.solver_names,
        "solvers": defaults.solvers,
        "defaults_from_model": defaults.defaults_from_model,
        "preset": defaults.optimized,
        # defaults that differ between scripts, to tell whether an option was changed
        "usual_sources": {name: parser.get_default(name) for name in SCRIPT_DEPENDENT_OPTIONS},
        "riflex_frequencies": defaults.riflex_frequencies or 0,
        "riflex_beyond": defaults.riflex_beyond,
    }


def read_arguments(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and apply presets such as --optimized."""
    return fill_arguments(parser, parser.parse_args(argv))


def fill_arguments(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Apply --scheduler to --sample_solver, set the options of --optimized, and return the arguments.

    Raises:
        OptionError: If an option is not allowed, or if both options name different solvers.
    """
    reject_unsupported(parser, args)
    if getattr(args, "scheduler", None) is not None:
        solver = args.solver_names[args.scheduler]
        if args.sample_solver != solver and "sample_solver" in args.typed_options:
            raise OptionError(
                f"--scheduler {args.scheduler} is --sample_solver {solver}, but --sample_solver "
                f"{args.sample_solver} is given too: pass one of them"
            )
        args.sample_solver = solver
    for name in args.defaults_from_model.keys() - args.typed_options:
        setattr(args, name, None)  # the default depends on the model, which is not known yet
    if args.optimized:
        # Set the options of the --optimized preset, except typed options and those that conflict with them
        typed_quantisations = EXCLUDES_FP8_SCALED & args.typed_options
        not_by_preset = (args.preset.keys() & args.typed_options) | typed_quantisations
        if typed_quantisations:
            not_by_preset.add("fp8_scaled")
        if typed_quantisations & TO_OTHER_FORMS:
            not_by_preset.add("fp8_fast")
        args.by_preset = tuple(name for name in args.preset if name not in not_by_preset)
        args.not_by_preset = tuple(name for name in args.preset if name in not_by_preset)
        for name in args.by_preset:
            setattr(args, name, args.preset[name])
    # options of the family that are part of a request: name -> (key in `Request.extra`, value)
    args.extras = {name: (key, getattr(args, name)) for name, key in args.extras.items()}
    return args
