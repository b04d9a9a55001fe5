"""Make the videos of one or more jobs: texts, images, denoising, pixels, each for all before the next."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blissful_tuner.guidance import has_batches
from blissful_tuner.latent_preview import preview_clip
from blissful_tuner.metadata import as_tags
from blissful_tuner.prompt_rewrite import rewrite_prompts
from generation.denoise import OnSection, make_latents
from generation.growing import grow_preview, preview_path
from generation.jobs import Denoised, GenerationJob, GenerationRun, check_made, decode_all
from generation.outputs import (
    LATENT_SUFFIX,
    free_stem,
    output_stem,
    own_stem,
    released_stem,
    save_latents,
    time_stem,
)
from generation.progress import Bars, Queue, show_end, show_start
from generation.request import prepare_line
from generation.request_options import OutputOptions
from generation.session import CPU, NO_ENCODERS, encode_inputs, needs_media, wanted_texts
from modules.atomic_write import make_folder
from modules.contract.data import Conditions
from modules.contract.steps import DitAt, EncodedPrompts, Section, Watcher
from modules.devices import Failures, free_memory
from modules.planning.memory_plan import comparison

logger = logging.getLogger(__name__)


def make_job(run: GenerationRun, label: str, overrides: Mapping[str, Any]) -> GenerationJob:
    """Make the job of a prompt line, or of the command line alone.

    Loads no network; raises as `prepare_line`, and OptionError for a picture that --post can do nothing with.
    """
    prepared = prepare_line(run.family, run.options, overrides)
    if run.post is not None:
        run.post.check_length(prepared.frames, label)
    return GenerationJob(label, prepared)


def make_outputs(run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures) -> Mapping[str, Path]:
    """Encode all texts, encode all images and videos, denoise all, decode all.

    Returns the finished videos and pictures by the labels of their jobs.
    """
    if any(needs_media(run.family, job.prepared) for job in jobs):
        run.family.check_files(media=True)  # before gigabytes are loaded
    if run.options.forces_split and any(has_batches(job.prepared, run.options.guidance) for job in jobs):
        logger.warning("--split_attn runs the guidance passes one after the other, as --split_uncond does.")
    start, jobs = time.monotonic(), rewrite_jobs(run, jobs)
    requests = [job.prepared for job in jobs]
    make_folder(run.options.output.save_path, "--save_path")
    if not run.options.interactive:
        show_start(run.family, requests, run.loras, run.options.output.save_path, run.session.device)
    texts = run.session.texts([wanted_texts(job.prepared, run.options.guidance) for job in jobs])
    inputs = encode_all_inputs(run, jobs, failures)
    ready = [
        (job, text, inputs[job.label]) for job, text in zip(jobs, texts, strict=True) if job.label in inputs
    ]
    done = list(denoise_all(run, ready, failures)) if ready else []
    paths = [one.latent_path for one in done if run.options.output.keeps_latents]
    made: Mapping[str, Path] = {}
    if done and run.options.output.decodes:
        made = decode_all(run, done, failures, are_named=len(done) > 1 or run.options.interactive)
    paths += made.values()
    if paths and not run.options.interactive:
        show_end(paths, time.monotonic() - start, run.session.device, len(failures.reasons))
    if done and run.predicted is not None and run.session.device.type == "cuda":
        most = max(run.predicted.most, run.session.most_beside)
        logger.info(comparison(most, torch.cuda.max_memory_allocated(run.session.device)))
    return made


def rewrite_jobs(run: GenerationRun, jobs: Sequence[GenerationJob]) -> Sequence[GenerationJob]:
    """Have --prompt_rewrite's model write the prompts anew; it is freed before anything else loads."""
    if run.rewriter is None:
        return jobs
    run.rewriter.load(run.session.device)
    try:
        return [replace(job, prepared=rewrite_prompts(job.prepared, run.rewriter)) for job in jobs]
    finally:
        if run.options.interactive:
            run.rewriter.load(CPU)  # it moves
        else:
            run.rewriter.free()
        free_memory(run.session.device)


