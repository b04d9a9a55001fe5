"""Generate the outputs of jobs in phases (prompts, input media, denoising, decoding), each for all jobs."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blissful_tuner.guidance import plan_steps
from blissful_tuner.metadata import as_tags
from blissful_tuner.video_to_video_options import USED_WITH, SourceOptions
from checkpoints.finite import is_finite
from generation import outputs
from generation.denoise import OnSection, make_latents
from generation.experts import list_expert_order
from generation.loaded_networks import (
    CPU,
    NO_ENCODERS,
    decode_tracks,
    encode_inputs,
    needs_media,
    select_prompts,
)
from generation.progress import (
    GrowingVideo,
    log_job_progress,
    name_preview_on_failure,
    remove_preview,
    show_end,
    show_start,
)
from generation.request import EncodedJob, GenerationJob, GenerationRun, JobsWithNetworks
from generation.script_options import LATENT_OUTPUTS, NOTHING, UNDECODED, OutputOptions
from modules.atomic_write import make_folder
from modules.bars import FRAMES, Bar, track
from modules.devices import Failures, free_memory
from modules.errors import UserError
from modules.media.tracks import Track
from protocols.data import Conditions, MediaEncoders
from protocols.family import Family, trains_audio
from protocols.inputs import SOURCES
from protocols.requests import Box
from protocols.steps import CompletedStep, Section, StepCallback
from runtime.planning.device_memory import comparison

if TYPE_CHECKING:  # it is loaded only if prompts are rewritten
    from blissful_tuner.prompt_rewrite import PromptRewriter

logger = logging.getLogger(__name__)

NOT_FINITE = (
    "The model produced NaN or infinite values, so nothing is written. Usual causes: --dit_dtype float16 "
    "(pass bfloat16), a LoRA whose training diverged, a strength or guidance that is far too high"
)


def warn_about_unused_sources(
    options: SourceOptions, typed: Collection[str], jobs: Sequence[GenerationJob]
) -> None:
    """Warn about video-to-video options on the command line that no job uses.

    Args:
        options: Options of the run.
        typed: Names of the options on the command line.
        jobs: Videos or images to generate.
    """
    used = {job.prepared.request.source.option for job in jobs if job.prepared.request.source is not None}
    for name, default in options.script_defaults.items():
        needed = USED_WITH.get(name, {*SOURCES})  # the sources with which this option has an effect
        is_given = name in typed or getattr(options, name) != default
        if is_given and not needed & used:
            sources = " or ".join(f"--{source}" for source in SOURCES if source in needed)
            logger.warning(
                "--%s %s is ignored because %s is not given", name, getattr(options, name), sources
            )


def make_outputs(run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures) -> Mapping[str, Path]:
    """Run all jobs phase by phase: encode all prompts, encode all media, denoise, then decode all latents.

    Returns:
        Label of the job -> path of the finished video or image.
    """
    options = run.options
    has_media = any(needs_media(run.family, job.prepared) for job in jobs)
    if has_media:
        run.family.check_files(media=True)  # a missing file is reported before gigabytes are loaded
    if options.speed.attention.split_attn or run.processes > 1:
        _warn_of_unbatched_passes(run, jobs)
    start = time.monotonic()
    if run.rewriter is not None:  # its chat model is freed before other networks are loaded
        jobs = _rewrite_prompts(run, run.rewriter, jobs)
    _prepare_output(run, jobs)
    denoised = _encode_and_denoise(run, jobs, failures, has_media)
    clips: Mapping[str, Path] = {}
    if denoised and options.output.output_type not in UNDECODED:
        run.on_phase("decoding")
        are_named = len(denoised) > 1 or options.interactive
        clips = decode_all(run, denoised, failures, are_named)
    if not options.interactive:
        # Log the paths of the written files, time and peak memory; nothing if no file was written
        seconds = time.monotonic() - start
        num_failed = len(failures.reasons)
        paths: list[Path] = []
        if run.options.output.output_type in LATENT_OUTPUTS:
            paths = [job.latent_path for job in denoised if job.latent_path is not None]
        paths += clips.values()
        if paths:
            show_end(paths, seconds, run.session.device, num_failed)
    if denoised and run.predicted is not None and run.session.device.type == "cuda":
        # Log a run's predicted and measured peak memory on a CUDA device
        predicted_bytes = max(run.predicted.maximum, run.session.dits.max_shared_bytes)
        logger.info(comparison(predicted_bytes, torch.cuda.max_memory_allocated(run.session.device)))
    return clips


def _prepare_output(run: GenerationRun, jobs: Sequence[GenerationJob]) -> None:
    """Create the output folder, warn about options that no job uses, and log what is generated."""
    options = run.options
    output = options.output
    writes_files = output.output_type != NOTHING
    if writes_files:
        make_folder(output.save_path, "--save_path")
    if not options.interactive or options.sheet.sheet is not None:
        warn_about_unused_sources(options.request.source, options.typed_options, jobs)
    if writes_files and not options.interactive:
        show_start(
            run.family,
            [job.prepared for job in jobs],
            loras=run.loras,
            folder=output.save_path,
            device=run.session.device,
        )


def _encode_and_denoise(
    run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures, has_media: bool
) -> list[GenerationJob]:
    """Encode all prompts and input media, then denoise; return the jobs with latents, without failed jobs."""
    # The encoded inputs are freed on return, to make room for decoding.
    run.on_phase("reading the prompt")
    encoded_texts = run.session.encode_texts(
        [select_prompts(job.prepared, run.options.guidance) for job in jobs]
    )
    if has_media:
        run.on_phase("reading the images")
    encoded_inputs = encode_all_inputs(run, jobs, failures)
    encoded_jobs = [
        EncodedJob(job, job_texts, encoded_inputs[job.label])
        for job, job_texts in zip(jobs, encoded_texts, strict=True)
        if job.label in encoded_inputs
    ]
    if not encoded_jobs:
        return []
    run.on_phase("loading the transformer")
    if any(encoded.job.lora_blocks is not None for encoded in encoded_jobs):
        from generation.switched_loras import group_by_blocks, load_for_groups  # only with such lines

        groups = group_by_blocks(run, encoded_jobs)
        encoded_jobs = [encoded for group in groups for encoded in group.jobs]
        return list(denoise_all(run, encoded_jobs, failures, load_for_groups(run, groups)))
    requests = [job.prepared for job, _, _ in encoded_jobs]
    with run.session.dits.phase(list_expert_order(run.family, requests)) as dit_at:
        return list(denoise_all(run, encoded_jobs, failures, [(encoded_jobs, dit_at)]))


def _warn_of_unbatched_passes(run: GenerationRun, jobs: Sequence[GenerationJob]) -> None:
    """Warn if guidance passes cannot be batched or shared between processes as requested."""
    options = run.options
    # --split_attn processes one sample at a time, which also splits the guidance passes
    forces_split = options.speed.attention.split_attn and not options.split_uncond
    plans = [
        plan
        for job in jobs
        for expert_plans in plan_steps(job.prepared, options.guidance)
        for plan in expert_plans
    ]
    if forces_split and any(plan.max_together > 1 for plan in plans):
        logger.warning("--split_attn runs the guidance passes one after the other as --split_uncond does")
    max_passes = max((len(plan.passes) for plan in plans), default=run.processes)
    if max_passes < run.processes:
        logger.warning(
            "%s: the largest number of passes in a step is %d, so %d processes are no faster than %d",
            options.speed.modes.divides_passes,
            max_passes,
            run.processes,
            max_passes,
        )


def _rewrite_prompts(
    run: GenerationRun, rewriter: "PromptRewriter", jobs: Sequence[GenerationJob]
) -> list[GenerationJob]:
    """Rewrite all prompts with the language model, and free its memory afterwards."""
    from blissful_tuner.prompt_rewrite import rewrite_prompts  # only with --prompt_rewrite

    device = run.session.device
    rewriter.load(device)
    try:
        return [replace(job, prepared=rewrite_prompts(job.prepared, rewriter)) for job in jobs]
    finally:
        if run.options.interactive:
            rewriter.load(CPU)  # moves the loaded model to the CPU until the next prompt
        else:
            rewriter.free()
        free_memory(device)


def encode_all_inputs(
    run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures
) -> Mapping[str, Mapping[int, Conditions]]:
    """Encode the input media of all jobs; return label -> section -> conditions, without failed jobs."""
    inputs: dict[str, Mapping[int, Conditions]] = {}
    with_media: list[GenerationJob] = []
    for job in jobs:
        if needs_media(run.family, job.prepared):
            with_media.append(job)
        else:  # its conditions need no encoder
            inputs[job.label] = encode_inputs(run.family, NO_ENCODERS, job.prepared)
    if with_media:
        # the VAE is needed again if the results are decoded
        needed_again = run.options.output.output_type not in UNDECODED
        with run.session.media(with_image_encoder=True, needed_again=needed_again) as encoders:
            for job in with_media:
                with failures.collect_errors(job.label, run.fatal):
                    inputs[job.label] = encode_inputs(run.family, encoders, job.prepared)
        run.session.drop_image_encoder()
    return inputs


def denoise_all(
    run: GenerationRun, encoded_jobs: Sequence[EncodedJob], failures: Failures, networks: JobsWithNetworks
) -> Iterator[GenerationJob]:
    """Denoise the jobs, write each job's latents, and yield the job with them.

    Latents are written immediately, so that a killed process loses at most one job.

    Args:
        run: The run.
        encoded_jobs: Jobs whose prompts and inputs are encoded.
        failures: Collects the errors of single files or lines.
        networks: Yields the jobs of `encoded_jobs` in groups, in the same order, each with the function that
            returns the network for a timestep.
    """
    output = run.options.output
    requests = [job.prepared for job, _, _ in encoded_jobs]
    start: float | None = None
    num_begun = 0
    for group, dit_at in networks:
        if start is None:
            start = time.monotonic()  # the first network is loaded by now, and its time is not counted
        for job, encoded_prompts, job_inputs in group:
            with failures.collect_errors(job.label, run.fatal):
                if len(requests) > 1:
                    log_job_progress(job.label, requests, num_begun, time.monotonic() - start)
                num_begun += 1
                with _reserve_stem(output, job) as stem:
                    # callbacks after each step and before each section, for progress and previews
                    with progress_callbacks(run, job, stem) as (watchers, on_section):
                        latents = make_latents(
                            run.family,
                            dit_at,
                            job.prepared,
                            encoded_prompts,
                            inputs=job_inputs,
                            device=run.session.device,
                            cpu_noise=run.options.cpu_noise,
                            guidance_options=run.options.guidance,
                            watchers=watchers,
                            split=run.options.splits_guidance,
                            on_section=on_section,
                            run=run.run_passes,
                        ).to(CPU)
                    if not bool(is_finite(latents)):
                        raise UserError(NOT_FINITE)
                    if output.output_type == NOTHING:  # of several processes only the first one writes
                        continue
                    denoised_job = _save_latents(run, job, latents, stem)
                yield denoised_job


def _reserve_stem(output: OutputOptions, job: GenerationJob) -> AbstractContextManager[str]:
    """Reserve a job's file name until its clip is saved; a name from the user or job is used unchanged."""
    begun = datetime.now()
    name = outputs.name_job(output, begun, job.prepared.seed, job.prepared.request.prompt)
    name += job.prepared.output_suffix
    stem = job.stem or Path(output.file_name).stem
    if stem or output.output_type == NOTHING:
        return nullcontext(stem)
    return outputs.reserve_stem(output.save_path, name)


