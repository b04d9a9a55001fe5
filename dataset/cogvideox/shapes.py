"""Choose the frames and the size of a clip, and make its frames that size.

The rules are those of CogVideoX's data sets: the nearest number of frames, evenly spaced, and the nearest
size.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dataset.cogvideox.options import ShapeOptions
from modules.errors import MediaError
from modules.media.buckets import Size
from modules.media.reading import Frame, resize_cover, resize_stretched, video_frames, video_info
from modules.seeds import derive_seed

T = TypeVar("T")
Shape = tuple[int, int, int]  # frames, height, width
MOST_WAITING = 1 << 29  # bytes of frames whose batch is not full


@dataclass(frozen=True)
class Draws:
    """Random choices for one clip; drawn from the seed and the clip's name alone."""

    place: tuple[float, float]  # of the part that is cut out, from left and top in 0..1
    is_flipped: bool


def draw(seed: int, name: str, random_flip: float | None) -> Draws:
    """Draw for a clip: the same in every run, whatever is prepared beside it."""
    chance = random.Random(derive_seed(seed, "prepare", name))
    place = chance.random(), chance.random()
    return Draws(place, chance.random() < (random_flip or 0.0))


def choose_frames(available: int, buckets: Sequence[int], most: int) -> int | None:
    """Return the bucket nearest to min(available, most), the first of equally near ones.

    Only buckets of at most `available` frames are taken; None if there is none.
    """
    fitting = [bucket for bucket in buckets if bucket <= available]
    return min(fitting, key=lambda bucket: abs(bucket - min(available, most)), default=None)


def frame_indices(available: int, count: int) -> range:
    """Return which frames are taken: every (available // count)-th from the first, `count` of them."""
    step = available // count
    return range(0, step * count, step)


def choose_size(size: Size, heights: Sequence[int], widths: Sequence[int]) -> Size:
    """Return the (width, height) with the smallest |Δh| + |Δw|; the first of equally near ones."""
    width, height = size
    return (
        min(widths, key=lambda one: abs(one - width)),
        min(heights, key=lambda one: abs(one - height)),
    )


def read_clip(path: Path, options: ShapeOptions, name: str, threads: int) -> NDArray[np.uint8]:
    """Read the chosen frames of a clip at the chosen size: F H W 3.

    name: of the item, for random choices. threads: that decode. Raises MediaError if the clip cannot be read
    or is too short.
    """
    draws = draw(options.seed, name, options.random_flip)
    stated = video_info(path).frames
    available = stated or _count(path, threads)
    frames = _read_frames(path, available, options, draws, threads)
    if frames is None and stated is not None:  # the header is wrong
        frames = _read_frames(path, _count(path, threads), options, draws, threads)
    if frames is None:
        raise MediaError(f"{path} has other frames whenever it is read")
    return frames


def _read_frames(
    path: Path, available: int, options: ShapeOptions, draws: Draws, threads: int
) -> NDArray[np.uint8] | None:
    """Read a clip of so many frames; None if there are fewer."""
    count = choose_frames(available, options.frame_buckets, options.max_num_frames)
    if count is None:
        raise MediaError(
            f"{path} has {available} frames, the smallest of --frame_buckets is {min(options.frame_buckets)}"
        )
    indices = frame_indices(available, count)
    # to the end of the file, so that a damaged one is noticed
    frames = (frame for index, frame in enumerate(video_frames(path, threads=threads)) if index in indices)
    first = next(frames, None)
    if first is None:
        return None
    size = choose_size((first.shape[1], first.shape[0]), options.height_buckets, options.width_buckets)
    clip = np.stack([shape_frame(frame, size, options, draws) for frame in itertools.chain([first], frames)])
    return clip if len(clip) == count else None


def shape_frame(frame: Frame, size: Size, options: ShapeOptions, draws: Draws) -> Frame:
    """Return a frame H W 3 at a size, cut and mirrored as the options say."""
    if options.video_reshape_mode is None:
        frame = resize_stretched(frame, size)
    else:
        frame = resize_cover(
            frame, size, place=None if options.video_reshape_mode == "center" else draws.place
        )
    return np.ascontiguousarray(frame[:, ::-1]) if draws.is_flipped else frame


def batches_by_shape(
    items: Iterable[tuple[Shape, T]], batch_size: int, most_bytes: int = MOST_WAITING
) -> Iterator[list[T]]:
    """Yield lists of `batch_size` items of one shape, each when it is full; the rest at the end.

    If the frames that wait take more than `most_bytes`, the group that takes most goes before it is full.
    """
    waiting: dict[Shape, list[T]] = {}

    def size_bytes(shape: Shape) -> int:
        return 3 * math.prod(shape) * len(waiting[shape])

    for shape, item in items:
        waiting.setdefault(shape, []).append(item)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
        elif sum(map(size_bytes, waiting)) > most_bytes:
            yield waiting.pop(max(waiting, key=size_bytes))
    yield from waiting.values()


def _count(path: Path, threads: int) -> int:
    return sum(1 for _ in video_frames(path, threads=threads))
