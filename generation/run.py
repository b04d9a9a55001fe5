"""The modes of a generation script: one prompt, a file of prompts, a conversation, decoding only, and saving
a merged model.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blissful_tuner.guidance import uses_guidance
from blissful_tuner.metadata import decoded_metadata, frame_rate_in, output_metadata, seed_in
from blissful_tuner.options import STRENGTH
from generation.denoise import OnStep
from generation.dressing import dit_loader
from generation.growing import growing, kept_where_it_fails, preview_path, remove_parts, remove_preview
from generation.memory import Peaks, plan_generation, resolved
from generation.options import GenerationOptions, OutputOptions
from generation.outputs import (
    LATENT_SUFFIX,
    SavedLatents,
    free_stem,
    load_latents,
    output_stem,
    own_stem,
    save_latents,
    save_pixels,
)
from generation.progress import Bars, describe
from generation.prompt_lines import is_blank, parse_generation_line, read_generation_lines
from generation.request import check_guidance, make_request
from generation.sections import OnSection, make_latents
from generation.session import CPU, NO_ENCODERS, Session, encode_inputs
from modules.atomic_write import make_folder
from modules.attention.attend import check_backend
from modules.command import each_warning_once
from modules.compile import check_compilation
from modules.contract.data import Conditions
from modules.contract.family import Family
from modules.contract.generation import EncodedPrompts, Request, Section
from modules.contract.loading import Placement
from modules.devices import allow_fp16_accumulation, choose_device
from modules.errors import CheckpointError, UserError
from modules.planning.memory_plan import comparison, room_on, too_little
from networks.merge import LoraUse, lora_uses, merge_into_file

logger = logging.getLogger(__name__)

PROMPT_SIGN = "> "


@dataclass(frozen=True)
class Job:
    """One thing to make; `label` names it in messages ("line 3")."""

    label: str
    request: Request  # as `Family.prepare` returned it


@dataclass(frozen=True)
class Denoised:
    """The latents of a job (1 C F H W, on the CPU), also kept in a file until its pixels are written."""

    job: Job
    latents: Tensor
    latent_path: Path
    stem: str
    preview: Path  # of the video while it was made, if there is one


@dataclass
class Failures:
    """What could not be made, and why. strict: the first failure ends the run."""

    strict: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noted(self, label: str, fatal: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Note an error of the block and go on after it, unless it is `fatal`."""
        try:
            yield
        except Exception as error:
            if self.strict or isinstance(error, fatal):
                raise
            self.reasons[label] = f"{type(error).__name__}: {error}"
            is_known = isinstance(error, (UserError, torch.OutOfMemoryError))
            logger.error("%s is skipped. %s", label, self.reasons[label], exc_info=not is_known)

    def raise_if_any(self, total: int) -> None:
        """Raise UserError listing what failed."""
        if self.reasons:
            lines = "\n".join(f"  {label}: {reason}" for label, reason in self.reasons.items())
            raise UserError(f"{len(self.reasons)} of {total} failed:\n{lines}")


@dataclass(frozen=True)
class Run:
    """What every mode works with."""

    family: Family
    options: GenerationOptions
    session: Session
    predicted: Peaks | None = None  # where it is known

    def metadata(self, request: Request) -> Mapping[str, str] | None:
        """What an output says about itself; None with --no_metadata."""
        if self.options.output.no_metadata:
            return None
        lora = self.options.lora
        names = [path.name for path in lora.lora_weight or ()]
        loras = list(zip(names, lora.multipliers(), strict=True))
        return output_metadata(
            request, self.family.metadata, loras, self.options.settings, self.session.device.type
        )

    def read_line(self, line: str) -> Mapping[str, Any]:
        """What a prompt line says. Raises OptionError."""
        return parse_generation_line(line, self.options.line_options)


