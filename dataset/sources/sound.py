"""The sound of clips: which file has it, at which seconds their frames are, and why one has none."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from dataset.config_keys import AUTO
from dataset.sources.frames import Span, file_rate
from dataset.sources.media_source import MediaSource
from modules.contract.data import SoundSpec
from modules.errors import MediaError
from modules.media.decoding import is_animation
from modules.media.samples import read_track

SAME_RATE = 0.01  # by how much the rate of a clip may differ from source_fps, so that its sound fits


class NoSound(MediaError):
    """The clip has no sound that fits its frames; the text says why."""


def kept_rate(source: MediaSource, fps: float) -> float:
    """Return how many of the frames that are kept make a second. Only the header of a clip is read.

    source: fetched. fps: of the family, which frames are dropped to. Pictures, and folders of images, have
    that rate, too. Raises MediaError if a clip cannot be read.
    """
    table, stated = source.table, source.table.stated_fps
    fps = table.target_fps or fps
    if table.kind == "image" or table.source_fps == AUTO or source.tensors is not None:
        return fps
    if stated is not None:
        return min(stated, fps)
    return file_rate(source.path) or fps


def find_sound(source: MediaSource) -> Path:
    """Return the file that has the sound of a clip; it may turn out to have no track. One at an address is
    downloaded.

    source: fetched. Raises NoSound if there is none that fits, MediaError if a file is missing or unreadable.
    """
    table, path, stated = source.table, source.path, source.table.stated_fps
    if source.sound is not None:
        given, origin = source.sound
        if origin is not None:
            from dataset.sources.downloads import download

            download(origin.address, given)
        return given
    if table.audio_directory is not None:
        raise NoSound(f"{path}: no file of its name in {table.audio_directory}")
    if source.tensors is not None or path.is_dir() or is_animation(path):
        raise NoSound(f"{path}: only video files have sound of their own")
    rate = file_rate(path)
    if stated is not None and rate is not None and abs(rate / stated - 1) > SAME_RATE:
        raise NoSound(
            f"{path}: it has {rate:.4g} frames a second, source_fps says {stated:g}: its sound would not fit "
            'the frames. Write source_fps = "auto"'
        )
    return path


def read_sounds(path: Path, spans: Sequence[Span], rate: float, spec: SoundSpec) -> list[Tensor]:
    """Read the sound of spans of a clip's kept frames: channels S each, `spec.rate` samples a second.

    path: of `find_sound`. rate: as of `kept_rate`. The track is decoded once. Raises NoSound if
    there is no track, MediaError if the file cannot be read, or its sound is damaged.
    """
    places = [(round(first / rate * spec.rate), round(count / rate * spec.rate)) for first, count in spans]
    begin, end = min(place for place, _ in places), max(map(sum, places))
    samples = read_track(path, Fraction(begin, spec.rate), end - begin, spec.rate, spec.channels)
    if samples is None:
        raise NoSound(f"{path}: it has no track of sound")
    found = [samples[:, place - begin : place - begin + count] for place, count in places]
    return [torch.from_numpy(one.copy()) for one in found]
