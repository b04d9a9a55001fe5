"""Choose the frames and the size of clips, read them ahead, encode those of one size in batches, and write.

The rules are those of CogVideoX's data sets: the nearest number of frames, evenly spaced, and the nearest
size.
"""

import contextlib
import math
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.cogvideox.items import PreparedItem, write_media
from data_tools.cogvideox.models import DTYPES, EncodeMoments
from data_tools.cogvideox.options import EncodingOptions, PrepareOptions, ShapeOptions
from data_tools.frames import pick_frames
from dataset.caching.prefetch import DECODED_BYTES, Failure, WriteBehind, run_ahead
from modules.bars import Bar
from modules.errors import MediaError
from modules.media.buckets import Size
from modules.media.pixels import to_pixels
from modules.media.reading import Frame, resize_cover, resize_stretched
from modules.seeds import derive_seed

T = TypeVar("T")
Shape = tuple[int, int, int]  # frames, height, width
Clip = NDArray[np.uint8]  # F H W 3
Draws = tuple[tuple[float, float], bool]  # place of the part that is cut out, left and top in 0..1; mirrored
MOST_WAITING = 1 << 29  # bytes of frames whose batch is not full


def prepare_clips(
    items: Sequence[PreparedItem],
    encode: EncodeMoments | None,
    device: torch.device,
    options: PrepareOptions,
    show_progress: bool,
) -> list[Failure]:
    """Read, encode (if there is an encoder) and write all clips; return those that cannot be used.

    Raises OutputError if a file cannot be written.
    """
    failures: list[Failure] = []
    settings = options.encoding
    with (
        WriteBehind(options.workers.num_artifact_workers) as writer,
        torch.no_grad(),
        Bar(len(items), "Preparing", "clip", show_progress) as bar,
        contextlib.closing(_clips_ahead(items, options, failures, bar)) as clips,
    ):
        for batch in batches_by_shape(clips, settings.batch_size):
            frames = [clip for _, clip in batch]
            moments = firsts = None
            if encode is not None:
                moments = _encode_clips(frames, encode, device, settings)
            if encode is not None and settings.save_image_latents:
                firsts = _encode_clips([clip[:1] for clip in frames], encode, device, settings)
            for place, (item, clip) in enumerate(batch):
                tensors = [None if found is None else found[place] for found in (moments, firsts)]
                writer.submit(partial(write_media, item, clip, options.shape.target_fps, *tensors))
    return failures


def _clips_ahead(
    items: Sequence[PreparedItem], options: PrepareOptions, failures: list[Failure], bar: Bar
) -> Generator[tuple[Shape, tuple[PreparedItem, Clip]], None, None]:
    """Yield each clip with its shape, in order, while threads read later ones."""
    threads, shape = options.workers, options.shape
    size_bytes = 3 * max(shape.frame_buckets) * max(shape.height_buckets) * max(shape.width_buckets)

    def read(item: PreparedItem) -> Clip:
        return read_clip(item.source, shape, item.name, threads.num_decode_threads)

    workers = max(1, threads.dataloader_num_workers)
    with contextlib.closing(run_ahead(items, read, workers, lambda _: size_bytes, DECODED_BYTES)) as ahead:
        for item, result in ahead:
            if isinstance(result, (MediaError, OSError)):
                failures.append(Failure(item.source, str(result), 0, item.name))
            elif isinstance(result, Exception):
                raise result
            else:
                frames, height, width = result.shape[:3]
                yield (frames, height, width), (item, result)
            bar.update()


def _encode_clips(
    clips: Sequence[Clip], encode: EncodeMoments, device: torch.device, settings: EncodingOptions
) -> list[Tensor]:
    """Return the moments of clips of one shape, on the CPU in the dtype to save.

    On a CPU clips are encoded one by one, which costs nothing: so results do not depend on the batch.
    """
    step = 1 if settings.use_slicing or device.type == "cpu" else len(clips)
    found: list[Tensor] = []
    for start in range(0, len(clips), step):
        frames = torch.from_numpy(np.stack(clips[start : start + step]))
        if settings.pin_memory and device.type == "cuda":
            frames = frames.pin_memory()
        moments = encode(to_pixels(frames.to(device, non_blocking=settings.pin_memory)))
        found += [one.to(DTYPES[settings.dtype]).cpu().clone() for one in moments]
    return found


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


# --- frames and sizes
# ------------------------------------------------------------------------------------------------------------


def read_clip(path: Path, options: ShapeOptions, name: str, threads: int) -> Clip:
    """Read the chosen frames of a clip at the chosen size: F H W 3.

    name: of the item, for random choices, which are the same in every run, whatever is prepared beside it.
    threads: that decode. Raises MediaError if the clip cannot be read or is too short.
    """
    chance = random.Random(derive_seed(options.seed, "prepare", name))
    draws = (chance.random(), chance.random()), chance.random() < (options.random_flip or 0.0)
    size: Size | None = None

    def choose(available: int) -> range:
        count = choose_frames(available, options.frame_buckets, options.max_num_frames)
        if count is None:
            raise MediaError(
                f"{path} has {available} frames, the smallest of --frame_buckets is "
                f"{min(options.frame_buckets)}"
            )
        return range(0, available // count * count, available // count)

    def shape(frame: Frame) -> Frame:
        nonlocal size
        if size is None:  # that of the first frame: a folder may have images of several
            sides = (frame.shape[1], frame.shape[0])
            size = choose_size(sides, options.height_buckets, options.width_buckets)
        return shape_frame(frame, size, options, draws)

    return np.stack(pick_frames(path, choose, shape, threads, exact=False))


def choose_frames(available: int, buckets: Sequence[int], most: int) -> int | None:
    """Return the bucket nearest to min(available, most), the first of equally near ones.

    Only buckets of at most `available` frames are taken; None if there is none.
    """
    fitting = [bucket for bucket in buckets if bucket <= available]
    return min(fitting, key=lambda bucket: abs(bucket - min(available, most)), default=None)


def choose_size(size: Size, heights: Sequence[int], widths: Sequence[int]) -> Size:
    """Return the (width, height) with the smallest |Δh| + |Δw|; the first of equally near ones."""
    width, height = size
    return (
        min(widths, key=lambda one: abs(one - width)),
        min(heights, key=lambda one: abs(one - height)),
    )


def shape_frame(frame: Frame, size: Size, options: ShapeOptions, draws: Draws) -> Frame:
    """Return a frame H W 3 at a size, cut and mirrored as the options say."""
    place, is_flipped = draws
    if options.video_reshape_mode is None:
        frame = resize_stretched(frame, size)
    else:
        frame = resize_cover(frame, size, place=None if options.video_reshape_mode == "center" else place)
    return np.ascontiguousarray(frame[:, ::-1]) if is_flipped else frame