def _save_latents(run: GenerationRun, job: GenerationJob, latents: Tensor, stem: str) -> GenerationJob:
    """Write a job's latents to a file; return the job with the latents and the file's path."""
    output = run.options.output
    preview = output.save_path / f"{stem}{outputs.PREVIEW_SUFFIX}"  # already written under the old stem
    metadata = job.metadata or run.metadata(job.prepared)
    # another program may have taken the stem in the meantime
    stem = outputs.free_stem(output.save_path, stem, [outputs.LATENT_SUFFIX])
    path = output.save_path / f"{stem}{outputs.LATENT_SUFFIX}"
    audio_video = job.prepared.audio_video_shapes  # of video and audio in one tensor; None without audio
    image, audio = (latents, None) if audio_video is None else audio_video.split(latents)
    outputs.save_latents(path, image, metadata, audio)
    until = "" if output.output_type in LATENT_OUTPUTS else ", kept until they are decoded"
    logger.info("Latents: %s%s", path, until)
    return replace(
        job,
        stem=stem,
        metadata=metadata,
        latent_path=path,
        preview=preview,
        latents=image,
        audio=audio,
    )


@contextmanager
def progress_callbacks(
    run: GenerationRun, job: GenerationJob, stem: str
) -> Iterator[tuple[list[StepCallback], OnSection]]:
    """Yield the callbacks of one job for each step and each section: progress bars and previews."""
    preview_path = run.options.output.save_path / f"{stem}{outputs.PREVIEW_SUFFIX}"
    with name_preview_on_failure(preview_path), ExitStack() as preview_stack, ExitStack() as bar_stack:
        watchers: list[StepCallback] = []
        preview_latents: OnSection | None = None
        if run.previews is not None:
            from blissful_tuner.latent_preview import preview_clip  # only with previews

            scaled_steps = run.options.guidance.scaled_steps
            watchers, preview_latents = preview_stack.enter_context(
                preview_clip(run.previews, job.prepared.fps, scaled_steps)
            )
        progress = _JobProgress(run, job, stem, bar_stack=bar_stack, preview_latents=preview_latents)
        yield [progress.advance, *watchers, *run.watchers], progress.begin_section