def generate(family: Family, options: GenerationOptions) -> None:
    """Do what the options say. Raises UserError; with --from_file only after all lines that work are made."""
    try:
        do(family, options)
    except torch.OutOfMemoryError as error:
        raise too_little(error, "Latents that were finished are kept: --latent_path decodes them.") from error


def do(family: Family, options: GenerationOptions) -> None:
    """`generate`, where memory suffices."""
    device = choose_device(options.device)
    if options.lycoris:
        logger.info("--lycoris is not needed: LoHa and LoKr files are recognised without it")
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation()
    uses = lora_uses(options.lora, options.lora_patterns)  # read first, so that a wrong file shows at once
    if options.save_merged_model is not None:
        save_merged_model(family, uses, options.save_merged_model, device)
        return
    check_compilation(options.speed.compilation.choice, device)
    if options.speed.plan.is_asked:
        plan_generation(family, options, device)
        return
    options, predicted = resolved(family, options, device, room_on(device))
    session = Session(family, device, dit_loader(family, uses, device, options), keep=options.interactive)
    run = Run(family, options, session, predicted)
    tell_where_metadata_is(options.output)
    if options.latent_path:
        decode_files(run, options.latent_path)
        return
    check_models(run)
    if options.from_file is not None:
        make_from_file(run, options.from_file)
    elif options.interactive:
        converse(run)
    else:
        job = prepared(run, "the prompt", {})
        tell_unused_strength(options.request.strength, [job])
        make(run, [job], Failures(strict=True))


def tell_where_metadata_is(output: OutputOptions) -> None:
    """MP4 holds no metadata: say so once, where somebody may expect it."""
    if (
        output.decodes
        and not output.writes_images
        and output.format.suffix == ".mp4"
        and not output.no_metadata
    ):
        logger.info("MP4 files hold no prompt and settings; --container mkv, PNG and latent files do")


def tell_unused_strength(strength: float | None, jobs: Sequence[Job]) -> None:
    """Warn where --strength was given and no job starts from a video."""
    if strength not in (None, STRENGTH) and all(job.request.video_path is None for job in jobs):
        logger.warning(
            "--strength %g is ignored because nothing starts from a video (--video_path): every step is made",
            strength,
        )


def check_models(run: Run) -> None:
    """Raise UserError where a model file that every prompt needs is missing or of another kind, or the
    attention that is asked for cannot be had. Nothing is loaded.
    """
    placement = Placement(run.session.device, attention=run.options.speed.attention.choice)
    check_backend(
        placement.attention, placement.device, lambda: run.family.compute_dtype(placement), training=False
    )
    _ = run.family.dit_files, run.family.text_encoders()
    if run.options.output.decodes:
        _ = run.family.media_identity


def save_merged_model(family: Family, uses: Sequence[LoraUse], path: Path, device: torch.device) -> None:
    """Write the network's file with the LoRAs merged in, tensor by tensor; further experts get `_1`, `_2`
    behind the name.
    """
    for expert, file in enumerate(family.dit_files):
        target = path if expert == 0 else path.with_name(f"{path.stem}_{expert}{path.suffix}")
        merge_into_file(file, uses, target, device)


def make_from_file(run: Run, path: Path) -> None:
    """Make every line of a prompt file; phase by phase, so that each network is loaded once."""
    lines = read_generation_lines(path)
    failures = Failures()
    jobs = []
    with each_warning_once():
        for number, line in lines:
            # a wrong model file is wrong for every line
            with failures.noted(label := f"line {number}", fatal=CheckpointError):
                jobs.append(prepared(run, label, run.read_line(line)))
    if jobs:
        tell_unused_strength(run.options.request.strength, jobs)
        make(run, jobs, failures)
    failures.raise_if_any(len(lines))


