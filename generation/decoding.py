"""Decode latent files to videos and pictures, without a transformer."""

import logging
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from blissful_tuner.metadata import frame_rate_in, read_decoded_metadata, seed_in
from generation.making import GenerationRun, decode, make_tracks
from generation.outputs import output_stem, own_stem, save_pixels
from generation.progress import show_end
from modules.atomic_write import make_folder
from modules.checkpoints.model_files import SavedLatents, load_latents
from modules.contract.family import Family, hears_sound
from modules.devices import Failures
from modules.errors import CheckpointError

logger = logging.getLogger(__name__)


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; their metadata are passed on, with the settings of this decoding."""
    saved = [check_latents(run.family, path) for path in paths]
    if run.post is not None:
        for path, one in zip(paths, saved, strict=True):
            run.post.check_length(
                (one.latents.shape[2] - 1) * run.family.latent.stride[0] + 1, f"--latent_path {path}"
            )
    options, output = run.options, run.options.output
    failures = Failures(strict=len(paths) == 1)
    start, results = time.monotonic(), []
    make_folder(output.save_path, "--save_path")
    tracks = make_tracks(
        run, {str(path): one.sound for path, one in zip(paths, saved, strict=True)}, failures.note_errors
    )
    with run.session.media(images=False, again=False) as encoders:
        for path, one in zip(paths, saved, strict=True):
            if str(path) in failures.reasons:  # its sound
                continue
            with failures.note_errors(str(path)):
                fps, usual = options.request.fps, run.family.defaults.fps
                if fps == usual:  # --fps is not given
                    fps = frame_rate_in(one.metadata) or usual
                said = read_decoded_metadata(one.metadata, options.settings, options.decoding_options, fps)
                metadata = None if output.no_metadata else said
                with own_stem(
                    output.save_path, output_stem(datetime.now(), seed_in(one.metadata), path)
                ) as stem:
                    chunks, track = decode(run.family, encoders, one.latents), tracks.get(str(path))
                    results.append(save_pixels(output, stem, chunks, fps, metadata, run.post, track))
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
    if saved.sound is not None:
        _, channels, _, bands = saved.sound.shape
        fps, spec = family.defaults.fps, family.sound if hears_sound(family) else None
        shape = None if spec is None else spec.shape(frames, fps)
        if shape is None:
            logger.warning("--latent_path %s: its sound is left out because this model makes none", path)
        elif (shape[0], shape[2]) != (channels, bands):
            raise CheckpointError(
                f"--latent_path {path}: its sound has {channels} x {bands} values at a time, "
                f"{family.source.who} has {shape[0]} x {shape[2]}",
                path,
            )
    step, vertical, horizontal = family.latent.stride
    size = columns * horizontal, rows * vertical, (frames - 1) * step + 1
    logger.info("%s: %d x %d (width x height), %d frame%s", path, *size, "" if size[2] == 1 else "s")
    return saved
