"""Make the videos of jobs in phases (texts, images, denoising, pixels), each for all jobs before the next."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from blissful_tuner.guidance import plan_steps
from blissful_tuner.metadata import as_tags
from blissful_tuner.video_to_video_options import USED_WITH, SourceOptions
from generation import outputs
from generation.anchors import save_changes
from generation.denoise import OnSection, make_latents
from generation.experts import plan_turns
from generation.progress import (
    GrowingVideo,
    name_preview_on_failure,
    remove_preview,
    show_end,
    show_start,
    tell_turn,
)
from generation.request import GenerationJob, GenerationRun
from generation.script_options import LATENT_OUTPUTS, NOTHING, UNDECODED
from generation.session import (
    CPU,
    NO_ENCODERS,
    decode_tracks,
    encode_inputs,
    needs_media,
    wanted_texts,
)
from modules.atomic_write import make_folder
from modules.bars import FRAMES, Bar, track
from modules.checkpoints.finite import is_finite
from modules.contract.data import Conditions, MediaEncoders
from modules.contract.family import Family, hears_sound
from modules.contract.rules import SOURCES
from modules.contract.steps import DitAt, EncodedPrompts, Section, StepDone, Watcher
from modules.devices import Failures, free_memory
from modules.errors import UserError
from modules.installation import import_own
from modules.media.tracks import Track
from modules.planning.device_memory import comparison

logger = logging.getLogger(__name__)


def tell_unused_sources(options: SourceOptions, jobs: Sequence[GenerationJob]) -> None:
    """Warn of options of video-to-video that no job uses."""
    used = {job.prepared.asked.source.option for job in jobs if job.prepared.asked.source is not None}
    for name, usual in options.of_script.items():
        needed = USED_WITH.get(name, {*SOURCES})
        if getattr(options, name) != usual and not needed & used:
            others = " or ".join(f"--{source}" for source in SOURCES if source in needed)
            logger.warning("--%s %s is ignored because %s is not given", name, getattr(options, name), others)


def make_outputs(run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures) -> Mapping[str, Path]:
    """Encode all texts, encode all images and videos, denoise all, decode all.

    Returns the finished videos and pictures by the labels of their jobs.
    """
    options, session, output = run.options, run.session, run.options.output
    if any(needs_media(run.family, job.prepared) for job in jobs):
        run.family.check_files(media=True)  # before gigabytes are loaded
    # attention that takes one sample at a time forces what was not asked for
    forces_split = options.speed.attention.split_attn and not options.split_uncond
    if forces_split or run.processes > 1:
        plans = [plan for job in jobs for plan in chain(*plan_steps(job.prepared, options.guidance))]
        if forces_split and any(plan.most_together > 1 for plan in plans):
            logger.warning("--split_attn runs the guidance passes one after the other as --split_uncond does")
        most = max((len(plan.passes) for plan in plans), default=run.processes)
        if most < run.processes:
            logger.warning(
                "--cfg_parallel: the largest number of passes in a step is %d, which makes %d processes no "
                "faster than %d",
                *(most, run.processes, most),
            )
    start = time.monotonic()
    if run.rewriter is not None:  # freed before anything else loads
        run.rewriter.load(session.device)
        try:
            rewrite = import_own("blissful_tuner.prompt_rewrite").rewrite_prompts
            jobs = [replace(job, prepared=rewrite(job.prepared, run.rewriter)) for job in jobs]
        finally:
            if options.interactive:
                run.rewriter.load(CPU)  # it moves
            else:
                run.rewriter.free()
            free_memory(session.device)
    if output.output_type != NOTHING:
        make_folder(output.save_path, "--save_path")
    if not options.interactive or options.sheet.sheet is not None:
        tell_unused_sources(options.request.source, jobs)
    if output.output_type != NOTHING and not options.interactive:
        show_start(run.family, [job.prepared for job in jobs], run.loras, output.save_path, session.device)
    texts = session.texts([wanted_texts(job.prepared, options.guidance) for job in jobs])
    inputs = encode_all_inputs(run, jobs, failures)
    ready = [
        (job, text, inputs[job.label]) for job, text in zip(jobs, texts, strict=True) if job.label in inputs
    ]
    done: list[GenerationJob] = []
    if ready:
        turns = plan_turns(run.family, [job.prepared for job, _, _ in ready])
        with session.dits.phase(turns) as dit_at:
            done = list(denoise_all(run, ready, failures, [(ready, dit_at)]))
    paths: list[Path] = []
    if output.output_type in LATENT_OUTPUTS:
        paths = [one.latent_path for one in done if one.latent_path is not None]
    made: Mapping[str, Path] = {}
    if done and output.output_type not in UNDECODED:
        made = decode_all(run, done, failures, are_named=len(done) > 1 or options.interactive)
    paths += made.values()
    if paths and not options.interactive:
        show_end(paths, time.monotonic() - start, session.device, len(failures.reasons))
    if done and run.predicted is not None and session.device.type == "cuda":
        most = max(run.predicted.most, session.dits.most_beside)
        logger.info(comparison(most, torch.cuda.max_memory_allocated(session.device)))
    return made


def encode_all_inputs(
    run: GenerationRun, jobs: Sequence[GenerationJob], failures: Failures
) -> Mapping[str, Mapping[int, Conditions]]:
    """Return the media conditions of each job by its label, without the jobs that failed."""
    inputs, with_media = dict[str, Mapping[int, Conditions]](), []
    for job in jobs:
        if needs_media(run.family, job.prepared):
            with_media.append(job)
        else:
            inputs[job.label] = encode_inputs(run.family, NO_ENCODERS, job.prepared)
    if with_media:
        again = run.options.output.output_type not in UNDECODED
        with run.session.media(images=True, again=again) as encoders:
            for job in with_media:
                with failures.note_errors(job.label, run.fatal):
                    inputs[job.label] = encode_inputs(run.family, encoders, job.prepared)
        run.session.drop_image_encoder()
    return inputs


Ready = tuple[GenerationJob, Mapping[int, EncodedPrompts], Mapping[int, Conditions]]
Networks = Iterable[tuple[Sequence[Ready], DitAt]]  # jobs, and the networks that make them


def denoise_all(
    run: GenerationRun, ready: Sequence[Ready], failures: Failures, networks: Networks
) -> Iterator[GenerationJob]:
    """Yield each job with its latents. These are written at once, so that a kill loses at most one job.

    networks: yields groups of jobs with their network, in the order of `ready`.
    """
    output, requests = run.options.output, [job.prepared for job, _, _ in ready]
    start, begun = 0.0, 0
    for of_network, dit_at in networks:
        for job, texts, inputs in of_network:
            with failures.note_errors(job.label, run.fatal):
                start = start or time.monotonic()  # the first network is there
                if len(requests) > 1:
                    tell_turn(job.label, requests, begun, time.monotonic() - start)
                begun += 1
                now, seed, prompt = datetime.now(), job.prepared.seed, job.prepared.asked.prompt
                name = outputs.name_job(output, now, seed, prompt) + job.prepared.name_end
                named = job.stem or Path(output.file_name).stem
                is_named = bool(named) or output.output_type == NOTHING
                stem_of = nullcontext(named) if is_named else outputs.own_stem(output.save_path, name)
                with stem_of as stem:
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
                            run.run_passes,
                        ).to(CPU)
                    if not bool(is_finite(latents)):
                        raise UserError(
                            "What the model made is NaN or infinite: nothing would be seen, and nothing is "
                            "written. Usual causes: --dit_dtype float16 (give bfloat16), a LoRA whose "
                            "training diverged, a strength or a guidance that is far too high"
                        )
                    if output.output_type == NOTHING:
                        continue
                    preview = output.save_path / f"{stem}{outputs.PREVIEW_SUFFIX}"  # keeps its name
                    metadata = job.metadata or run.metadata(job.prepared)
                    stem = outputs.free_stem(
                        output.save_path, stem, [outputs.LATENT_SUFFIX]
                    )  # taken meanwhile, maybe
                    path = output.save_path / f"{stem}{outputs.LATENT_SUFFIX}"
                    joint = job.prepared.joint
                    picture, sound = (latents, None) if joint is None else joint.split(latents)
                    outputs.save_latents(path, picture, metadata, sound)
                    kept = "" if output.output_type in LATENT_OUTPUTS else ", kept until they are decoded"
                    logger.info("Latents: %s%s", path, kept)
                job = replace(job, stem=stem, metadata=metadata, latent_path=path, preview=preview)
                yield replace(job, latents=picture, sound=sound)


@contextmanager
def watch(run: GenerationRun, job: GenerationJob, stem: str) -> Iterator[tuple[list[Watcher], OnSection]]:
    """Yield the callbacks for one job: they show progress bars over the steps, previews of latents, and the
    growing preview of a video in sections.
    """
    prepared, output = job.prepared, run.options.output
    needed = None if run.predicted is None else run.predicted.decoding
    video: GrowingVideo | None = None
    hides = run.post is not None and run.post.hides
    path = output.save_path / f"{stem}{outputs.PREVIEW_SUFFIX}"
    with name_preview_on_failure(path), ExitStack() as opened, ExitStack() as bars:
        watchers: list[Watcher] = []
        show: list[OnSection] = []  # sections in latent previews
        if run.previews is not None:
            shown_from = run.options.guidance.scaled_steps
            shows = import_own("blissful_tuner.latent_preview").preview_clip
            watchers, on_made = opened.enter_context(shows(run.previews, prepared.fps, shown_from))
            show.append(on_made)
        bar: list[Bar] = []  # over the steps of each section

        def advance(done: StepDone) -> bool:
            bar[-1].update()
            if done.section.anchor is not None and output.output_type != NOTHING:
                save_changes(done, output.save_path, stem)
            return False

        def on_section(section: Section) -> None:
            nonlocal video
            bars.close()
            for each in show:
                each(section)
            if section.made is not None and output.shows_progress and not hides:
                if video is None:
                    tags = as_tags(job.metadata or run.metadata(prepared) or {})
                    video = GrowingVideo(run.session, path, prepared.fps, needed, tags)
                video.add(section.made)
            elif section.made is None and section.count > 1 and output.shows_progress and hides:
                logger.info("There is no preview of the video: it would show what a tool of --post hides.")
            now = prepared.stages[section.stage] if prepared.stages else prepared
            bar.append(bars.enter_context(Bar(now.num_steps, section.label or "Denoising")))

        yield [advance, *watchers], on_section


def decode_all(
    run: GenerationRun, done: Iterable[GenerationJob], failures: Failures, are_named: bool
) -> dict[str, Path]:
    """Turn latents into videos or images and return their paths by the labels of their jobs.

    Latent files and previews that are not part of the result are then removed. are_named: log each path.
    """
    output = run.options.output
    paths: dict[str, Path] = {}
    tracks: Mapping[str, Track] = {}
    if hears_sound(run.family):
        by_label = {one.label: one for one in done}
        done = by_label.values()

        @contextmanager
        def note(label: str) -> Iterator[None]:
            with failures.note_errors(label), keep_on_failure(by_label[label]):
                yield

        tracks = make_tracks(run, {label: one.sound for label, one in by_label.items()}, note)
        done = [one for one in done if one.label not in failures.reasons]
    with run.session.media(images=False, again=False) as encoders:
        for one in done:
            with failures.note_errors(one.label), keep_on_failure(one):
                assert one.latents is not None, "it is denoised"
                chunks, fps = decode(run.family, encoders, one.latents), one.prepared.fps
                heard = tracks.get(one.label)
                path = outputs.save_pixels(output, str(one.stem), chunks, fps, one.metadata, run.post, heard)
                paths[one.label] = path
                if are_named:  # else the last box lists it
                    logger.info("%s: %s", one.label, path)
                if one.preview is not None and one.preview.exists():
                    remove_preview(one.preview)
                if one.latent_path is not None and output.output_type not in LATENT_OUTPUTS:
                    one.latent_path.unlink(missing_ok=True)
    return paths


@contextmanager
def keep_on_failure(one: GenerationJob) -> Iterator[None]:
    """Add to an error of the block which files of the clip are kept."""
    with name_preview_on_failure(one.preview):
        try:
            yield
        except UserError as error:
            said = f"the latents are kept. --latent_path {one.latent_path} decodes them."
            error.args = (f"{error}\n  Nothing is lost: {said}", *error.args[1:])
            raise


def make_tracks(
    run: GenerationRun,
    latents: Mapping[str, Tensor | None],
    note: Callable[[str], AbstractContextManager[object]],
) -> Mapping[str, Track]:
    """Return the tracks of clips that are written with sound. latents, note: see `decode_tracks`."""
    heard = {label: one for label, one in latents.items() if one is not None}
    if not heard or not hears_sound(run.family):
        return {}
    if not run.options.output.writes_sound:
        logger.info("The sound is left out because PNG files have none: --save_audio wav writes it")
        return {}
    return decode_tracks(run.family, heard, run.session.device, note)


def decode(family: Family, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
    """Decode latents (1 C F h w) to chunks of pixels 1 3 F H W, with a bar over the frames.

    Raises UserError if some are NaN or infinite.
    """
    chunks = family.decode(encoders, latents)
    for pixels in track(
        chunks,
        "Decoding",
        (latents.shape[2] - 1) * family.latent.stride[0] + 1,
        lambda chunk: chunk.shape[2],
        FRAMES,
    ):
        if not bool(is_finite(pixels)):
            raise UserError(
                "The VAE made values that are NaN or infinite of good latents: nothing would be seen. Give "
                "--vae_dtype bfloat16 or float32"
            )
        yield pixels
