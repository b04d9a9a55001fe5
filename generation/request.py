"""Build a `Request` from options and a prompt line, prepare it, and make a `GenerationJob` from it."""

import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, distributed

from blissful_tuner.guidance import check_guidance, warn_about_low_scales
from blissful_tuner.guidance_formulas import run_passes
from blissful_tuner.metadata import output_metadata
from blissful_tuner.options import PLAIN_PROMPTS, PromptOptions, SteadierOptions
from blissful_tuner.video_to_video_options import SourceOptions, check_denoise, check_one_source
from generation.loaded_networks import Session
from generation.network_setup import expert_loras, list_loras, with_blocks
from generation.options import GenerationOptions
from generation.outputs import FrameTools
from generation.prompt_lines import parse_generation_line, read_seed
from generation.script_options import RequestOptions
from modules.command import drop_repeated_warnings, shorten_word
from modules.devices import Failures
from modules.errors import CheckpointError, OptionError
from modules.option_values import SEED_BITS, to_path
from modules.text_files import iterate_lora_metadata, parse_json
from protocols.data import Conditions
from protocols.families import HIGH_NOISE
from protocols.family import Family
from protocols.inputs import SOURCES
from protocols.requests import Prepared, Request, check_values
from protocols.rules import RequestSource
from protocols.steps import DitAt, EncodedPrompts, RunPasses, StepCallback

if TYPE_CHECKING:  # they are loaded only if options ask for them
    from blissful_tuner.latent_preview import LatentPreviews
    from blissful_tuner.prompt_rewrite import PromptRewriter

logger = logging.getLogger(__name__)

T = TypeVar("T")
LorasInWords = Mapping[str, Sequence[tuple[str, float]]]  # expert -> file name and strength of each LoRA

_LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)

RIFLEX_PERIOD_FRACTION = 0.9  # fraction of a period that RIFLEx's slowed frequency completes over the video


def draw_seed() -> int:
    """Draw a seed from the system's entropy; several processes all use the seed of the first one."""
    seed = secrets.randbelow(2**SEED_BITS)
    if not (distributed.is_available() and distributed.is_initialized()):
        return seed
    from runtime.offload.joining import agree  # only with several processes

    return agree(seed)


def parse_seed(text: str) -> int:
    """Parse the value of --seed with `read_seed`.

    Raises:
        OptionError: If the number has too many digits.
    """
    try:
        return read_seed(text)
    except ValueError as error:
        raise OptionError(f"--seed {error}") from None


# text options, in the order in which wildcards are drawn (all from one seed)
TEXTS = ("prompt", "negative_prompt", "prompt_2", "nag_prompt")


def make_request(
    options: RequestOptions,
    overrides: Mapping[str, Any] | None = None,
    prompts: PromptOptions = PLAIN_PROMPTS,
) -> Request:
    """Return the request of the command line, overridden by a prompt line (`parse_generation_line`).

    Without a seed, each call draws a new one. Values that are set nowhere are None.

    Args:
        options: Options of the run.
        overrides: Values of the prompt line by key.
        prompts: Expands the wildcards in prompts.

    Raises:
        OptionError: If a number is out of range, or if a text cannot be expanded.
    """
    line = overrides or {}
    if line:
        _check_line(options, line)
    seed = line.get("seed")
    if seed is None:
        seed = draw_seed() if options.seed is None else parse_seed(options.seed)
    values: Mapping[str, Any] = {**vars(options), **line}  # the line takes precedence
    typed_texts: dict[str, str | None] = {name: values[name] for name in TEXTS}
    expanded = _expand(typed_texts, prompts, seed)
    lora_tags = _LORA_TAG.findall(" ".join(filter(None, expanded.values())))
    if lora_tags:
        _warn_of_lora_tags(lora_tags)
    solver = values["sample_solver"]
    if solver not in options.solvers:
        raise OptionError(f"--sample_solver {solver} (in a prompt line): use {', '.join(options.solvers)}")
    high_noise = values["guidance_scale_high_noise"]
    height, width = options.video_size or (None, None)  # None: the model's default, or a reference's size
    request = Request(
        prompt=expanded["prompt"] or "",
        seed=seed,
        width=line.get("video_size_width", width),
        height=line.get("video_size_height", height),
        frames=values["video_length"],
        steps=values["infer_steps"],
        guidance_scale=values["guidance_scale"],
        expert_guidance={} if high_noise is None else {HIGH_NOISE: high_noise},
        embedded_guidance=line.get("embedded_cfg_scale", options.embedded_guidance),
        flow_shift=values["flow_shift"],
        solver=options.solvers[solver],
        fps=values["fps"],
        negative_prompt=expanded["negative_prompt"],
        nag_prompt=expanded["nag_prompt"] or None,
        second_prompt=expanded["prompt_2"],
        cfg_schedule=values["cfg_schedule"] or None,
        **_read_media_paths(options, values),
        source=_select_source(options.source, line),
        extra=_collect_extras(options, line),
        settings=_collect_settings(line),
        # the prompts as typed, if wildcards or a file changed them
        typed_texts={
            name: text for name, text in typed_texts.items() if text is not None and text != expanded[name]
        },
    )
    check_values(request)
    return request


