"""Take the sound of a part of a video into a new file, exact to the sample.

Sound is decoded and encoded anew (AAC): a packet of sound holds some 20 milliseconds and cannot be cut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from modules.media.companions import keep_proportions
from modules.media.decoding import time_origin
from modules.media.opening import av
from modules.media.samples import filled
from modules.media.sound import add_aac_stream


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
        context = sound.codec_context
        stream = add_aac_stream(target, context.channels, context.sample_rate)
        self._packets = self._encoded(sound.index, stream)

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
        section = self._section
        begin = section.start + time_origin(self._source)
        for samples in filled(section.path, index, begin, section.seconds, rate, layout, lenient=True):
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
            position += samples.shape[1]
            yield from stream.encode(frame)
        yield from stream.encode(None)
