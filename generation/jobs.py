"""Jobs of a run: those to do, and from latents, just made or saved, to videos and images."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from blissful_tuner.latent_preview import LatentPreviews, make_previews
from blissful_tuner.metadata import frame_rate_in, output_metadata, read_decoded_metadata, seed_in
from blissful_tuner.prompt_rewrite import PromptRewriter
from blissful_tuner.video_to_video_options import SourceOptions
from generation.dressing import loras_of
from generation.growing import name_preview_on_failure, remove_preview
from generation.memory import Peaks
from generation.options import GenerationOptions
from generation.outputs import FrameTools, output_stem, own_stem, save_pixels
from generation.progress import show_end
from generation.prompt_lines import parse_generation_line
from generation.session import Session
from modules.atomic_write import make_folder
from modules.bars import FRAMES, track
from modules.checkpoints.finite import is_finite
from modules.checkpoints.latents import SavedLatents, load_latents
from modules.contract.data import MediaEncoders
from modules.contract.family import Family
from modules.contract.requests import Prepared
from modules.errors import CheckpointError, UserError
from modules.failures import Failures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationJob:
    """One request to generate; `label` names it in messages ("line 3")."""

    label: str
    prepared: Prepared
    stem: str | None = None  # of its files; None: the time, the seed and what the options add
    metadata: Mapping[str, str] | None = None  # None: as the run says


@dataclass(frozen=True)
class Denoised:
    """Latents of a job (1 C F H W, on the CPU), also kept in a file until its pixels are written."""

    job: GenerationJob
    latents: Tensor
    latent_path: Path
    stem: str
    preview: Path  # of the video while it was made, if there is one
    metadata: Mapping[str, str] | None  # of all files of the job: None with --no_metadata


@dataclass(frozen=True)
class GenerationRun:
    """Family, options and session that every mode works with."""

    family: Family
    options: GenerationOptions
    session: Session
    predicted: Peaks | None = None  # where it is known
    rewriter: PromptRewriter | None = None
    previews: LatentPreviews | None = None
    post: FrameTools | None = None  # what decoded frames go through
    now: Callable[[], datetime] = field(default=lambda: datetime.now().astimezone())

    def with_previews(self) -> "GenerationRun":
        """Return the same with the previews that the options ask for. Loads a decoder of 20 MB for them."""
        session, options = self.session, self.options
        made = make_previews(
            options.preview,
            self.family.latent,
            options.output.save_path,
            session.device,
            session.dit_can_stay,
        )
        return replace(self, previews=made)

    def metadata_of(self, job: GenerationJob) -> Mapping[str, str] | None:
        """Return the metadata of a job's files; None with --no_metadata."""
        return job.metadata or self.metadata(job.prepared)

    def metadata(self, prepared: Prepared) -> Mapping[str, str] | None:
        """Return the metadata of an output; None with --no_metadata."""
        if self.options.output.no_metadata:
            return None
        return output_metadata(
            prepared,
            self.family.metadata,
            self.loras,
            self.options.settings,
            self.session.device.type,
            self.now(),
            self.family.experts,
        )

    @property
    def loras(self) -> dict[str, list[tuple[str, float]]]:
        """Return the file name and the strength of each LoRA, by expert as `loras_of` names them."""
        return {
            expert: [
                (path.name, strength)
                for path, strength in zip(lora.lora_weight or (), lora.multipliers(), strict=True)
            ]
            for expert, lora in loras_of(self.options).items()
        }

    def read_line(self, line: str, where: str = "the prompt line") -> Mapping[str, Any]:
        """Parse a prompt line. where: names it in warnings. Raises OptionError."""
        return parse_generation_line(line, self.options.line_options, where)


def tell_unused_sources(options: SourceOptions, jobs: Sequence[GenerationJob]) -> None:
    """Warn of options of video-to-video that no job uses."""
    used = {job.prepared.asked.source.option for job in jobs if job.prepared.asked.source is not None}
    for given, needed in options.unused(used).items():
        logger.warning("%s is ignored because %s is not given", given, needed)


