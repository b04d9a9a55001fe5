"""Decode latent files (--latent_path) to videos and images."""

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from torch import Tensor

from blissful_tuner.metadata import (
    read_decoded_metadata,
    read_frame_rate,
    read_stored_seed,
    read_visible_region,
)
from blissful_tuner.video_to_video import check_latent_space
from checkpoints.model_files import SavedLatents, load_latents
from generation.making import decode, make_tracks
from generation.outputs import SUFFIXES, output_stem, reserve_stem, save_pixels
from generation.progress import show_end
from generation.request import GenerationRun
from modules.atomic_write import make_folder
from modules.devices import Failures
from modules.errors import CheckpointError
from modules.media.tracks import Track
from protocols.data import MediaEncoders
from protocols.family import Family, trains_audio
from protocols.requests import Box

logger = logging.getLogger(__name__)


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; outputs have the files' metadata and the settings of this decoding."""
    saved_latents = {path: check_latents(run.family, path) for path in paths}
    _check_lengths(run, saved_latents)
    failures = Failures(strict=len(paths) == 1)
    start = time.monotonic()
    make_folder(run.options.output.save_path, "--save_path")
    audios = {str(path): saved_latents[path].audio for path in paths}
    tracks = make_tracks(run, audios, failures.collect_errors)
    decoded: list[Path] = []
    with run.session.media(with_image_encoder=False, needed_again=False) as encoders:
        for path in paths:
            label = str(path)
            if label in failures.reasons:  # its audio could not be decoded
                continue
            with failures.collect_errors(label):
                video = _decode_file(run, encoders, path, saved=saved_latents[path], track=tracks.get(label))
                decoded.append(video)
                if len(paths) > 1:
                    logger.info("%s: %s", path, video)
    if decoded:
        show_end(decoded, time.monotonic() - start, run.session.device, len(failures.reasons))
    failures.raise_if_any(len(paths))


def _check_lengths(run: GenerationRun, files: Mapping[Path, SavedLatents]) -> None:
    """Raise OptionError if the number of frames does not suit --post or the suffix of --save_path."""
    latent = run.family.latent
    frames = {path: latent.count_frames(saved.latents.shape[2]) for path, saved in files.items()}
    if run.post is not None:
        for path, count in frames.items():
            run.post.check_length(count, f"--latent_path {path}")
    output = run.options.output
    if output.file_name:
        first_path = next(iter(files))
        output.check_file_name(frames[first_path])


def _decode_file(
    run: GenerationRun, encoders: MediaEncoders, path: Path, saved: SavedLatents, track: Track | None
) -> Path:
    """Decode one latent file and return the path of the result."""
    options = run.options
    output = options.output
    fps = options.request.fps
    default_fps = run.family.defaults.fps
    if fps in (None, default_fps):  # --fps is not given, so the file's own rate is used
        fps = read_frame_rate(saved.metadata) or default_fps
    metadata = read_decoded_metadata(saved.metadata, options.settings, options.decoding_options, fps)
    name = output_stem(datetime.now(), read_stored_seed(saved.metadata), path, start=output.name_start)
    # SUFFIXES[0] is the suffix of latents: the latent file being decoded may have this stem itself
    with reserve_stem(output.save_path, name, SUFFIXES[1:]) as stem:
        return save_pixels(
            output,
            stem,
            decode(run.family, encoders, saved.latents, _read_visible_region(run.family, path, saved)),
            fps=fps,
            metadata=None if output.no_metadata else metadata,
            post=run.post,
            track=track,
            latent=run.family.latent,
        )


def _read_visible_region(family: Family, path: Path, saved: SavedLatents) -> Box | None:
    """Return the region to crop decoded pixels to, if the file's metadata names one; None for all pixels."""
    box = read_visible_region(saved.metadata)
    if box is None:
        return None
    *_, rows, columns = saved.latents.shape
    _, row_stride, column_stride = family.latent.stride
    fits_in_height = 0 < box.height <= rows * row_stride - box.top
    fits_in_width = 0 < box.width <= columns * column_stride - box.left
    if not fits_in_height or not fits_in_width:
        raise CheckpointError(
            f"--latent_path {path}: its metadata names a region outside the image ({box.width} x "
            f"{box.height} pixels from {box.left}, {box.top}). Make the latents again",
            path,
        )
    return box


def check_latents(family: Family, path: Path) -> SavedLatents:
    """Load a latent file, and check that the model family can decode it.

    Raises:
        CheckpointError: If the latents are not from this family's latent space.
    """
    saved = load_latents(path)
    _, channels, latent_frames, rows, columns = saved.latents.shape
    if channels != family.latent.channels:
        raise CheckpointError(
            f"--latent_path {path} has {channels} channels, {family.source.model_label} has "
            f"{family.latent.channels}",
            path,
        )
    check_latent_space(
        saved, family.source, path, f"--latent_path {path}", "Decode them with the script of that model"
    )
    if saved.audio is not None:
        _check_audio(family, path, saved.audio, latent_frames)
    if not latent_frames:
        logger.info("%s: sound alone", path)
        return saved
    _, row_stride, column_stride = family.latent.stride
    frames = family.latent.count_frames(latent_frames)
    logger.info(
        "%s: %d x %d (width x height), %d frame%s",
        path,
        columns * column_stride,
        rows * row_stride,
        frames,
        "" if frames == 1 else "s",
    )
    return saved


def _check_audio(family: Family, path: Path, audio: Tensor, latent_frames: int) -> None:
    """Check the audio in a latent file; warn if the family generates no audio."""
    # audio: Audio latents, 1 C T M.
    fps = family.defaults.fps
    spec = family.audio if trains_audio(family) else None
    if spec is None:
        logger.warning("--latent_path %s: its sound is left out because this model makes none", path)
        return
    expected_shape = list(spec.shape(latent_frames, fps))
    shape = list(audio.shape[1:])
    for axes in (shape, expected_shape):
        del axes[spec.time_axis]  # the length may differ
    if shape != expected_shape:
        raise CheckpointError(
            f"--latent_path {path}: its sound has {' x '.join(map(str, shape))} values per time step, "
            f"{family.source.model_label} has {' x '.join(map(str, expected_shape))}",
            path,
        )
