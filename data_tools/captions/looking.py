"""The frames of an image or a clip that a model is shown."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modules.errors import MediaError
from modules.media.animations import animation_durations, is_animation
from modules.media.decoding import decode_frames, turn_upright
from modules.media.opening import open_video
from modules.media.reading import Frame, folder_images, read_image, resize_stretched, video_frames, video_info

TRIES = 3  # of reading a clip: a header may have a wrong number of frames


def choose_frames(num_frames: int, wanted: int) -> tuple[int, ...]:
    """Return which of `num_frames` frames to show: the middle one of each of `wanted` equal parts.

    All of them if there are fewer. As segments are sampled in Wang et al. 2016, arXiv 1608.00859, section
    3.1.
    """
    if num_frames <= wanted:
        return tuple(range(num_frames))
    return tuple((2 * part + 1) * num_frames // (2 * wanted) for part in range(wanted))


def look_at(path: Path, is_image: bool, wanted: int, max_pixels: int) -> tuple[Frame, ...]:
    """Return the frames of a file to show, each H W 3: one of an image, `wanted` of a clip, evenly spaced.

    Frames with more than `max_pixels` pixels are scaled down. Raises MediaError if the file cannot be read.
    """
    if is_image:
        return (shrink(read_image(path), max_pixels),)
    if path.is_dir():
        images = folder_images(path)
        return tuple(
            shrink(read_image(images[index]), max_pixels) for index in choose_frames(len(images), wanted)
        )
    num_frames = len(animation_durations(path)) if is_animation(path) else video_info(path).frames
    for _ in range(TRIES):
        frames, found = _take(path, choose_frames(num_frames or 0, wanted), max_pixels)
        if found == num_frames:
            return frames
        num_frames = found  # the header says nothing, or another number
    raise MediaError(f"{path} has another number of frames each time it is read. Is it being written?")


def shrink(frame: Frame, max_pixels: int) -> Frame:
    """Return a frame in its proportions with at most `max_pixels` pixels; a smaller one as it is."""
    height, width = frame.shape[:2]
    if height * width <= max_pixels:
        return frame
    scale = math.sqrt(max_pixels / (height * width))
    return resize_stretched(frame, (max(1, int(width * scale)), max(1, int(height * scale))))


def _take(path: Path, indices: tuple[int, ...], max_pixels: int) -> tuple[tuple[Frame, ...], int]:
    """Return the frames of these indices as far as they are there, and how many the whole file has."""
    wanted, found, frames = set(indices), 0, []
    for found, convert in enumerate(_decoded(path), 1):
        if found - 1 in wanted:
            frames.append(shrink(convert(), max_pixels))
    return tuple(frames), found


def _decoded(path: Path) -> Iterator[Callable[[], Frame]]:
    """Yield for each frame of a file a function that turns it into H W 3: only shown frames need it."""
    if is_animation(path):
        yield from (partial(np.asarray, frame) for frame in video_frames(path))
        return
    with open_video(path) as (container, stream):
        for frame, _ in decode_frames(path, container, stream):
            yield partial(_convert, frame)


def _convert(frame: Any) -> Frame:
    return turn_upright(frame.to_ndarray(format="rgb24", threads=1), frame.rotation)