def decode_all(
    run: GenerationRun, done: Iterable[Denoised], failures: Failures, are_named: bool
) -> dict[str, Path]:
    """Turn latents into videos or images and return their paths by the labels of their jobs.

    Latent files and previews that are not part of the result are then removed. are_named: log each path.
    """
    output = run.options.output
    paths: dict[str, Path] = {}
    with run.session.media(images=False, again=False) as encoders:
        for one in done:
            with (
                failures.note_errors(one.job.label),
                name_preview_on_failure(one.preview),
                name_latents_on_failure(one.latent_path),
            ):
                prepared = one.job.prepared
                chunks = decode(run.family, encoders, one.latents)
                path = save_pixels(output, one.stem, chunks, prepared.fps, one.metadata, run.post)
                paths[one.job.label] = path
                if are_named:  # else the last box says it
                    logger.info("%s: %s", one.job.label, path)
                remove_preview(one.preview)
                if not output.keeps_latents:
                    one.latent_path.unlink(missing_ok=True)
    return paths


@contextmanager
def name_latents_on_failure(path: Path) -> Iterator[None]:
    """Say in a UserError of the block that the latents are there, and how to decode them."""
    try:
        yield
    except UserError as error:
        said = f"{error}\n  Nothing is lost: the latents are kept. --latent_path {path} decodes them."
        error.args = (said, *error.args[1:])
        raise


def decode(family: Family, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
    """Decode latents (1 C F h w) to chunks of pixels 1 3 F H W, with a bar over the frames."""
    frames = frames_in(family, latents)
    chunks = map(check_pixels, family.decode(encoders, latents))
    return track(chunks, "Decoding", frames, lambda chunk: chunk.shape[2], FRAMES)


def check_pixels(pixels: Tensor) -> Tensor:
    """Return decoded pixels. Raises UserError if some are NaN or infinite."""
    if not bool(is_finite(pixels)):
        raise UserError(
            "The VAE made values that are NaN or infinite of good latents: nothing would be seen. Give "
            "--vae_dtype bfloat16 or float32"
        )
    return pixels


def check_made(latents: Tensor) -> None:
    """Raise UserError if latents that were just made are NaN or infinite."""
    if not bool(is_finite(latents)):
        raise UserError(
            "What the model made is NaN or infinite: nothing would be seen, and nothing is written. Usual "
            "causes: --dit_dtype float16 (give bfloat16), a LoRA whose training diverged, a strength or a "
            "guidance that is far too high"
        )


def frames_in(family: Family, latents: Tensor) -> int:
    """Return how many frames latents (1 C F h w) are decoded to."""
    return (latents.shape[2] - 1) * family.latent.stride[0] + 1


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; their metadata are passed on, with the settings of this decoding."""
    saved = [check_latents(run.family, path) for path in paths]
    if run.post is not None:
        for path, one in zip(paths, saved, strict=True):
            run.post.check_length(frames_in(run.family, one.latents), f"--latent_path {path}")
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
                    results.append(save_pixels(output, stem, chunks, fps, metadata, run.post))
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
            f"--latent_path {path} has {channels} channels, {family.source.who} has {family.latent.channels}",
            path,
        )
    step, vertical, horizontal = family.latent.stride
    size = columns * horizontal, rows * vertical, (frames - 1) * step + 1
    logger.info("%s: %d x %d (width x height), %d frame%s", path, *size, "" if size[2] == 1 else "s")
    return saved


def frame_rate(run: GenerationRun, saved: SavedLatents) -> float:
    """Return --fps if it differs from the model's, else the latent file's rate, else the model's."""
    given, usual = run.options.request.fps, run.family.defaults.fps
    return given if given != usual else frame_rate_in(saved.metadata) or usual