@dataclass
class _JobProgress:
    """Progress bars of one job, and the preview of its finished sections."""

    run: GenerationRun
    job: GenerationJob
    stem: str  # of the job's files
    bar_stack: ExitStack  # closes the current bar
    preview_latents: OnSection | None  # called with each section; None without latent previews
    bar: Bar | None = None  # progress of the current section's steps
    section_preview: "_SectionPreview | None" = None  # of a video in several sections

    def advance(self, step: CompletedStep) -> bool:
        """Advance the bar; in image editing, also save the mask of changed latents. False continues."""
        assert self.bar is not None, "a section begins before its steps"
        self.bar.update()
        output = self.run.options.output
        if step.section.edit_reference is not None and output.output_type != NOTHING:
            from generation.latent_masks import save_changes  # only for edited images

            save_changes(step, output.save_path, self.stem)
        return False

    def begin_section(self, section: Section) -> None:
        """Preview the finished sections, and start the progress bar of the next section."""
        self.bar_stack.close()
        if self.preview_latents is not None:
            self.preview_latents(section)
        if section.count > 1 or section.previous_piece is not None:
            if self.section_preview is None:
                path = self.run.options.output.save_path / f"{self.stem}{outputs.PREVIEW_SUFFIX}"
                self.section_preview = _SectionPreview(self.run, self.job, path)
            self.section_preview.add_previous(section)
        prepared = self.job.prepared
        stage = prepared.stages[section.stage] if prepared.stages else prepared
        self.bar = self.bar_stack.enter_context(Bar(stage.num_steps, section.label or "Denoising"))