def _collect_settings(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values of a prompt line that its metadata records as options of the run."""
    settings: dict[str, Any] = {}
    if "sample_solver" in line:
        settings["sample_solver"] = line["sample_solver"]
    if line.get("lora_blocks") is not None:
        settings["lora_blocks"] = tuple(line["lora_blocks"])
    return settings


def _check_line(options: RequestOptions, line: Mapping[str, Any]) -> None:
    """Raise OptionError for a line without prompt; warn of embedded guidance if the model takes none."""
    if "prompt" in line and not line["prompt"].strip():
        raise OptionError("the line has no prompt: write what to show before the options")
    guidance = line.get("embedded_cfg_scale")
    if options.embedded_guidance is None and guidance is not None:
        logger.warning("the embedded guidance %g (--g) is ignored: this model has no input for it", guidance)


def _expand(texts: Mapping[str, str | None], prompts: PromptOptions, seed: int) -> Mapping[str, str | None]:
    """Return the texts with wildcards drawn, and `@file` replaced by that file's JSON; None stays None."""
    if any(text is not None and text.lstrip().startswith("@") for text in texts.values()):
        from generation.named_prompts import read_named_object  # only with such a text

        # texts without @ stay as they are, and so do None and ""
        texts = {name: text and read_named_object(text) for name, text in texts.items()}
    if prompts.prompt_wildcards is None and not prompts.prompt_alternatives:
        return texts
    from blissful_tuner.prompt_syntax import expand_texts  # only with wildcards

    return expand_texts(texts, prompts, seed)


def _read_media_paths(options: RequestOptions, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paths of images and of the control video, by the fields of a request."""
    # A path is None if it is empty, or if the family reads the option itself. Reference images with an empty
    # path are left out.
    paths: dict[str, Any] = {}
    for name in ("image_path", "end_image_path", "control_path"):
        text = "" if name in options.extras or values[name] is None else str(values[name])
        paths[name] = to_path(f"--{name}", text) if text else None
    references = filter(None, map(str, values["control_image_path"] or ()))
    paths["control_images"] = tuple(to_path("--control_image_path", text) for text in references)
    return paths


def _collect_extras(options: RequestOptions, line: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of the family's own options as text, by key; lists become one line per item."""
    extra = {}
    for name, (key, option_value) in options.extras.items():
        value = line.get(name, option_value)
        text = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if value is not None and text:
            extra[key] = text
    return extra


def _select_source(options: SourceOptions, line: Mapping[str, Any]) -> RequestSource | None:
    """Return the video or image to start from instead of noise; None if neither line nor options name one."""
    # A prompt line takes precedence over the command line.
    paths = {name: line[name] for name in SOURCES if name in line}
    if not paths:
        paths = {name: getattr(options, name) for name in SOURCES}
    sources = {name: str(path) for name, path in paths.items() if path is not None and str(path) != ""}
    if "denoise" in line:
        check_denoise("--vd in a prompt line", line["denoise"])
    if not sources:
        if "denoise" in line:
            logger.warning("--vd %g is ignored because the line has no source video (--v)", line["denoise"])
        return None
    check_one_source(sources)
    ((name, path),) = sources.items()
    source = RequestSource(
        name,
        to_path(f"--{name}", path),
        denoise=line.get("denoise", options.denoise),
        denoise_option=options.denoise_option,
        noise_mode=options.v2v_noise_mode,
        pad_mode=options.v2v_pad_mode,
    )
    return replace(source, extra_noise=getattr(options, source.extra_option) or 0.0)


def find_edit_loras(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the LoRA files whose metadata show that they were trained to edit images.

    Each path comes with the training option in parentheses, or "" if the metadata does not name it.
    """
    for path, metadata in iterate_lora_metadata(paths):
        if metadata.get("ss_edit") == "True":
            yield path, " (--edit)"
            continue
        if metadata.get("ss_edit") == "False" and metadata.get("ss_model_version", "None") == "None":
            continue  # LoRAs of this model are trained for edits only with --edit
        try:
            tables = parse_json(metadata.get("ss_datasets", ""))
        except ValueError:
            continue
        if isinstance(tables, list) and tables and all(map(_has_control, tables)):
            yield path, ""


def _has_control(table: object) -> bool:
    """Return whether a table of the `ss_datasets` metadata says that all items had control media."""
    return isinstance(table, dict) and table.get("has_control") is True


def prepare_line(family: Family, options: GenerationOptions, overrides: Mapping[str, Any]) -> Prepared:
    """Resolve the request of the command line, overridden by a prompt line, without loading a network.

    Raises:
        UserError: If the request is not possible.
    """
    request = _complete_request(family, options, overrides)
    prepared = family.prepare(request)  # with the family's values
    if family.references is not None and not family.references.clips and not request.control_images:
        paths = options.lora.lora_weight or ()
        for path, option in find_edit_loras(paths):
            logger.warning(
                "%s was trained to edit images%s, but there is no image: the result is made from the text "
                "alone. Pass --control_image_path (--ci in a prompt line)",
                path,
                option,
            )
    if options.typed_reference_options and not prepared.request.control_images:
        names = ", ".join(f"--{name}" for name in options.typed_reference_options)
        logger.warning("%s: ignored, as there is no image to edit (--control_image_path)", names)
    if prepared.request.source is not None:
        from blissful_tuner.video_to_video import start_from_source  # only with a source

        prepared = start_from_source(prepared, prepared.request.source, family)
    if options.prompts.prompt_weighting:
        from blissful_tuner.prompt_syntax import weigh_all  # only with --prompt_weighting

        prepared = replace(prepared, prompts=weigh_all(prepared.prompts))
    check_guidance(prepared, options.guidance)
    warn_about_low_scales(prepared, options.guidance)
    if request.step_cache is not None:
        from blissful_tuner.step_cache import check_step_cache  # only with a step cache

        check_step_cache(request.step_cache, prepared, family.dit)
    return _with_riflex(prepared, options.steadier) if options.steadier.riflex_index else prepared


def _complete_request(family: Family, options: GenerationOptions, overrides: Mapping[str, Any]) -> Request:
    """Return the request with its step cache and source, after all checks that need no family values."""
    request = make_request(options.request, overrides, options.prompts)
    if options.step_cache.is_on or overrides:
        from blissful_tuner.step_cache import select_step_cache  # only if a line may request one

        step_cache, settings = select_step_cache(options.step_cache, overrides)
        request = replace(request, step_cache=step_cache, settings={**request.settings, **settings})
    if request.source is not None:  # a video or image to start from instead of noise
        from blissful_tuner.video_to_video import check_source  # only with a source

        request = check_source(request, request.source, family.source, family.latent)
    if "embedding:" in f"{request.prompt} {request.negative_prompt}".lower():
        from generation.embedding_marks import warn_about_embeddings  # only with such a mark

        warn_about_embeddings(family, request)
    return request


def _warn_of_lora_tags(tags: Iterable[str]) -> None:
    """Warn that LoRA tags such as <lora:style:0.8>, which other programs support, have no effect."""
    for tag in tags:
        logger.warning(
            "%s in a prompt loads nothing and is read as words: remove it, and pass the file to "
            "--lora_weight and its strength to --lora_multiplier",
            shorten_word(tag),
        )


def _with_riflex(prepared: Prepared, options: SteadierOptions) -> Prepared:
    """Return the request with the frequency of --riflex_index slowed down, if the video is long enough."""
    index = options.riflex_index
    if prepared.frames <= options.riflex_beyond:
        logger.warning(
            "--riflex_index %d is ignored because the video has %d frames: it is for more than %d",
            index,
            prepared.frames,
            options.riflex_beyond,
        )
        return prepared
    from modules.layers.rope import SlowedFrequency  # only with --riflex_index

    # a frequency that completes less than one period over the whole video does not repeat motion
    period = prepared.frames / RIFLEX_PERIOD_FRACTION
    return replace(prepared, slow_frames=SlowedFrequency(index - 1, period))  # the option counts from 1


@dataclass(frozen=True)
class Peaks:
    """Predicted peaks of device memory in a run, in bytes."""

    maximum: int  # of all phases
    decoding: int  # while latents become pixels


@dataclass(frozen=True)
class GenerationJob:
    """One request and, once denoised, its latents; `label` identifies it in messages, such as "line 3"."""

    label: str
    prepared: Prepared
    stem: str | None = None  # name of its files without suffix; None: time, seed and what the options add
    # metadata of its files. None before denoising: those of the run; None after denoising: no metadata
    metadata: Mapping[str, str] | None = None
    latents: Tensor | None = None  # 1 C F H W, on the CPU, after denoising
    audio: Tensor | None = None  # audio latents, 1 C T M, after denoising
    latent_path: Path | None = None  # file of the latents
    preview: Path | None = None  # path of the preview; the file may not exist
    # strengths of blocks by LoRA file (--lb in its prompt line); None: those of the run's options
    lora_blocks: tuple[str, ...] | None = None


class EncodedJob(NamedTuple):
    """A generation job with its encoded prompts and inputs, each by section index."""

    job: GenerationJob
    encoded_prompts: Mapping[int, EncodedPrompts]
    inputs: Mapping[int, Conditions]


# groups of jobs, each with the networks to denoise it
JobsWithNetworks = Iterable[tuple[Sequence[EncodedJob], DitAt]]


@dataclass(frozen=True)
class GenerationRun:
    """The model family, options and loaded networks that all modes of generation share."""

    family: Family
    options: GenerationOptions
    session: Session
    predicted: Peaks | None = None  # None if the peaks are unknown
    rewriter: "PromptRewriter | None" = None
    previews: "LatentPreviews | None" = None
    post: FrameTools | None = None  # tools that process decoded frames (--post)
    fatal: tuple[type[Exception], ...] = ()  # errors that end the run even if other jobs remain
    run_passes: RunPasses = run_passes  # runs the passes of a step
    processes: int = 1  # number of processes that share the passes of a step
    watchers: Sequence[StepCallback] = ()  # called after each step, in addition to bars and previews
    on_phase: Callable[[str], None] = lambda _: None  # called with the name of each phase that begins
    now: Callable[[], datetime] = field(default=lambda: datetime.now().astimezone())

    def with_previews(self) -> "GenerationRun":
        """Return the run with latent previews if they are enabled; may load a decoder of 20 MB."""
        from blissful_tuner.latent_preview import make_previews  # only with previews

        previews = make_previews(
            self.options.preview,
            self.family.latent,
            self.options.output.save_path,
            device=self.session.device,
            has_room=self.session.dits.can_stay,
        )
        return replace(self, previews=previews)

    def metadata(self, prepared: Prepared, loras: LorasInWords | None = None) -> Mapping[str, str] | None:
        """Return the metadata to write into an output file; None with --no_metadata.

        Args:
            prepared: The request with all values resolved.
            loras: LoRAs to record instead of `self.loras`.
        """
        if self.options.output.no_metadata:
            return None
        return output_metadata(
            prepared,
            self.family.metadata,
            loras=self.loras if loras is None else loras,
            settings=self.options.settings,
            device=self.session.device.type,
            created=self.now(),
            experts=self.family.experts,
        )

    @property
    def loras(self) -> LorasInWords:
        """File names and strengths of the LoRAs by expert; the key "" is the only or the low-noise expert."""
        loras = list_loras(self.options).items()
        return {expert: [(path.name, strength) for path, strength in files] for expert, files in loras}

    def read_line(self, line: str, where: str = "the prompt line") -> Mapping[str, Any]:
        """Parse a prompt line into its prompt and options, by key.

        Args:
            line: The prompt line.
            where: Name of the line in warnings.

        Raises:
            OptionError: If a value cannot be parsed.
        """
        return parse_generation_line(line, self.options.line_options, where)


def make_job(run: GenerationRun, label: str, overrides: Mapping[str, Any]) -> GenerationJob:
    """Make the generation job of a prompt line, or of the command line alone, without loading a network.

    Raises UserError if the request is not possible, or if --post cannot process a single image.
    """
    prepared = prepare_line(run.family, run.options, overrides)
    if run.options.output.file_name:
        frames = 0 if prepared.is_audio_alone else prepared.frames
        run.options.output.check_file_name(1 if run.family.latent.has_layers else frames)
    if run.post is not None and run.family.latent.has_layers:
        raise OptionError("--post works on clips and images, not on layers of an image; omit it")
    if run.post is not None:
        run.post.check_length(prepared.frames, label)
    return GenerationJob(label, prepared, lora_blocks=_select_blocks(run, overrides))


def _select_blocks(run: GenerationRun, line: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return a prompt line's strengths of blocks, after comparing them with the LoRA files; None for none."""
    if line.get("lora_blocks") is None:
        return None
    blocks = tuple(line["lora_blocks"])
    if blocks == run.options.lora_patterns.lora_blocks:
        return None
    # read now, before anything else is loaded, because the texts may not fit the files
    expert_loras(run.family, with_blocks(run.options, blocks))
    return blocks


def map_lines(
    run: GenerationRun,
    lines: Mapping[str, str | None],
    failures: Failures,
    make: Callable[[GenerationRun, str, Mapping[str, Any]], T],
) -> dict[str, T]:
    """Call `make` for each prompt line; return the results by label, without lines that fail.

    Args:
        run: The run.
        lines: Lines from `read_prompt_lines`.
        failures: Collects the errors of single lines.
        make: Makes the result of a line.

    Raises:
        CheckpointError: If a model file is invalid, because every line would then fail.
    """
    results: dict[str, T] = {}
    path = run.options.from_file
    with drop_repeated_warnings():
        for label, line in lines.items():
            with failures.collect_errors(label, fatal=CheckpointError):
                where = label if path is None else f"{path}, {label}"
                overrides = {} if line is None else run.read_line(line, where)
                results[label] = make(run, label, overrides)
    return results
