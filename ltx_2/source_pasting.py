"""Pixels of a source clip, put back over the parts of a decoded result that kept its latents.

A latent that is kept is still decoded with loss: the pixels of the clip itself replace those of the decoder.
"""
# Letters: F H W frames, height and width of pixels; f h w those of latents

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx_2.given_media import make_inner_mask, make_unchanged_mask
from ltx_2.given_media_options import Ltx2GivenMedia, Rectangle
from modules.errors import OptionError
from modules.media.pixels import to_pixels
from modules.media.reading import resize_cover, video_frames
from protocols.data import LatentSpec
from protocols.requests import PixelEdit, Prepared


def add_pasting(prepared: Prepared, media: Ltx2GivenMedia, latent: LatentSpec) -> Prepared:
    """Add a step after decoding to the request, which pastes source pixels where latents were given.

    Args:
        prepared: The request, of full size if it has stages.
        media: Options of given media, with --paste_source.
        latent: Latent space of the video.

    Raises:
        OptionError: If another image (--image_path) is the first frame.
    """
    assert media.paste_source is not None  # the caller checks it
    image = prepared.request.image_path
    if image is not None:
        raise OptionError(
            f"--paste_source {media.paste_source} and --image_path {image}: the first frame is the image, "
            "not that of the clip. Omit one of them"
        )
    pasting = SourcePasting(media, prepared, latent)
    return replace(
        prepared, edit=PixelEdit(pasting.apply, metadata={"paste_source": str(media.paste_source)})
    )


@dataclass(frozen=True)
class SourcePasting:
    """Paste the source clip's pixels back into the decoded result where the request keeps them."""

    media: Ltx2GivenMedia  # with --paste_source, and a mask or a region
    prepared: Prepared
    latent: LatentSpec

    def apply(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blend chunks of decoded pixels, 1 3 F H W, with the source's; yield -1..1 in float32."""
        source_frames, source_weights = self._read_frames(), self._make_weights()
        for chunk in chunks:
            count = chunk.shape[2]
            source = to_pixels(torch.from_numpy(numpy.stack(list(islice(source_frames, count)))[None]))
            weight = torch.from_numpy(numpy.stack(list(islice(source_weights, count)))).to(chunk.device)
            decoded = chunk.float().clamp(-1, 1)
            yield weight * source.to(chunk.device) + (1 - weight) * decoded

    def _read_frames(self) -> Iterator[NDArray[numpy.uint8]]:
        """Yield the source's frames as they were encoded, H W 3, with black outside the region they fill."""
        path, region = self._source
        for frame in video_frames(path):
            canvas = numpy.zeros((self.prepared.height, self.prepared.width, 3), numpy.uint8)
            bottom, right = region.top + region.height, region.left + region.width
            resized = resize_cover(frame, (region.width, region.height))
            canvas[region.top : bottom, region.left : right] = resized
            yield canvas

    def _make_weights(self) -> Iterator[NDArray[numpy.float32]]:
        """Yield the blend weight of the source clip's pixels for each frame, H W in 0..1."""
        feather = self.media.paste_source
        assert feather is not None  # see `media`
        for index, is_unchanged in enumerate(self._make_unchanged_mask()):
            weight = make_blend_weights(is_unchanged.numpy(), feather, self.latent.pixel_step)
            # the first latent covers one frame
            for _ in range(self.latent.frame_step if index else 1):
                yield weight

    def _make_unchanged_mask(self) -> Tensor:
        """Return which latents of the source stay unchanged, f h w bool."""
        shape = self.latent.shape(self.prepared.frames, self.prepared.height, self.prepared.width)[2:]
        region = self.media.region
        if region is None:
            return make_unchanged_mask(self.media, self.prepared, self.latent)
        return make_inner_mask(region, *shape[1:], self.latent.pixel_step).expand(shape)

    @property
    def _source(self) -> tuple[Path, Rectangle]:
        """Return the source clip's path, and the rectangle of the result that it fills."""
        if self.media.outpaint_source is not None and self.media.region is not None:
            return self.media.outpaint_source, self.media.region
        assert self.media.inpaint_source is not None  # its mask needs it
        return self.media.inpaint_source, Rectangle(0, 0, self.prepared.width, self.prepared.height)


def make_blend_weights(is_unchanged: NDArray[numpy.bool_], feather: int, step: int) -> NDArray[numpy.float32]:
    """Return the source's weight in each pixel, H W, which fades out toward the changed region.

    It is 0 in the changed region, and rises linearly to 1 over the next `feather` pixels, along rows, columns
    and diagonals alike. It does not fade toward the borders of the frame.

    Args:
        is_unchanged: Which latents stay unchanged, h w.
        feather: Number of pixels whose weight is between 0 and 1.
        step: Number of pixels of a latent, in a row or column.
    """
    pixels = is_unchanged.astype(numpy.uint8).repeat(step, axis=0).repeat(step, axis=1)
    if pixels.all():  # OpenCV does not define distances if no pixel is 0
        return pixels.astype(numpy.float32)
    # DIST_C: the larger of the distances along rows and columns, exact with a mask of 3
    distances = cv2.distanceTransform(pixels, cv2.DIST_C, 3)
    weights: NDArray[numpy.float32] = numpy.minimum(distances / (feather + 1), 1).astype(numpy.float32)
    return weights