@dataclass
class _SectionPreview:
    """Preview of a video that is generated in sections; each finished section is decoded and appended."""

    run: GenerationRun
    job: GenerationJob
    path: Path
    video: GrowingVideo | None = None  # None until the first section is finished

    def add_previous(self, section: Section) -> None:
        """Append the section before `section` to the preview, if there is one."""
        run = self.run
        # a tool of --post hides what must not be seen
        hides_content = run.post is not None and run.post.hides_content
        if not run.options.output.shows_progress:
            return
        if section.previous_piece is None:  # `section` is the first one
            if hides_content and section.count > 1:
                logger.info("There is no preview of the video: it would show what a tool of --post hides.")
            return
        if hides_content:
            return
        if self.video is None:  # the first section is done: begin the preview
            prepared = self.job.prepared
            tags = as_tags(self.job.metadata or run.metadata(prepared) or {})
            needed = None if run.predicted is None else run.predicted.decoding
            self.video = GrowingVideo(run.session, self.path, prepared.fps, needed_bytes=needed, tags=tags)
        self.video.add(section.previous_piece)


def decode_all(
    run: GenerationRun, denoised: Iterable[GenerationJob], failures: Failures, are_named: bool
) -> dict[str, Path]:
    """Decode latents to videos or images and write them; return their paths by label of the job.

    Afterwards each job's preview is removed, and its latent file unless --output_type keeps latents.

    Args:
        run: The run.
        denoised: Jobs with their latents.
        failures: Collects the errors of single files or lines.
        are_named: Whether to log each path.
    """
    output = run.options.output
    paths: dict[str, Path] = {}
    tracks: Mapping[str, Track] = {}
    # with --save_audio also for families without audio, to warn that there is none
    has_audio = run.family.abilities.trains_audio and trains_audio(run.family)  # the model and this run
    if has_audio or output.save_audio is not None:
        jobs_by_label = {job.label: job for job in denoised}
        # Decode the audio latents of each video; return the tracks by label. An error fails only its video.

        @contextmanager
        def collect_errors(label: str) -> Iterator[None]:
            with failures.collect_errors(label), keep_on_failure(jobs_by_label[label]):
                yield

        tracks = make_tracks(
            run,
            {label: job.audio for label, job in jobs_by_label.items() if not job.prepared.is_still},
            collect_errors,
        )
        # without jobs whose audio could not be decoded
        denoised = [job for job in jobs_by_label.values() if job.label not in failures.reasons]
    with run.session.media(with_image_encoder=False, needed_again=False) as encoders:
        for job in denoised:
            with failures.collect_errors(job.label), keep_on_failure(job):
                path = _decode_job(run, encoders, job, tracks.get(job.label))
                paths[job.label] = path
                if are_named:  # otherwise the final summary lists it
                    logger.info("%s: %s", job.label, path)
                if job.preview is not None and job.preview.exists():
                    remove_preview(job.preview)
                if job.latent_path is not None and output.output_type not in LATENT_OUTPUTS:
                    job.latent_path.unlink(missing_ok=True)
    return paths


