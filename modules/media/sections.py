"""Take the sound of a part of a video into a new file, exact to the sample.

Sound is decoded and encoded anew (AAC): a packet of sound holds some 20 milliseconds and cannot be cut.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.media.companions import keep_proportions
from modules.media.decoding import time_origin
from modules.media.opening import av, open_container
from modules.media.sound import add_aac_stream

logger = getLogger(__name__)

EARLIER = 1  # seconds before a section at which reading begins: decoders need some packets to settle
ROUNDING = Fraction(1, 20)  # seconds; times of sound that are off by less are rounded, not gaps


@dataclass(frozen=True)
class VideoSection:
    """A part of a video; seconds count from the moment at which the file begins to play."""

    path: Path
    start: Fraction
    seconds: Fraction
    with_sound: bool = True


class SectionSound:
    """The sound of a section, encoded as far as the new video has grown."""

    def __init__(self, section: VideoSection, source: Any) -> None:
        """source: the opened file."""
        self._section, self._source = section, source
        self._packets: Iterator[Any] = iter(())
        self._waiting: Any = None

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags of the whole file say nothing of a section."""
        return {}

    def add_streams(self, target: Any, video: Any) -> None:
        """Add a stream of sound to the new file, if there is any. video: the stream of pictures."""
        main = self._source.streams.best("video")
        if main is not None:
            keep_proportions(self._section.path, main, video)
        sound = self._source.streams.best("audio")
        if sound is None or sound.codec_context is None or not self._section.with_sound:
            return
        self._packets = self._encoded(sound.index, add_aac_stream(target, sound))

    def write(self, target: Any, seconds: Fraction | None) -> None:
        """Write everything before the given second of the new file; None: the whole rest."""
        while True:
            if self._waiting is None:
                self._waiting = next(self._packets, None)
            if self._waiting is None:
                return
            if seconds is not None and self._waiting.dts * self._waiting.time_base > seconds:
                return
            target.mux(self._waiting)
            self._waiting = None

    def mux(self, target: Any, packet: Any) -> None:
        """Write a packet of the pictures."""
        target.mux(packet)

    def _encoded(self, index: int, stream: Any) -> Iterator[Any]:
        position, layout, rate = 0, stream.layout.name, stream.rate
        for samples in _filled(self._section, index, stream):
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
            position += samples.shape[1]
            yield from stream.encode(frame)
        yield from stream.encode(None)


def _filled(section: VideoSection, index: int, form: Any) -> Iterator[NDArray[np.float32]]:
    """Yield the samples (channels n) of a section, as many as it lasts: silence where there is no sound.

    form: the stream of sound whose rate and layout they get.
    """
    total = round(section.seconds * form.rate)
    position = 0
    for begin, samples in _decoded(section, index, form):
        off = begin - position
        if abs(off) < ROUNDING * form.rate and position > 0:
            begin = position
        if begin > position:
            gap = min(begin, total) - position
            yield np.zeros((samples.shape[0], gap), np.float32)
            position += gap
        part = samples[:, max(0, position - begin) :][:, : total - position]
        if part.shape[1]:
            yield np.ascontiguousarray(part)
            position += part.shape[1]
        if position >= total:
            return
    if position < total:
        yield np.zeros((form.layout.nb_channels, total - position), np.float32)


def _decoded(section: VideoSection, index: int, form: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield samples, and the number of the first one, counted from the beginning of the section."""
    for early in (True, False):
        with open_container(section.path) as container:
            stream = container.streams[index]
            begin = section.start + time_origin(container)
            if early and section.start > EARLIER:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int((begin - EARLIER) / stream.time_base), stream=stream)
            found = _resampled(section, container, stream, form, begin)
            first = next(found, None)
            if early and section.start > EARLIER and (first is None or first[0] > 0):
                continue  # a file that cannot be searched: read from its beginning
            if first is not None:
                yield first
                yield from found
            return


def _resampled(
    section: VideoSection, container: Any, stream: Any, form: Any, begin: Fraction
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    resampler = av.AudioResampler(format="fltp", layout=form.layout.name, rate=form.rate)
    expected: int | None = None
    try:
        for frame in container.decode(stream):
            if frame.pts is not None:
                time = frame.pts * (frame.time_base or stream.time_base) - begin
                expected = round(time * form.rate)
            frame.pts = None
            for part in resampler.resample(frame):
                yield expected or 0, np.asarray(part.to_ndarray(), np.float32)
                expected = (expected or 0) + part.samples
    except av.FFmpegError as error:
        logger.warning(
            "%s: its sound is damaged near %.1f s; the rest of the clip is silent (%s)",
            *(section.path, float(section.start), error.strerror),
        )
