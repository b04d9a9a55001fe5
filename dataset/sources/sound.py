"""Find and read the sound of clips, and say why a clip has none."""

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.sources.frames import Span, file_rate
from dataset.sources.media_source import MediaSource
from modules.contract.data import SoundSpec
from modules.errors import MediaError
from modules.limits import MAX_FRAMES
from modules.media.decoding import is_animation
from modules.media.reading import Frame
from modules.media.samples import read_track, track_facts

MOST_ASKED = 200  # clips, of each table: headers of some milliseconds each
SAME_RATE = 0.01  # by how much the rate of a clip may differ from source_fps, so that its sound fits


class NoSound(MediaError):
    """The clip has no sound that fits its frames; the text says why."""


def find_sound(source: MediaSource) -> Path:
    """Return the file with the sound of a clip, downloaded if it is at an address. The file may still have no
    track.

    source: fetched. Raises NoSound if no file fits, MediaError if a file is missing or unreadable.
    """
    table, path, stated = source.table, source.path, source.table.stated_fps
    if source.sound is not None:
        given, origin = source.sound
        if origin is not None:
            from dataset.sources.downloads import check_media, download

            download(origin.address, given, check=check_media)
        return given
    if table.audio_directory is not None:
        raise NoSound(f"{path}: no file of its name in {table.audio_directory}")
    if source.tensors is not None or path.is_dir() or is_animation(path):
        raise NoSound(f"{path}: only video files have sound of their own")
    rate = None if stated is None else file_rate(path)
    if stated is not None and rate is not None and abs(rate / stated - 1) > SAME_RATE:
        raise NoSound(
            f"{path}: it has {rate:.4g} frames a second, source_fps says {stated:g}: its sound would not fit "
            'the frames. Write source_fps = "auto"'
        )
    return path


def count_frames(path: Path, fps: float) -> int:
    """Return how many frames a clip as long as a sound has. Raises MediaError if there is no sound, if it is
    shorter than a frame, or if the file does not state its length.
    """
    facts = track_facts(path)
    if facts is None or facts.end is None:
        why = "it has no track of sound" if facts is None else "it is empty, or does not say how long it is"
        raise MediaError(f"{path}: {why}. Convert it to WAV or FLAC, or take it out")
    count = int(facts.end * Fraction(fps))
    if not 0 < count <= MAX_FRAMES:
        what = "days long, says its header" if count > 0 else f"shorter than a frame, {1 / fps:.2g} s"
        raise MediaError(f"{path}: its sound is {what}. Take it out")
    return count


def black_frames(path: Path, fps: float) -> Iterator[tuple[Frame, int, float]]:
    """Yield a black frame for each of `count_frames`, its number, and its second."""
    black = np.zeros((64, 64, 3), np.uint8)
    return ((black, number, number / fps) for number in range(count_frames(path, fps)))


def list_unheard(sources: Iterable[MediaSource], silent: Collection[str]) -> list[Path]:
    """Return the clips that have sound although none is cached.

    silent: stems of clips without cached sound. At most MOST_ASKED files are opened, none is downloaded, and
    unreadable ones are skipped.
    """
    asked = (one for one in sources if one.stem in silent and not any(one.origins))
    found = []
    for source in itertools.islice(asked, MOST_ASKED):
        with contextlib.suppress(MediaError, OSError):
            if source.path.exists() and (source.sound is None or source.sound[1] is None):
                found += [source.path] if track_facts(find_sound(source)) is not None else []
    return found


def read_sounds(path: Path, spans: Sequence[Span], rate: float, spec: SoundSpec) -> list[Tensor]:
    """Read the sound of spans of a clip's kept frames: channels S each, `spec.rate` samples a second.

    path: from `find_sound`. rate: from `kept_rate`. The track is decoded once. Raises NoSound if there is no
    track, MediaError if the file cannot be read or its sound is damaged.
    """
    places = [(round(first / rate * spec.rate), round(count / rate * spec.rate)) for first, count in spans]
    begin, end = min(place for place, _ in places), max(map(sum, places))
    samples = read_track(path, Fraction(begin, spec.rate), end - begin, spec.rate, spec.channels)
    if samples is None:
        raise NoSound(f"{path}: it has no track of sound")
    found = [samples[:, place - begin : place - begin + count] for place, count in places]
    return [torch.from_numpy(one.copy()) for one in found]
