"""Find and read the audio of clips, and say why a clip has none."""

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.frames import Span, file_rate, kept_rate
from dataset.sources.media_source import MediaSource
from modules.errors import MediaError
from modules.limits import MAX_FRAMES
from modules.media.decoding import is_animation
from modules.media.reading import Frame
from modules.media.samples import read_track, track_info
from protocols.data import AudioSpec

MAX_OPENED = 200  # clips per table whose headers are read; each takes a few milliseconds
SAME_RATE = 0.01  # relative difference of a clip's rate from source_fps at which its audio still fits


class NoAudio(MediaError):
    """Raised if a clip has no usable audio; the message gives the reason."""


def find_audio(source: MediaSource) -> Path:
    """Return the file that contains a clip's audio; it is downloaded if it is remote.

    The file need not have an audio track.

    Raises:
        NoAudio: If no file fits.
        MediaError: If a file is missing or unreadable.
    """
    table, path = source.table, source.path
    declared = table.buckets.declared_fps
    if source.audio is not None:
        file, origin = source.audio
        if origin is not None:
            from dataset.sources.downloads import check_media, download  # only for remote files

            download(origin.address, file, check=check_media)
        return file
    if table.source.audio_directory is not None:
        raise NoAudio(f"{path}: no file with its name in {table.source.audio_directory}")
    if source.precomputed is not None or path.is_dir() or is_animation(path):
        raise NoAudio(f"{path}: only video files have their own audio")
    rate = None if declared is None else file_rate(path)
    if declared is not None and rate is not None and abs(rate / declared - 1) > SAME_RATE:
        raise NoAudio(
            f"{path}: it has {rate:.4g} frames per second, but source_fps says {declared:g}: its audio would "
            'not fit the frames. Set source_fps = "auto"'
        )
    return path


@dataclass(frozen=True)
class SpanAudios:
    """The audio samples of each span of a clip, C S; silence, with its reason, if the clip has no audio."""

    samples: tuple[Tensor, ...]  # audio of each span, C S
    silence_reason: str | None = None  # why the samples are zeros; None: the clip has audio


def read_span_audios(local: MediaSource, spans: Sequence[Span], fps: float, spec: AudioSpec) -> SpanAudios:
    """Return the audio of spans of a clip, or silence if the clip has none.

    Args:
        local: The clip, with local files.
        spans: Spans of the clip.
        fps: Frame rate of the family.
        spec: Audio spec of the family.

    Raises:
        MediaError: If the clip has no audio although the table requires it, or a separate audio file has no
            track.
    """
    rate = kept_rate(local, fps)
    silence_reason = 'audio = "ignore"'
    if local.table.source.audio != IGNORE:
        try:
            return SpanAudios(tuple(read_audios(find_audio(local), spans, rate, spec)))
        except NoAudio as reason:
            if local.table.source.audio == REQUIRED:
                raise MediaError(f'{reason}; audio = "required" needs it') from None
            if local.audio is not None:
                raise MediaError(f"{reason}. Use another file, or remove it") from None
            silence_reason = str(reason)
    counts = [round(frames / rate * spec.rate) for _, frames in spans]
    return SpanAudios(tuple(torch.zeros(spec.channels, count) for count in counts), silence_reason)


def count_frames(path: Path, fps: float) -> int:
    """Return how many frames a clip as long as an audio file has.

    Raises:
        MediaError: If the file has no audio, does not state its duration, or is shorter than a frame.
    """
    info = track_info(path)
    if info is None or info.end is None:
        why = "it has no audio track" if info is None else "it is empty, or does not state its duration"
        raise MediaError(f"{path}: {why}. Convert it to WAV or FLAC, or remove it")
    count = int(info.end * Fraction(fps))
    if not 0 < count <= MAX_FRAMES:
        # a number above MAX_FRAMES comes from a wrong header
        error = "days long according to its header" if count > 0 else f"shorter than a frame, {1 / fps:.2g} s"
        raise MediaError(f"{path}: its audio is {error}. Remove it")
    return count


def black_frames(path: Path, fps: float) -> Iterator[tuple[Frame, int, float]]:
    """Yield black frames for an audio file, each with its index and its time in seconds."""
    black = np.zeros((64, 64, 3), np.uint8)
    return ((black, index, index / fps) for index in range(count_frames(path, fps)))


def list_silent(sources: Iterable[MediaSource], silent: Collection[str]) -> list[Path]:
    """Return the clips that have audio although none is cached.

    At most MAX_OPENED files are opened; unreadable files and files not on disk are skipped. `silent` contains
    the stems of clips without cached audio.
    """
    on_disk = (source for source in sources if source.stem in silent and not any(source.remote_or_packed))
    uncached = []
    for source in itertools.islice(on_disk, MAX_OPENED):
        with contextlib.suppress(MediaError, OSError):
            if not source.path.exists():
                continue
            if source.audio is not None:
                _, origin = source.audio
                if origin is not None:  # it would have to be downloaded
                    continue
            if track_info(find_audio(source)) is not None:
                uncached.append(source.path)
    return uncached


def read_audios(path: Path, spans: Sequence[Span], rate: float, spec: AudioSpec) -> list[Tensor]:
    """Read the audio of each span of a clip's kept frames: channels x samples.

    The track is decoded once.

    Args:
        path: File with the audio, from `find_audio`.
        spans: Spans of the clip.
        rate: Frames per second, from `kept_rate`.
        spec: Audio spec of the family, with the number of channels and the sample rate.

    Raises:
        NoAudio: If there is no audio track.
        MediaError: If the file cannot be read or its audio is damaged.
    """
    sample_ranges = []  # first sample of each span, and the one after its last
    for first_frame, num_frames in spans:
        start = round(first_frame / rate * spec.rate)
        sample_ranges.append((start, start + round(num_frames / rate * spec.rate)))
    offset = min(start for start, _ in sample_ranges)
    length = max(end for _, end in sample_ranges) - offset
    samples = read_track(path, Fraction(offset, spec.rate), length, rate=spec.rate, channels=spec.channels)
    if samples is None:
        raise NoAudio(f"{path}: it has no audio track")
    # copied, so that the samples between the spans are freed
    return [
        torch.from_numpy(samples[:, start - offset : end - offset].copy()) for start, end in sample_ranges
    ]
