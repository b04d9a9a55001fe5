"""Write a generated audio track into a new video or a WAV file."""

import json
import os
import struct
import wave
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.atomic_write import atomic_path
from modules.media.opening import av

Track = tuple[NDArray[np.float32], int]  # samples C S in -1..1, and their rate per second
LOUDEST = 32767  # maximum of 16 bits


class TrackAudio:
    """Encodes a generated audio track to AAC, always up to the time that the new video has reached."""

    def __init__(self, track: Track, lasts: Callable[[], Fraction]) -> None:
        """Prepare to write; `lasts` returns the duration of all frames after the last one is written."""
        samples, self._rate = track
        self._samples = samples.clip(-1, 1)
        self._duration_seconds = lasts
        self._written = 0  # samples
        self._stream: Any = None

    def add_streams(self, target: Any, _: Any) -> None:
        """Add an AAC stream for the generated audio to the new file."""
        from modules.media.audio import add_aac_stream  # imported here, because few models generate audio

        self._stream = add_aac_stream(target, len(self._samples), self._rate)

    def write(self, target: Any, seconds: Fraction | None) -> None:
        """Encode the audio up to a time of the new file in seconds; None encodes the rest and flushes."""
        end = round((self._duration_seconds() if seconds is None else seconds) * self._rate)
        if end > self._written:
            new_samples = self._samples[:, self._written : end]
            # silence after the end of the samples
            new_samples = np.pad(new_samples, ((0, 0), (0, end - self._written - new_samples.shape[1])))
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(new_samples), format="fltp", layout=self._stream.layout.name
            )
            frame.sample_rate = self._rate
            frame.pts = self._written
            frame.time_base = Fraction(1, self._rate)
            self._written = end
            target.mux(self._stream.encode(frame))
        if seconds is None:
            target.mux(self._stream.encode(None))


def write_wav(path: Path, track: Track, tags: Mapping[str, str] | None = None) -> None:
    """Write a track as 16-bit WAV, completely or not at all.

    `tags` are stored as JSON in the file's comment, because WAV has only a few named fields.

    Raises:
        OutputError: If the file cannot be written.
    """
    samples, rate = track
    # samples: channels x time in -1..1; WAV interleaves the channels
    values = np.round(samples.clip(-1, 1).T * LOUDEST).astype("<i2")
    with atomic_path(path, values.nbytes) as temporary, temporary.open("wb+") as raw_file:
        with wave.open(raw_file, "wb") as wav_file:
            wav_file.setnchannels(values.shape[1])
            wav_file.setsampwidth(2)
            wav_file.setframerate(rate)
            wav_file.writeframes(values.tobytes())
        if tags:
            # the tags are a comment: a RIFF LIST chunk of type INFO at the end
            text = json.dumps(dict(tags)).encode("ascii") + b"\0"
            text += bytes(len(text) % 2)
            raw_file.seek(0, os.SEEK_END)
            raw_file.write(
                struct.pack("<4sI4s4sI", b"LIST", len(text) + 12, b"INFO", b"ICMT", len(text)) + text
            )
            size = raw_file.tell() - 8
            raw_file.seek(4)
            raw_file.write(struct.pack("<I", size))