def converse(run: Run) -> None:
    """Ask for prompts until the end of input. Ctrl-C abandons the current prompt."""
    try:
        import readline  # noqa: F401 (line editing and history for input(); not there on Windows)
    except ImportError:
        logger.info("Line editing is as the console offers it: this Python has no readline")
    logger.info(
        "Write a prompt and options such as --w 832 --h 480 --d 7. Ctrl-C drops the current prompt, Ctrl-D "
        "ends."
    )
    while True:
        try:
            line = input(PROMPT_SIGN)
            if not is_blank(line):
                failures = Failures()
                with failures.noted("the prompt"):
                    make(run, [prepared(run, "the prompt", run.read_line(line))], failures)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            logger.warning("The prompt is abandoned. Ctrl-D ends.")


def prepared(run: Run, label: str, overrides: Mapping[str, Any]) -> Job:
    """The job of a prompt line (or of the command line alone), checked as far as that goes without loading a
    network.
    """
    request = run.family.prepare(make_request(run.options.request, overrides))
    return Job(label, check_guidance(request, run.options.guidance))


def make(run: Run, jobs: Sequence[Job], failures: Failures) -> None:
    """Encode all texts, encode all images and videos, denoise all, decode all."""
    if any(run.family.needs_media(job.request) for job in jobs):
        _ = run.family.media_identity  # raises where a file is missing, before gigabytes are loaded
    if run.options.forces_split and any(uses_guidance(job.request) for job in jobs):
        logger.warning(
            "--split_attn has the passes of guidance made one after the other, as --split_uncond does."
        )
    make_folder(run.options.output.save_path, "--save_path")
    remove_parts(run.options.output.save_path)
    texts = run.session.texts([job.request for job in jobs])
    inputs = encode_all_inputs(run, jobs, failures)
    ready = [
        (job, text, inputs[job.label]) for job, text in zip(jobs, texts, strict=True) if job.label in inputs
    ]
    done = denoise_all(run, ready, failures) if ready else []
    if run.options.output.decodes and done:
        decode_all(run, done, failures)
    if done and run.predicted is not None and run.session.device.type == "cuda":
        most = max(run.predicted.most, run.session.most_beside)
        logger.info(comparison(most, torch.cuda.max_memory_allocated(run.session.device)))


def encode_all_inputs(
    run: Run, jobs: Sequence[Job], failures: Failures
) -> Mapping[str, Mapping[int, Conditions]]:
    """The media conditions of each job by its label; a job that failed is left out."""
    inputs: dict[str, Mapping[int, Conditions]] = {}
    with_media = [job for job in jobs if run.family.needs_media(job.request)]
    without = [job for job in jobs if not run.family.needs_media(job.request)]
    found = encode_inputs(run.family, NO_ENCODERS, [job.request for job in without])
    inputs.update(zip([job.label for job in without], found, strict=True))
    if with_media:
        with run.session.media(images=True, again=run.options.output.decodes) as encoders:
            for job in with_media:
                with failures.noted(job.label):
                    (inputs[job.label],) = encode_inputs(run.family, encoders, [job.request])
        run.session.drop_image_encoder()
    return inputs


Ready = tuple[Job, Mapping[int, EncodedPrompts], Mapping[int, Conditions]]


def denoise_all(run: Run, ready: Sequence[Ready], failures: Failures) -> list[Denoised]:
    """The latents of each job, each written as soon as it is there: a kill loses at most the one being
    made.
    """
    done = []
    with run.session.dit() as dit_at:
        for job, texts, inputs in ready:
            with failures.noted(job.label):
                describe(job.label, job.request)
                with own_stem(
                    run.options.output.save_path, output_stem(datetime.now(), job.request.seed)
                ) as stem:
                    with watched(run, job, stem) as (on_step, on_section):
                        latents = make_latents(
                            run.family,
                            dit_at,
                            job.request,
                            texts,
                            inputs,
                            run.session.device,
                            run.options.cpu_noise,
                            run.options.guidance,
                            on_step,
                            run.options.splits_guidance,
                            on_section,
                        ).to(CPU)
                    done.append(kept(run, job, latents, stem))
    return done


