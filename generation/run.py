"""Modes of a generation script: one prompt, a prompt file, interactive, decode only, save a merged model."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blissful_tuner.guidance import needs
from blissful_tuner.metadata import as_tags, frame_rate_in, output_metadata, read_decoded_metadata, seed_in
from blissful_tuner.options import STRENGTH
from generation.asking import line_reader
from generation.dressing import dit_loader
from generation.growing import (
    grow_preview,
    name_preview_on_failure,
    preview_path,
    remove_parts,
    remove_preview,
)
from generation.memory import Peaks, plan_generation, resolve_options
from generation.options import GenerationOptions
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
from generation.preset import leave_out_missing
from generation.progress import Bars, Queue, show_end, show_start
from generation.prompt_lines import is_blank, parse_generation_line, read_generation_lines
from generation.request import prepare_line
from generation.sections import OnSection, make_latents
from generation.session import CPU, NO_ENCODERS, Session, encode_inputs, wanted_texts
from modules.atomic_write import make_folder
from modules.attention.attend import check_backend
from modules.bars import track
from modules.command import each_warning_once
from modules.compile import check_compilation
from modules.contract.data import Conditions, MediaEncoders
from modules.contract.family import Family
from modules.contract.generation import EncodedPrompts, Section
from modules.contract.loading import Placement
from modules.contract.prepared import Prepared
from modules.contract.steps import Watcher
from modules.devices import allow_fp16_accumulation, choose_device
from modules.errors import CheckpointError, UserError
from modules.offload.swap_plan import check_swap
from modules.planning.memory_plan import comparison, room_on, too_little
from networks.fitting import check_loras_fit
from networks.merge import LoraUse, lora_uses, merge_into_file

logger = logging.getLogger(__name__)

PROMPT_SIGN = "> "


@dataclass(frozen=True)
class GenerationJob:
    """One request to generate; `label` names it in messages ("line 3")."""

    label: str
    prepared: Prepared


@dataclass(frozen=True)
class Denoised:
    """Latents of a job (1 C F H W, on the CPU), also kept in a file until its pixels are written."""

    job: GenerationJob
    latents: Tensor
    latent_path: Path
    stem: str
    preview: Path  # of the video while it was made, if there is one


@dataclass
class Failures:
    """Jobs that failed, and why. strict: the first failure ends the run."""

    strict: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def note_errors(self, label: str, fatal: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Record an error of the block and go on, unless the error is `fatal`."""
        try:
            yield
        except Exception as error:
            if self.strict or isinstance(error, fatal):
                raise
            self.reasons[label] = f"{type(error).__name__}: {error}"
            is_known = isinstance(error, (UserError, torch.OutOfMemoryError))
            logger.error("%s is skipped. %s", label, self.reasons[label], exc_info=not is_known)

    def raise_if_any(self, total: int, where: str = "") -> None:
        """Raise UserError listing what failed. where: begins the message, as "prompts.txt: "."""
        if self.reasons:
            lines = "\n".join(f"  {label}: {reason}" for label, reason in self.reasons.items())
            raise UserError(f"{where}{len(self.reasons)} of {total} failed:\n{lines}")


