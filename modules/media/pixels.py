"""Images and videos on disk as the pixels that a VAE is given: B 3 F H W float32 in -1..1.

The libraries for media are imported with the first file: networks run where they are not installed, in
benchmarks for one.
"""

from itertools import islice
from pathlib import Path

import numpy
import torch
from einops import rearrange
from torch import Tensor

from modules.errors import MediaError
from modules.media.buckets import Size


def byte_clips(frames: Tensor) -> Tensor:
    """B F H W C uint8 (alpha is dropped) -> B 3 F H W uint8, not copied: for encoders that take a part at a
    time.
    """
    return rearrange(frames[..., :3], "b f h w c -> b c f h w")


def from_bytes(clips: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in -1..1."""
    return clips.float() / 127.5 - 1


def to_pixels(frames: Tensor) -> Tensor:
    """B F H W C uint8 (alpha is dropped) -> B 3 F H W float32 in -1..1."""
    return from_bytes(byte_clips(frames))


def check_clip(pixels: Tensor, frame_step: int, side_step: int) -> None:
    """Raise ValueError where a VAE cannot encode pixels (B C F H W) of that size: it takes one frame and
    whole groups behind it.
    """
    frames, height, width = pixels.shape[2:]
    if (frames - 1) % frame_step or height % side_step or width % side_step:
        raise ValueError(
            f"{frames} frames of {height} x {width}: the VAE takes {frame_step}n + 1 frames with sides that "
            "are multiples of "
            f"{side_step}"
        )


def image_size(path: Path) -> Size:
    """(width, height) of an image file."""
    from modules.media import reading as media

    return media.image_size(path)


def read_pixels(path: Path) -> Tensor:
    """An image file at its own size as 1 3 1 H W float32 in -1..1."""
    from modules.media.reading import read_image

    return to_pixels(torch.from_numpy(read_image(path)[None, None]))


def image_pixels(path: Path, width: int, height: int, keep_aspect: bool = True) -> Tensor:
    """An image file at exactly width x height as 1 3 1 H W float32 in -1..1.

    keep_aspect: scale to cover and crop the middle, as training sees images; else stretch, as the released
    code of Wan does after it has chosen a size of the image's own aspect.
    """
    import cv2

    from modules.media.reading import read_image, resize_cover

    image = read_image(path)
    if keep_aspect:
        image = resize_cover(image, (width, height))
    elif image.shape[:2] != (height, width):
        method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
        image = numpy.asarray(cv2.resize(image, (width, height), interpolation=method))
    return to_pixels(torch.from_numpy(image[None, None]))


def video_pixels(
    path: Path, option: str, width: int, height: int, frames: int, end_frames: int = 0
) -> Tensor:
    """The first frames of a video or folder of images, scaled to cover, as 1 3 F+E H W float32 in -1..1.

    option: "--video_path", for messages. An end image takes `end_frames` (E) more, of which the video has to
    have one: the last one it has stands for those it lacks. Raises MediaError where it is too short.
    """
    from modules.media.reading import resize_cover, video_frames

    needed = frames + min(end_frames, 1)
    found = [
        resize_cover(frame, (width, height)) for frame in islice(video_frames(path), frames + end_frames)
    ]
    if len(found) < needed:
        raise MediaError(
            f"{option} {path}: it has {len(found)} frames, {needed} are needed. Lower the length or give a "
            "longer one."
        )
    found += [found[-1]] * (frames + end_frames - len(found))
    return to_pixels(torch.from_numpy(numpy.stack(found)[None]))
