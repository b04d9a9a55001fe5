"""Read the audio of a section of a file, decoded and resampled; missing audio is silence."""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.errors import MediaError
from modules.media.decoding import declared_end, time_origin
from modules.media.opening import AUDIO_FORMATS, av, is_cover, open_container, reading

logger = getLogger(__name__)

Samples = NDArray[np.float32]  # channels S

SEEK_MARGIN = 1  # seconds of audio decoded before a section, because decoders need some packets
MAX_ROUNDING = Fraction(1, 20)  # seconds; smaller time differences are rounding, not gaps
MIN_REFERENCE_SECONDS = 0.1  # seconds of a reference
LAYOUTS = {1: "mono", 2: "stereo"}  # channels -> FFmpeg layout of the result
# raw streams: after a seek, FFmpeg guesses their times from the bit rate
_UNTIMED_FORMATS = frozenset({"mp3", "aac", "ac3", "eac3", "dts", "truehd", "amr"})


@dataclass(frozen=True)
class TrackInfo:
    """Facts about a file's audio from its header; times are relative to the first frame of the video."""

    rate: int  # samples in a second
    channels: int
    start: Fraction
    end: Fraction | None  # None if unknown
    tracks: int  # number of tracks; FFmpeg selects the default or best one


def track_info(path: Path) -> TrackInfo | None:
    """Return information about the default or the best audio track; None if there is no track.

    Raises:
        MediaError: If the file cannot be opened.
    """
    with reading(path), open_container(path, AUDIO_FORMATS) as container:
        stream = _find_audio_stream(container)
        if stream is None:
            return None
        origin = _find_origin(container)
        start = Fraction(0) if stream.start_time is None else stream.start_time * stream.time_base - origin
        end = (
            start + stream.duration * stream.time_base if stream.duration else declared_end(container, stream)
        )
        if end is None and container.duration:
            end = start + Fraction(container.duration, 1_000_000)
        return TrackInfo(
            rate=stream.codec_context.sample_rate,
            channels=stream.codec_context.channels,
            start=start,
            end=end,
            tracks=len(container.streams.audio),
        )


def read_track(path: Path, start: Fraction, count: int, rate: int, channels: int) -> Samples | None:
    """Read `count` samples of a file's audio at `rate`: channels S, float32; None without an audio track.

    `start` is in seconds from the first frame of the file, or from the first sample of a file without video.
    Before the audio begins, after it ends and in its gaps, samples are 0. A single channel is copied to all
    channels; several channels are mixed as FFmpeg does; loudness is not changed. Of several tracks, FFmpeg
    selects the default one, or the best.

    Raises:
        MediaError: If the file cannot be read, or its audio is damaged.
    """
    with reading(path):
        with open_container(path, AUDIO_FORMATS) as container:
            stream = _find_audio_stream(container)
            if stream is None:
                return None
            index = stream.index
            begin = start + _find_origin(container)
            channels_read = 1 if stream.codec_context.channels == 1 else channels
        track = np.zeros((channels_read, count), np.float32)
        position = 0
        seconds = Fraction(count, rate)
        layout = LAYOUTS[channels_read]
        try:
            for samples in read_filled(path, index, begin, seconds, rate=rate, layout=layout):
                track[:, position : position + samples.shape[1]] = samples
                position += samples.shape[1]
        except av.FFmpegError as error:
            at = float(start + Fraction(position, rate))
            raise MediaError(
                f"{path}: its sound is damaged near {at:.1f} s ({error.strerror}). Fetch or convert the file "
                "again, or omit its sound"
            ) from error
    return track if channels_read == channels else np.broadcast_to(track, (channels, count))


@dataclass(frozen=True)
class TrackBeginning:
    """The first samples of a file's audio, channels S float32, and their sampling rate."""

    samples: Samples
    rate: int


