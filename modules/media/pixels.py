"""Read images and videos as pixels for a VAE, B 3 F H W float32 in -1..1, and convert pixels to frames.

The media libraries are imported with the first file, so that networks also run without them, for example in
benchmarks.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from logging import getLogger
from pathlib import Path

import numpy
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from modules.errors import MediaError
from modules.media.buckets import Size

logger = getLogger(__name__)


def byte_clips(frames: Tensor) -> Tensor:
    """View B F H W C uint8 as B 3 F H W without alpha, for encoders that convert it to float in parts."""
    return rearrange(frames[..., :3], "b f h w c -> b c f h w")


def from_bytes(clips: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in -1..1."""
    return clips.float() / 127.5 - 1


def to_pixels(frames: Tensor) -> Tensor:
    """Convert B F H W C uint8 to B 3 F H W float32 in -1..1; alpha is dropped."""
    return from_bytes(byte_clips(frames))


def iterate_frames(chunks: Iterable[Tensor]) -> Iterator[NDArray[numpy.uint8]]:
    """Yield the frames, H W C, of chunks of pixels (1 C F H W in -1..1)."""
    for chunk in chunks:
        yield from pixels_to_uint8(chunk)


def pixels_to_uint8(pixels: Tensor) -> NDArray[numpy.uint8]:
    """Convert the first clip of B C F H W (-1..1) to F H W C, 0..255, rounded. C: 3, or 4 with alpha."""
    values = (pixels[0].float() / 2 + 0.5).clamp(0, 1) * 255
    array: NDArray[numpy.uint8] = (
        rearrange(values.round().to(torch.uint8), "c f h w -> f h w c").cpu().numpy()
    )
    return array


def check_clip(pixels: Tensor, frame_step: int, side_step: int) -> None:
    """Raise ValueError if a VAE cannot encode `pixels`, B C F H W, because of their size.

    F must be 1 plus a multiple of `frame_step`, and H and W must be multiples of `side_step`.
    """
    frames, height, width = pixels.shape[2:]
    if (frames - 1) % frame_step or height % side_step or width % side_step:
        raise ValueError(
            f"{frames} frames of {height} x {width}: the VAE takes {frame_step}n + 1 frames with sides that "
            f"are multiples of {side_step}"
        )


def image_size(path: Path) -> Size:
    """Return (width, height) of an image, read from its header."""
    from modules.media.reading import frame_size

    return frame_size(path)


def read_pixels(path: Path) -> Tensor:
    """Read an image, or a video's first frame, at its own size: 1 3 1 H W float32 in -1..1."""
    from modules.media.reading import first_frame

    return to_pixels(torch.from_numpy(first_frame(path)[None, None]))


def image_pixels(
    path: Path,
    width: int,
    height: int,
    keep_aspect: bool = True,
    shrink: str = "area",
    crf: int = 0,
    on_white: bool = True,
) -> Tensor:
    """Read an image, or a video's first frame, at exactly width x height: 1 3 1 H W float32 in -1..1.

    With `keep_aspect`, scale to cover and crop the center, as in training; otherwise stretch, as Wan's
    released code does after choosing a size with the image's aspect ratio. `shrink` is the method of
    shrinking, such as "area" or "lanczos". If `crf` is not 0, the image is first compressed as H.264 of this
    quality. With `on_white` False, transparent parts keep their colors instead of becoming white.
    """
    import cv2

    from modules.media.encoding import recompress
    from modules.media.reading import first_frame, resize_cover

    image = numpy.ascontiguousarray(first_frame(path, alpha=not on_white)[..., :3])
    if crf and min(image.shape[:2]) > 1:  # H.264 needs 2 x 2 pixels at least
        image = recompress(image, crf)
    if keep_aspect:
        image = resize_cover(image, (width, height), shrink)
    elif image.shape[:2] != (height, width):
        method = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
        image = numpy.asarray(cv2.resize(image, (width, height), interpolation=method))
    return to_pixels(torch.from_numpy(image[None, None]))


def video_pixels(
    path: Path, option: str, width: int, height: int, frames: int, end_frames: int = 0
) -> Tensor:
    """Read the first frames of a video or image folder, scaled to cover: 1 3 F+E H W float32 in -1..1.

    `option` names the video in messages, such as "--video_path". `frames` is F. `end_frames` (E) is the
    number of additional frames for an end image; at least one of them must exist, and the last existing one
    is repeated for the missing ones.

    Raises:
        MediaError: If the video is too short.
    """
    from modules.media.reading import FrameSizes, media_colors, resize_cover, video_frames

    hdr = media_colors(path).hdr
    if hdr is not None:
        logger.warning(
            "%s %s is HDR (%s): its colors will look washed out. Convert it to SDR first.", option, path, hdr
        )
    maximum = frames + end_frames
    minimum = frames + min(end_frames, 1)
    sizes = FrameSizes()  # notes a change of the size while frames pass through it
    source_frames = sizes.watch(islice(video_frames(path), maximum))
    resized = [resize_cover(frame, (width, height)) for frame in source_frames]
    if sizes.change is not None:
        logger.warning(
            "%s %s changes its size (%s): all frames are cropped to %dx%d.",
            option,
            path,
            sizes.change,
            width,
            height,
        )
    if len(resized) < minimum:
        raise too_short(option, path, len(resized), minimum)
    resized += [resized[-1]] * (maximum - len(resized))
    return to_pixels(torch.from_numpy(numpy.stack(resized)[None]))


def too_short(option: str, path: Path, frames: int, needed: int) -> MediaError:
    """Return the error for a video with too few frames."""
    has = "1 frame" if frames == 1 else f"{frames} frames"
    return MediaError(
        f"{option} {path}: it has {has}, {needed} are needed. Lower the length or use a longer video."
    )


def cross_fade(earlier: Tensor, later: Tensor) -> Tensor:
    """Blend clips B C F H W from `earlier` to `later`, linearly over F; return the dtype of `later`."""
    weights = torch.linspace(1, 0, later.shape[2], dtype=torch.float32, device=later.device).view(
        1, 1, -1, 1, 1
    )
    return (weights * earlier.float() + (1 - weights) * later.float()).to(later.dtype)
