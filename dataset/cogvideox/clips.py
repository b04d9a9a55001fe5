"""Read the clips of items ahead, encode them in batches of one size, and write their files behind."""

import contextlib
from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset.caching.prefetch import DECODED_BYTES, WriteBehind, run_ahead
from dataset.caching.reports import Failure
from dataset.cogvideox.artifacts import write_media
from dataset.cogvideox.items import PreparedItem
from dataset.cogvideox.options import PrepareOptions
from dataset.cogvideox.shapes import Shape, batches_by_shape, read_clip
from modules.bars import Bar
from modules.contract.family import EncodeMoments
from modules.errors import MediaError
from modules.media.pixels import to_pixels

Clip = NDArray[np.uint8]  # F H W 3

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the names in options


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
    threads = options.workers
    with (
        WriteBehind(threads.num_artifact_workers) as writer,
        torch.no_grad(),
        Bar(len(items), "Preparing", "clip", show_progress) as bar,
        contextlib.closing(_clips_ahead(items, options, failures, bar)) as clips,
    ):
        for batch in batches_by_shape(clips, options.encoding.batch_size):
            frames = [clip for _, clip in batch]
            moments = _encode_clips(frames, encode, device, options, 0)
            firsts = None
            if options.encoding.save_image_latents:
                firsts = _encode_clips(frames, encode, device, options, 1)
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

    ahead = run_ahead(
        items, read, max(1, threads.dataloader_num_workers), lambda _: size_bytes, DECODED_BYTES
    )
    with contextlib.closing(ahead):
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
    clips: Sequence[Clip],
    encode: EncodeMoments | None,
    device: torch.device,
    options: PrepareOptions,
    most_frames: int,
) -> list[Tensor] | None:
    """Return the moments of clips of one shape, on the CPU in the dtype to save. most_frames: 0 for all.

    On a CPU clips are encoded one by one, which costs nothing: so results do not depend on the batch.
    """
    if encode is None:
        return None
    settings = options.encoding
    dtype = DTYPES[settings.dtype]
    step = 1 if settings.use_slicing or device.type == "cpu" else len(clips)
    found: list[Tensor] = []
    for start in range(0, len(clips), step):
        parts = [torch.from_numpy(clip[: most_frames or None]) for clip in clips[start : start + step]]
        frames = torch.stack(parts)
        if settings.pin_memory and device.type == "cuda":
            frames = frames.pin_memory()
        moments = encode(to_pixels(frames.to(device, non_blocking=settings.pin_memory)))
        found += [one.to(dtype).cpu().clone() for one in moments]
    return found
