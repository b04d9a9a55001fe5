"""Find and read the sound of clips, and say why a clip has none."""

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

MAX_OPENED = 200  # clips, of each table: headers of some milliseconds each
SAME_RATE = 0.01  # by how much the rate of a clip may differ from source_fps, so that its sound fits


class NoAudio(MediaError):
    """Raised if a clip has no audio that fits its frames; the text gives the reason."""


def find_audio(source: MediaSource) -> Path:
    """Return the file with the sound of a clip, downloaded if it is at an address.

    `source` has been fetched. The file may still have no track.

    Raises:
        NoSound: If no file fits.
        MediaError: If a file is missing or unreadable.
    """
    table, path = source.table, source.path
    declared = table.declared_fps
    if source.audio is not None:
        file, origin = source.audio
        if origin is not None:
            from dataset.sources.downloads import check_media, download  # only at addresses

            download(origin.address, file, check=check_media)
        return file
    if table.audio_directory is not None:
        raise NoAudio(f"{path}: no file of its name in {table.audio_directory}")
    if source.tensors is not None or path.is_dir() or is_animation(path):
        raise NoAudio(f"{path}: only video files have audio of their own")
    rate = None if declared is None else file_rate(path)
    if declared is not None and rate is not None and abs(rate / declared - 1) > SAME_RATE:
        raise NoAudio(
            f"{path}: it has {rate:.4g} frames a second, source_fps says {declared:g}: its sound would not "
            'fit the frames. Write source_fps = "auto"'
        )
    return path


@dataclass(frozen=True)
class SpanAudios:
    """The sound of spans of a clip."""

    samples: tuple[Tensor, ...]  # of each, C S
    silent: str | None = None  # why they are zeros


def audios_of(here: MediaSource, spans: Sequence[Span], fps: float, spec: AudioSpec) -> SpanAudios:
    """Return the audio of spans of a clip, or silence if the clip has none.

    `here` is the fetched source. `fps` is the frame rate of the family.

    Raises:
        MediaError: If a file that its list or folder names has no sound, or none is there and the table needs
            it.
    """
    rate = kept_rate(here, fps)
    silent = 'audio = "ignore"'
    if here.table.audio != IGNORE:
        try:
            return SpanAudios(tuple(read_audios(find_audio(here), spans, rate, spec)))
        except NoAudio as reason:
            if here.table.audio == REQUIRED:
                raise MediaError(f'{reason}; audio = "required" asks for it') from None
            if here.audio is not None:
                raise MediaError(f"{reason}. Give another file, or take it out") from None
            silent = str(reason)
    counts = [round(frames / rate * spec.rate) for _, frames in spans]
    return SpanAudios(tuple(torch.zeros(spec.channels, count) for count in counts), silent)


def count_frames(path: Path, fps: float) -> int:
    """Return the number of frames of a clip that is as long as an audio file.

    Raises:
        MediaError: If the file has no audio, does not state its duration, or is shorter than a frame.
    """
    info = track_info(path)
    if info is None or info.end is None:
        why = "it has no track of sound" if info is None else "it is empty, or does not say how long it is"
        raise MediaError(f"{path}: {why}. Convert it to WAV or FLAC, or take it out")
    count = int(info.end * Fraction(fps))
    if not 0 < count <= MAX_FRAMES:
        error = "days long, says its header" if count > 0 else f"shorter than a frame, {1 / fps:.2g} s"
        raise MediaError(f"{path}: its sound is {error}. Take it out")
    return count


def black_frames(path: Path, fps: float) -> Iterator[tuple[Frame, int, float]]:
    """Yield a black frame for each of `count_frames`, its number, and its second."""
    black = np.zeros((64, 64, 3), np.uint8)
    return ((black, number, number / fps) for number in range(count_frames(path, fps)))


def list_silent(sources: Iterable[MediaSource], silent: Collection[str]) -> list[Path]:
    """Return the clips that have audio although none is cached.

    `silent` are the stems of clips without cached audio. At most MAX_OPENED files are opened, none is
    downloaded, and unreadable ones are skipped.
    """
    local = (source for source in sources if source.stem in silent and not any(source.origins))
    unheard = []
    for source in itertools.islice(local, MAX_OPENED):
        with contextlib.suppress(MediaError, OSError):
            if not source.path.exists():
                continue
            _, origin = source.audio or (None, None)
            if origin is None and track_info(find_audio(source)) is not None:
                unheard.append(source.path)
    return unheard


def read_audios(path: Path, spans: Sequence[Span], rate: float, spec: AudioSpec) -> list[Tensor]:
    """Read the audio of spans of a clip's kept frames: channels S each, at `spec.rate` samples per second.

    The track is decoded once. `path` comes from `find_audio`, and `rate`, the frame rate, from `kept_rate`.

    Raises:
        NoAudio: If there is no audio track.
        MediaError: If the file cannot be read or its audio is damaged.
    """
    ranges = []  # of samples
    for first, num_frames in spans:
        start = round(first / rate * spec.rate)
        ranges.append((start, start + round(num_frames / rate * spec.rate)))
    begin = min(start for start, _ in ranges)
    length = max(end for _, end in ranges) - begin
    samples = read_track(
        path,
        Fraction(begin, spec.rate),
        length,
        rate=spec.rate,
        channels=spec.channels,
    )
    if samples is None:
        raise NoAudio(f"{path}: it has no track of sound")
    return [torch.from_numpy(samples[:, start - begin : end - begin].copy()) for start, end in ranges]