def read_beginning(
    path: Path, seconds: float, channels: int, rate: int | None = None
) -> TrackBeginning | None:
    """Read at most `seconds` of a file's audio, without silence after its end.

    The audio is resampled to `rate` samples per second; None keeps its own rate. A single channel is kept;
    several channels are mixed to `channels`. The result begins with the file's first frame, or with its first
    sample if it has no video. Returns None if there is no track. Raises MediaError if the file cannot be
    read, or if its audio is damaged.
    """
    with reading(path):
        with open_container(path, AUDIO_FORMATS) as container:
            stream = _find_audio_stream(container)
            if stream is None:
                return None
            index = stream.index
            begin = _find_origin(container)
            rate = rate or int(stream.codec_context.sample_rate)
            layout = LAYOUTS[1 if stream.codec_context.channels == 1 else channels]
        maximum = int(seconds * rate)
        blocks = []
        position = 0
        try:
            for first, samples in _decode_blocks(path, index, begin, rate=rate, layout=layout, lenient=False):
                if first > position:  # a gap
                    blocks.append(np.zeros((samples.shape[0], first - position), np.float32))
                    position = first
                blocks.append(samples[:, max(0, position - first) :])
                position += blocks[-1].shape[1]
                if position >= maximum:
                    break
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: its sound is damaged near {position / rate:.1f} s ({error.strerror}). Fetch or "
                "convert the file again, or omit its sound"
            ) from error
    if not blocks:
        return None
    return TrackBeginning(np.ascontiguousarray(np.concatenate(blocks, axis=1)[:, :maximum]), rate)


def read_reference(path: Path, seconds: float, rate: int, channels: int) -> Samples:
    """Read at most `seconds` from the beginning of a file's audio as a reference: channels S.

    Args:
        path: Path of the file.
        seconds: Length of the clip to generate with it.
        rate: Samples per second of the result.
        channels: Number of channels of the result.

    Raises:
        MediaError: If there is no audio, if it is shorter than both MIN_REFERENCE_SECONDS and `seconds`, or
            if it is damaged.
    """
    beginning = read_beginning(path, seconds, channels, rate)
    count = 0 if beginning is None else beginning.samples.shape[1]
    if beginning is None or count < int(min(MIN_REFERENCE_SECONDS, seconds) * rate):
        raise MediaError(
            f"{path}: it has {count / rate:.2g} s of sound, too little for a reference. Pass a file with at "
            f"least {MIN_REFERENCE_SECONDS} s"
        )
    return np.broadcast_to(beginning.samples, (channels, count)).copy()  # a single channel is copied to all


def _find_audio_stream(container: Any) -> Any | None:
    stream = container.streams.best("audio")
    return None if stream is None or stream.codec_context is None else stream


def _find_origin(container: Any) -> Fraction:
    """Return the time in seconds of a file's first image, or of its first sound if it has no images."""
    main = container.streams.best("video")
    if main is None or is_cover(main) or main.start_time is None:
        return time_origin(container)
    return Fraction(main.start_time * main.time_base)


def read_filled(
    path: Path, index: int, begin: Fraction, seconds: Fraction, rate: int, layout: str, lenient: bool = False
) -> Iterator[Samples]:
    """Yield `seconds` of a stream's samples, starting at `begin` in the file's timestamps.

    Gaps are filled with silence.

    Args:
        path: The file.
        index: Index of the stream.
        begin: Time of the first sample in seconds.
        seconds: Duration.
        rate: Samples per second to resample to.
        layout: FFmpeg's name of the channel layout.
        lenient: Fill with silence after damage, and warn; else raise FFmpegError.
    """
    total = round(seconds * rate)
    position = 0  # samples that were yielded
    for first, samples in _decode_blocks(path, index, begin, rate=rate, layout=layout, lenient=lenient):
        num_missing = min(first, total) - position
        if num_missing > 0:
            yield np.zeros((samples.shape[0], num_missing), np.float32)
            position += num_missing
        num_repeated = max(0, position - first)
        new_samples = samples[:, num_repeated:][:, : total - position]
        if new_samples.shape[1]:
            yield np.ascontiguousarray(new_samples)
            position += new_samples.shape[1]
        if position >= total:
            return
    if position < total:
        yield np.zeros((av.AudioLayout(layout).nb_channels, total - position), np.float32)