@dataclass(frozen=True)
class GenerationRun:
    """Family, options and session that every mode works with."""

    family: Family
    options: GenerationOptions
    session: Session
    predicted: Peaks | None = None  # where it is known

    def metadata(self, prepared: Prepared) -> Mapping[str, str] | None:
        """Return the metadata of an output; None with --no_metadata."""
        if self.options.output.no_metadata:
            return None
        return output_metadata(
            prepared, self.family.metadata, self.loras, self.options.settings, self.session.device.type
        )

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Return the file name and the strength of each LoRA."""
        lora = self.options.lora
        return [
            (path.name, strength)
            for path, strength in zip(lora.lora_weight or (), lora.multipliers(), strict=True)
        ]

    def read_line(self, line: str, where: str = "the prompt line") -> Mapping[str, Any]:
        """Parse a prompt line. where: names it in warnings. Raises OptionError."""
        return parse_generation_line(line, self.options.line_options, where)


def generate(family: Family, options: GenerationOptions) -> None:
    """Run the mode that the options select.

    Raises UserError; with --from_file only after all lines that work are generated.
    """
    try:
        do(family, options)
    except torch.OutOfMemoryError as error:
        raise too_little(error, "Finished latents are kept: --latent_path decodes them.") from error


def do(family: Family, options: GenerationOptions) -> None:
    """Run the mode that the options select; `generate` turns a lack of memory into a UserError."""
    device = choose_device(options.device)
    options = leave_out_missing(family, options, device)
    if options.lycoris:
        logger.info("--lycoris is not needed: LoHa and LoKr files are recognised automatically")
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation(device)
    uses = lora_uses(options.lora, options.lora_patterns)  # read first, so that a wrong file shows at once
    if options.save_merged_model is not None:
        save_merged_model(family, uses, options.save_merged_model, device)
        return
    check_compilation(options.speed.compilation.choice, device)
    if options.speed.plan.is_asked:
        plan_generation(family, options, device)
        return
    options, predicted = resolve_options(family, options, device, room_on(device))
    session = Session(family, device, dit_loader(family, uses, device, options), keep=options.interactive)
    run = GenerationRun(family, options, session, predicted)
    if options.latent_path:
        decode_files(run, options.latent_path)
        return
    check_models(run)
    for file in family.dit_files:
        check_loras_fit(file, uses)
    if options.from_file is not None:
        make_from_file(run, options.from_file)
    elif options.interactive:
        converse(run)
    else:
        job = make_job(run, "the prompt", {})
        tell_unused_strength(options.request.strength, [job])
        make(run, [job], Failures(strict=True))


def tell_unused_strength(strength: float | None, jobs: Sequence[GenerationJob]) -> None:
    """Warn if --strength was given and no job starts from a video."""
    if strength not in (None, STRENGTH) and all(job.prepared.asked.video_path is None for job in jobs):
        logger.warning(
            "--strength %g is ignored because --video_path is not given: all steps are made from noise",
            strength,
        )


def check_models(run: GenerationRun) -> None:
    """Raise UserError if a model file that every prompt needs is missing or of another kind.

    Also raises it if the chosen attention is not available. Loads nothing.
    """
    placement = Placement(run.session.device, attention=run.options.speed.attention.choice)
    check_backend(
        placement.attention, placement.device, lambda: run.family.compute_dtype(placement), training=False
    )
    run.family.check_files(media=run.options.output.decodes)
    run.family.check_given_files()
    counts = run.family.block_counts()
    if counts:
        check_swap(run.family.dit, run.options.speed.swap.number, counts)


def save_merged_model(family: Family, uses: Sequence[LoraUse], path: Path, device: torch.device) -> None:
    """Write the network's file with the LoRAs merged in, tensor by tensor.

    The files of further experts get `_1`, `_2`, ... appended to the name.
    """
    for expert, file in enumerate(family.dit_files):
        target = path if expert == 0 else path.with_name(f"{path.stem}_{expert}{path.suffix}")
        merge_into_file(file, uses, target, device)


def make_from_file(run: GenerationRun, path: Path) -> None:
    """Generate every line of a prompt file, phase by phase, so that each network is loaded once."""
    lines = read_generation_lines(path)
    failures = Failures()
    jobs = []
    with each_warning_once():
        for number, line in lines:
            # a wrong model file is wrong for every line
            with failures.note_errors(label := f"line {number}", fatal=CheckpointError):
                jobs.append(make_job(run, label, run.read_line(line, f"{path}, {label}")))
    if jobs:
        tell_unused_strength(run.options.request.strength, jobs)
        make(run, jobs, failures)
    failures.raise_if_any(len(lines), f"{path}: ")


def converse(run: GenerationRun) -> None:
    """Read prompts from the console until the end of input. Ctrl-C cancels the current prompt."""
    ask = line_reader(PROMPT_SIGN)
    logger.info(
        "Enter a prompt and options such as --w 832 --h 480 --d 7. Ctrl-C cancels the current prompt, Ctrl-D "
        "quits."
    )
    while True:
        try:
            line = ask()
            if not is_blank(line):
                failures = Failures()
                with failures.note_errors("the prompt"):
                    make(run, [make_job(run, "the prompt", run.read_line(line))], failures)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            logger.warning("The prompt is cancelled. Ctrl-D quits.")


def make_job(run: GenerationRun, label: str, overrides: Mapping[str, Any]) -> GenerationJob:
    """Make the job of a prompt line, or of the command line alone.

    Loads no network; raises as `prepare_line`.
    """
    return GenerationJob(label, prepare_line(run.family, run.options, overrides))


def make(run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures) -> None:
    """Encode all texts, encode all images and videos, denoise all, decode all."""
    if any(run.family.needs_media(job.prepared) for job in jobs):
        run.family.check_files(media=True)  # before gigabytes are loaded
    if run.options.forces_split and any(needs(job.prepared, run.options.guidance).negative for job in jobs):
        logger.warning("--split_attn runs the guidance passes one after the other, as --split_uncond does.")
    start, requests = time.monotonic(), [job.prepared for job in jobs]
    make_folder(run.options.output.save_path, "--save_path")
    remove_parts(run.options.output.save_path)
    if not run.options.interactive:
        show_start(run.family, requests, run.loras, run.options.output.save_path, run.session.device)
    texts = run.session.texts([wanted_texts(job.prepared, run.options.guidance) for job in jobs])
    inputs = encode_all_inputs(run, jobs, failures)
    ready = [
        (job, text, inputs[job.label]) for job, text in zip(jobs, texts, strict=True) if job.label in inputs
    ]
    done = denoise_all(run, ready, failures) if ready else []
    paths = [one.latent_path for one in done if run.options.output.keeps_latents]
    if run.options.output.decodes and done:
        paths += decode_all(run, done, failures)
    if paths and not run.options.interactive:
        show_end(paths, time.monotonic() - start, run.session.device, len(failures.reasons))
    if done and run.predicted is not None and run.session.device.type == "cuda":
        most = max(run.predicted.most, run.session.most_beside)
        logger.info(comparison(most, torch.cuda.max_memory_allocated(run.session.device)))


def encode_all_inputs(
    run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures
) -> Mapping[str, Mapping[int, Conditions]]:
    """Return the media conditions of each job by its label, without the jobs that failed."""
    inputs: dict[str, Mapping[int, Conditions]] = {}
    with_media = [job for job in jobs if run.family.needs_media(job.prepared)]
    without = [job for job in jobs if not run.family.needs_media(job.prepared)]
    found = encode_inputs(run.family, NO_ENCODERS, [job.prepared for job in without])
    inputs.update(zip([job.label for job in without], found, strict=True))
    if with_media:
        with run.session.media(images=True, again=run.options.output.decodes) as encoders:
            for job in with_media:
                with failures.note_errors(job.label):
                    (inputs[job.label],) = encode_inputs(run.family, encoders, [job.prepared])
        run.session.drop_image_encoder()
    return inputs


Ready = tuple[GenerationJob, Mapping[int, EncodedPrompts], Mapping[int, Conditions]]


def denoise_all(run: GenerationRun, ready: Sequence[Ready], failures: Failures) -> list[Denoised]:
    """Return the latents of each job; each is written when it is done, so a kill loses at most one."""
    done = []
    queue = Queue([job.prepared for job, _, _ in ready])
    with run.session.dit() as dit_at:
        for job, texts, inputs in ready:
            with failures.note_errors(job.label):
                queue.begin(job.label)
                output = run.options.output
                prompt = job.prepared.asked.prompt if output.prompt_in_name else ""
                name = output_stem(datetime.now(), job.prepared.seed, prompt=prompt)
                with own_stem(output.save_path, name) as stem:
                    with watch(run, job, stem) as (watcher, on_section):
                        latents = make_latents(
                            run.family,
                            dit_at,
                            job.prepared,
                            texts,
                            inputs,
                            run.session.device,
                            run.options.cpu_noise,
                            run.options.guidance,
                            [watcher],
                            run.options.splits_guidance,
                            on_section,
                        ).to(CPU)
                    done.append(keep_latents(run, job, latents, stem))
    return done


@contextmanager
def watch(run: GenerationRun, job: GenerationJob, stem: str) -> Iterator[tuple[Watcher, OnSection]]:
    """Yield the callbacks for one job: progress bars over the steps, previews of a video in sections."""
    prepared, output = job.prepared, run.options.output
    needed = None if run.predicted is None else run.predicted.decoding
    tags = as_tags(run.metadata(prepared) or {})
    with (
        grow_preview(run.session, output.save_path, stem, prepared.fps, needed, tags) as video,
        Bars(prepared.num_steps) as bars,
    ):

        def on_section(section: Section) -> None:
            bars.end()
            if section.made is not None and output.shows_progress:
                video.add(section.made)
            bars.begin(section)

        yield bars.advance, on_section


def keep_latents(run: GenerationRun, job: GenerationJob, latents: Tensor, stem: str) -> Denoised:
    """Write the latents of a job, named `stem` if no other output has taken that name meanwhile.

    The preview keeps its name.
    """
    preview = preview_path(run.options.output.save_path, stem)
    stem = free_stem(run.options.output.save_path, stem, [LATENT_SUFFIX])
    path = run.options.output.save_path / f"{stem}{LATENT_SUFFIX}"
    save_latents(path, latents, run.metadata(job.prepared))
    if run.options.output.keeps_latents:
        logger.info("Latents: %s", path)
    else:
        logger.info("Latents: %s, kept until they are decoded", path)
    return Denoised(job, latents, path, stem, preview)


def decode_all(run: GenerationRun, done: Sequence[Denoised], failures: Failures) -> list[Path]:
    """Turn latents into videos or images and return their paths.

    Latent files and previews that are not part of the result are then removed.
    """
    output, paths = run.options.output, []
    with run.session.media(images=False, again=False) as encoders:
        for one in done:
            with failures.note_errors(one.job.label), name_preview_on_failure(one.preview):
                prepared = one.job.prepared
                chunks = decode(run.family, encoders, one.latents)
                paths.append(save_pixels(output, one.stem, chunks, prepared.fps, run.metadata(prepared)))
                if len(done) > 1 or run.options.interactive:  # else the last box says it
                    logger.info("%s: %s", one.job.label, paths[-1])
                remove_preview(one.preview)
                if not output.keeps_latents:
                    one.latent_path.unlink(missing_ok=True)
    return paths


def decode(family: Family, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
    """Decode latents (1 C F h w) to chunks of pixels 1 3 F H W, with a bar over the frames."""
    frames = (latents.shape[2] - 1) * family.latent.stride[0] + 1
    chunks = family.decode(encoders, latents)
    return track(chunks, "Decoding", frames, lambda chunk: chunk.shape[2], "frame")


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; their metadata are passed on, with the settings of this decoding."""
    saved = [check_latents(run.family, path) for path in paths]
    options, output = run.options, run.options.output
    failures = Failures(strict=len(paths) == 1)
    start, results = time.monotonic(), []
    make_folder(output.save_path, "--save_path")
    with run.session.media(images=False, again=False) as encoders:
        for path, one in zip(paths, saved, strict=True):
            with failures.note_errors(str(path)):
                fps = frame_rate(run, one)
                said = read_decoded_metadata(one.metadata, options.settings, options.decoding_options, fps)
                metadata = None if output.no_metadata else said
                with own_stem(
                    output.save_path, output_stem(datetime.now(), seed_in(one.metadata), path)
                ) as stem:
                    chunks = decode(run.family, encoders, one.latents)
                    results.append(save_pixels(output, stem, chunks, fps, metadata))
                    if len(paths) > 1:
                        logger.info("%s: %s", path, results[-1])
    if results:
        show_end(results, time.monotonic() - start, run.session.device, len(failures.reasons))
    failures.raise_if_any(len(paths))


def check_latents(family: Family, path: Path) -> SavedLatents:
    """Load a latent file. Raises CheckpointError if it is not of this family's latent space."""
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


def frame_rate(run: GenerationRun, saved: SavedLatents) -> float:
    """Return --fps if it differs from the model's, else the latent file's rate, else the model's."""
    given, usual = run.options.request.fps, run.family.defaults.fps
    return given if given != usual else frame_rate_in(saved.metadata) or usual
