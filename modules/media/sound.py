"""Encode sound anew for files that cannot hold it as it is."""

from collections.abc import Callable, Iterator
from typing import Any

# what FFmpeg's encoder takes
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by channels
BITS_PER_CHANNEL = 128_000  # a second; transparent to most ears


def add_aac(target: Any, source: Any) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Add an AAC stream to a file for the sound of `source`, a stream of another file.

    Returns it, and what turns packets of `source`, up to the empty last one, into packets to write.
    """
    rate = min(_AAC_RATES, key=lambda allowed: abs(allowed - source.codec_context.sample_rate))
    stream = target.add_stream("aac", rate=rate)
    # by name: raw sound in Matroska has only a number of channels
    channels = source.codec_context.channels
    stream.layout = _LAYOUTS.get(channels, "stereo")
    stream.bit_rate = BITS_PER_CHANNEL * min(channels, 8)

    def convert(packet: Any) -> Iterator[Any]:
        for frame in packet.decode():
            yield from stream.encode(frame)
        if not packet.size:
            yield from stream.encode(None)

    return stream, convert