def _decode_blocks(
    path: Path, index: int, begin: Fraction, *, rate: int, layout: str, lenient: bool
) -> Iterator[tuple[int, Samples]]:
    """Yield blocks of decoded samples, each with the index of its first sample, counted from `begin`."""
    # The file is first opened at SEEK_MARGIN before `begin`. If its first block starts after `begin`, the
    # seek went too far, and the file is opened again and decoded from its start.
    for may_seek in (True, False):
        with open_container(path, AUDIO_FORMATS) as container:
            stream = container.streams[index]
            is_late = begin - time_origin(container) > SEEK_MARGIN
            seeks = may_seek and is_late and container.format.name not in _UNTIMED_FORMATS
            if seeks:
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int((begin - SEEK_MARGIN) / stream.time_base), stream=stream)
            blocks = _decode_resampled(
                path, container, stream, begin, rate=rate, layout=layout, lenient=lenient
            )
            first_block = next(blocks, None)
            if seeks and (first_block is None or first_block[0] > 0):
                continue
            if first_block is not None:
                yield first_block
                yield from blocks
            return


def _decode_resampled(
    path: Path, container: Any, stream: Any, begin: Fraction, *, rate: int, layout: str, lenient: bool
) -> Iterator[tuple[int, Samples]]:
    """Yield resampled blocks, each with the index of its first sample counted from `begin`."""
    # Damaged audio raises FFmpegError; with `lenient`, it ends the blocks with a warning.
    timed_frames = (
        (frame, None if frame.pts is None else frame.pts * (frame.time_base or stream.time_base) - begin)
        for frame in _decode_frames(container, stream, lenient)
    )
    try:
        # Yield resampled blocks, each with the index of its first sample, where time 0 has index 0
        # If the time jumps or the format changes, a new resampler starts at the frame's time.
        # timed_frames: FFmpeg's audio frames, each with its time in seconds; None continues the frame before.
        resampler = None
        input_format = None  # format of the samples that the resampler takes
        next_index = 0  # index of the next sample
        decoded_end = Fraction(0)  # end of the audio that was decoded so far, in seconds
        for frame, time in timed_frames:
            frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
            jumps = time is not None and abs(time - decoded_end) >= MAX_ROUNDING
            if resampler is None or frame_format != input_format or jumps:
                if resampler is not None:
                    yield from _number_samples(resampler.resample(None), next_index)  # the buffered rest
                if time is not None:
                    decoded_end = time
                resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
                input_format = frame_format
                next_index = round(decoded_end * rate)
            frame.pts = None
            decoded_end += Fraction(frame.samples, frame.sample_rate)
            for first, samples in _number_samples(resampler.resample(frame), next_index):
                yield first, samples
                next_index = first + samples.shape[1]
        if resampler is not None:
            yield from _number_samples(resampler.resample(None), next_index)
    except av.FFmpegError as error:
        if not lenient:
            raise
        logger.warning(
            "%s: its sound is damaged near %.1f s; the rest of the clip is silent (%s)",
            path,
            float(begin),
            error.strerror,
        )


def _decode_frames(container: Any, stream: Any, lenient: bool) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.is_corrupt and not lenient:
            raise av.InvalidDataError(errno.EINVAL, "it is cut short")
        yield from packet.decode()


def _number_samples(parts: Any, next_index: int) -> Iterator[tuple[int, Samples]]:
    """Yield the samples of audio frames from FFmpeg, each with the index of its first sample."""
    for part in parts:
        samples = np.asarray(part.to_ndarray(), np.float32)
        yield next_index, samples
        next_index += samples.shape[1]