def _decode_job(run: GenerationRun, encoders: MediaEncoders, job: GenerationJob, track: Track | None) -> Path:
    """Decode a job's latents, write the video or image, and return its path."""
    assert job.latents is not None, "it is denoised"
    pixels = decode(run.family, encoders, job.latents, job.prepared.visible_region)
    metadata, pixel_edit = job.metadata, job.prepared.edit
    if pixel_edit is not None:
        pixels = pixel_edit.apply(pixels)
    if pixel_edit is not None and metadata is not None:
        edit_metadata = {f"bt_{name}": value for name, value in pixel_edit.metadata.items()}
        metadata = {**metadata, **edit_metadata}
    return outputs.save_pixels(
        run.options.output,
        str(job.stem),
        pixels,
        fps=job.prepared.fps,
        metadata=metadata,
        post=run.post,
        track=track,
        latent=run.family.latent,
    )


@contextmanager
def keep_on_failure(job: GenerationJob) -> Iterator[None]:
    """Append to a UserError of the `with` block how to decode the saved latents; log a kept preview."""
    with name_preview_on_failure(job.preview):
        try:
            yield
        except UserError as error:
            remedy = f"the latents are kept. --latent_path {job.latent_path} decodes them."
            error.args = (f"{error}\n  Nothing is lost: {remedy}", *error.args[1:])
            raise


def make_tracks(
    run: GenerationRun,
    latents: Mapping[str, Tensor | None],
    collect_errors: Callable[[str], AbstractContextManager[object]],
) -> Mapping[str, Track]:
    """Decode the audio of the clips that are written with audio; return the tracks by label.

    Args:
        run: The run.
        latents: Audio latents in model space, 1 C T M, by label; None for clips without audio.
        collect_errors: Returns a context manager for a label that records errors of the clip.
    """
    audios = {label: audio for label, audio in latents.items() if audio is not None}
    output = run.options.output
    if not audios or not trains_audio(run.family):  # no clip has audio, or this run has none
        if output.save_audio is not None:
            logger.warning("--save_audio %s is ignored because no result has sound", output.save_audio)
        return {}
    if not output.writes_audio:
        logger.info("The sound is left out because PNG files have none: --save_audio wav writes it")
        return {}
    return decode_tracks(run.family, audios, run.session.device, collect_errors)


def decode(
    family: Family, encoders: MediaEncoders, latents: Tensor, visible_region: Box | None = None
) -> Iterator[Tensor]:
    """Decode latents to chunks of pixels, with a progress bar over the frames.

    The chunks are 1 3 F H W, or 1 4 F H W for a family whose pixels have an alpha channel.

    Args:
        family: The model family.
        encoders: The media encoders.
        latents: Latents, 1 C F h w.
        visible_region: Region to which the pixels are cropped; None for all pixels.

    Raises:
        UserError: If pixels are NaN or infinite.
    """
    chunks = family.decode(encoders, latents)
    frames = family.latent.count_frames(latents.shape[2])
    for pixels in track(chunks, "Decoding", frames, size=lambda chunk: chunk.shape[2], unit=FRAMES):
        if not bool(is_finite(pixels)):
            raise UserError(
                "The VAE produced NaN or infinite values from valid latents. Use --vae_dtype bfloat16 or "
                "float32"
            )
        yield pixels if visible_region is None else visible_region.of(pixels)