@contextmanager
def watched(run: Run, job: Job, stem: str) -> Iterator[tuple[OnStep, OnSection]]:
    """What the loop is to call while it makes a job: bars over the steps, and the preview of a video in
    sections.
    """
    request, output = job.request, run.options.output
    assert request.fps is not None
    needed = None if run.predicted is None else run.predicted.decoding
    with growing(run.session, output.save_path, stem, request.fps, needed) as video, Bars(request) as bars:

        def on_section(section: Section) -> None:
            bars.end()
            if section.made is not None and output.shows_progress:
                video.add(section.made)
            bars.begin(section)

        yield bars.advance, on_section


def kept(run: Run, job: Job, latents: Tensor, stem: str) -> Denoised:
    """Write the latents of a job, named `stem` if nothing else has taken that meanwhile.

    Its preview keeps the name.
    """
    preview = preview_path(run.options.output.save_path, stem)
    stem = free_stem(run.options.output.save_path, stem, [LATENT_SUFFIX])
    path = run.options.output.save_path / f"{stem}{LATENT_SUFFIX}"
    save_latents(path, latents, run.metadata(job.request))
    if run.options.output.keeps_latents:
        logger.info("Latents: %s", path)
    else:
        logger.info("Latents: %s, until they are decoded", path)
    return Denoised(job, latents, path, stem, preview)


def decode_all(run: Run, done: Sequence[Denoised], failures: Failures) -> None:
    """Turn latents into videos or images.

    What is no part of the result goes when it is written: latent files, previews.
    """
    output = run.options.output
    with run.session.media(images=False, again=False) as encoders:
        for one in done:
            with failures.noted(one.job.label), kept_where_it_fails(one.preview):
                request = one.job.request
                assert request.fps is not None
                chunks = run.family.decode(encoders, one.latents)
                save_pixels(output, one.stem, chunks, request.fps, run.metadata(request))
                remove_preview(one.preview)
                if not output.keeps_latents:
                    one.latent_path.unlink(missing_ok=True)


def decode_files(run: Run, paths: Sequence[Path]) -> None:
    """Decode latent files; what they say about themselves is passed on, with what they are decoded with."""
    saved = [checked_latents(run.family, path) for path in paths]
    options, output = run.options, run.options.output
    failures = Failures(strict=len(paths) == 1)
    make_folder(output.save_path, "--save_path")
    with run.session.media(images=False, again=False) as encoders:
        for path, one in zip(paths, saved, strict=True):
            with failures.noted(str(path)):
                fps = frame_rate(run, one)
                said = decoded_metadata(one.metadata, options.settings, options.decoding_options, fps)
                metadata = None if output.no_metadata else said
                with own_stem(
                    output.save_path, output_stem(datetime.now(), seed_in(one.metadata), path)
                ) as stem:
                    save_pixels(output, stem, run.family.decode(encoders, one.latents), fps, metadata)
    failures.raise_if_any(len(paths))


def checked_latents(family: Family, path: Path) -> SavedLatents:
    """A latent file of this family's latent space. Raises CheckpointError."""
    saved = load_latents(path)
    _, channels, frames, rows, columns = saved.latents.shape
    if channels != family.latent.channels:
        raise CheckpointError(
            f"--latent_path {path} has {channels} channels, {family.name} has {family.latent.channels}", path
        )
    step, vertical, horizontal = family.latent.stride
    size = columns * horizontal, rows * vertical, (frames - 1) * step + 1
    logger.info("%s: %d x %d (width x height), %d frame%s", path, *size, "" if size[2] == 1 else "s")
    return saved


def frame_rate(run: Run, saved: SavedLatents) -> float:
    """--fps where it differs from the model's, else what the latent file says, else the model's."""
    given, usual = run.options.request.fps, run.family.defaults.fps
    return given if given != usual else frame_rate_in(saved.metadata) or usual