def encode_all_inputs(
    run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures
) -> Mapping[str, Mapping[int, Conditions]]:
    """Return the media conditions of each job by its label, without the jobs that failed."""
    inputs: dict[str, Mapping[int, Conditions]] = {}
    with_media = [job for job in jobs if needs_media(run.family, job.prepared)]
    without = [job for job in jobs if not needs_media(run.family, job.prepared)]
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
Networks = Iterator[tuple[Sequence[Ready], DitAt]]  # jobs, and the networks that make them


def denoise_all(
    run: GenerationRun, ready: Sequence[Ready], failures: Failures, networks: Networks | None = None
) -> Iterator[Denoised]:
    """Yield the latents of each job; each is written when it is done, so a kill loses at most one.

    networks: with their jobs, in the order of `ready`; None: one network makes all.
    """
    queue = Queue([job.prepared for job, _, _ in ready])
    for of_network, dit_at in networks or _one_network(run, ready):
        for job, texts, inputs in of_network:
            with failures.note_errors(job.label):
                queue.begin(job.label)
                with _stem_of(run.options.output, job) as stem:
                    with watch(run, job, stem) as (watchers, on_section):
                        latents = make_latents(
                            run.family,
                            dit_at,
                            job.prepared,
                            texts,
                            inputs,
                            run.session.device,
                            run.options.cpu_noise,
                            run.options.guidance,
                            watchers,
                            run.options.splits_guidance,
                            on_section,
                        ).to(CPU)
                    check_made(latents)
                    done = keep_latents(run, job, latents, stem)
                yield done


def _one_network(run: GenerationRun, ready: Sequence[Ready]) -> Networks:
    with run.session.dit([job.prepared for job, _, _ in ready]) as dit_at:
        yield ready, dit_at


def _stem_of(output: OutputOptions, job: GenerationJob) -> AbstractContextManager[str]:
    """Return a block with the stem of a job's files, reserved unless the job names it."""
    if job.stem is not None:
        return nullcontext(job.stem)
    now, prompt, seed = datetime.now(), job.prepared.asked.prompt, job.prepared.seed
    stem = output_stem(now, seed, prompt=prompt if output.prompt_in_name else "")
    if output.naming:
        stem = released_stem(now, seed, prompt) if output.naming == "released" else time_stem(now)
    return own_stem(output.save_path, stem)


@contextmanager
def watch(run: GenerationRun, job: GenerationJob, stem: str) -> Iterator[tuple[list[Watcher], OnSection]]:
    """Yield the callbacks for one job: progress bars over the steps, previews of latents, and of a video in
    sections.
    """
    prepared, output = job.prepared, run.options.output
    needed = None if run.predicted is None else run.predicted.decoding
    shown_from = run.options.guidance.scaled_steps
    tags = as_tags(run.metadata_of(job) or {})
    hides = run.post is not None and run.post.hides
    with (
        grow_preview(run.session, output.save_path, stem, prepared.fps, needed, tags) as video,
        preview_clip(run.previews, prepared.fps, shown_from) as (watchers, preview_section),
        Bars(prepared.num_steps) as bars,
    ):

        def on_section(section: Section) -> None:
            bars.end()
            preview_section(section)
            if section.made is not None and output.shows_progress and not hides:
                video.add(section.made)
            elif section.made is None and section.count > 1 and output.shows_progress and hides:
                logger.info("There is no preview of the video: it would show what a tool of --post hides.")
            bars.begin(section)

        yield [bars.advance, *watchers], on_section


def keep_latents(run: GenerationRun, job: GenerationJob, latents: Tensor, stem: str) -> Denoised:
    """Write the latents of a job, named `stem` if no other output has taken that name meanwhile.

    The preview keeps its name.
    """
    preview = preview_path(run.options.output.save_path, stem)
    stem = free_stem(run.options.output.save_path, stem, [LATENT_SUFFIX])
    path = run.options.output.save_path / f"{stem}{LATENT_SUFFIX}"
    metadata = run.metadata_of(job)
    save_latents(path, latents, metadata)
    if run.options.output.keeps_latents:
        logger.info("Latents: %s", path)
    else:
        logger.info("Latents: %s, kept until they are decoded", path)
    return Denoised(job, latents, path, stem, preview, metadata)
