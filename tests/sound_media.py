"""Videos and sound files with clicks at known seconds."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

SIDE, LOUD = 32, 0.5
VIDEO_ENCODERS = {".mp4": "libx264", ".mkv": "libx264", ".ts": "libx264", ".avi": "mpeg4"}


@dataclass(frozen=True)
class Track:
    """One track of sound: silence but for a click at each of some seconds."""

    at: tuple[float, ...] = ()
    seconds: float = 2.0
    start: float = 0.0  # of the track, in the file; `at` counts from here
    rate: int = 48000
    layout: str = "stereo"
    codec: str = "aac"
    channel: int | None = None  # the only one that clicks; None: all
    loud: float = LOUD

    def samples(self) -> NDArray[np.float32]:
        """Return channels S."""
        row = np.zeros(round(self.seconds * self.rate), np.float32)
        width = self.rate // 200
        for second in self.at:
            place = round(second * self.rate)
            begin = max(0, place - width)
            row[begin : place + width] = self.loud * np.hanning(2 * width)[begin - place + width :]
        count = av.AudioLayout(self.layout).nb_channels
        rows = np.zeros((count, len(row)), np.float32)
        rows[slice(None) if self.channel is None else self.channel] = row
        return rows


def write_media(
    path: Path, *tracks: Track, frames: int = 50, fps: float = 25, first: Fraction = Fraction(0)
) -> Path:
    """Write a video whose frames are gray 4, 8, 12, ..., with tracks; of no frames: a sound file.

    first: second of the first picture.
    """
    with av.open(str(path), "w") as target:
        video: Any = None
        rate = Fraction(fps).limit_denominator(1001)
        if frames:
            video = target.add_stream(VIDEO_ENCODERS[path.suffix], rate=rate)
            video.width = video.height = SIDE
            video.pix_fmt = "yuv420p"
            video.time_base = 1 / rate
        streams = [target.add_stream(one.codec, rate=one.rate, layout=one.layout) for one in tracks]
        packets = []
        for number in range(frames):
            gray = np.full((SIDE, SIDE, 3), 4 * number % 256, np.uint8)
            image = av.VideoFrame.from_ndarray(gray)
            image.pts, image.time_base = number + round(first * rate), 1 / rate
            packets += video.encode(image)
        packets += video.encode(None) if frames else []
        for one, stream in zip(tracks, streams, strict=True):
            packets += _encoded(one, stream)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            target.mux(packet)
    return path


def _encoded(track: Track, stream: Any) -> list[Any]:
    packets = []
    samples = track.samples()
    wanted = stream.codec_context.format.name
    resampler = av.AudioResampler(format=wanted, layout=track.layout, rate=track.rate)
    for begin in range(0, samples.shape[1], 1024):
        part = np.ascontiguousarray(samples[:, begin : begin + 1024])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=track.layout)
        frame.sample_rate, frame.time_base = track.rate, Fraction(1, track.rate)
        frame.pts = begin + round(track.start * track.rate)
        for one in resampler.resample(frame):
            packets += stream.encode(one)
    return packets + stream.encode(None)


def clicks_in(samples: Any, minimum: float = 0.2) -> list[int]:
    """Return the places of the clicks in one channel, ascending: where it is loudest round each."""
    left, found = np.abs(np.asarray(samples, np.float32)).copy(), list[int]()
    while left.size and left.max() > minimum:
        place = int(left.argmax())
        found.append(place)
        left[max(0, place - 200) : place + 200] = 0
    return sorted(found)
