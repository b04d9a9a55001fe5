"""Compare the features of two pictures around given places, at four scales.

The usual way keeps the products of all pairs of places, which takes memory with the fourth power of the side.
Averaging and sampling are linear, so that the same numbers come from averaging the second picture's features
and multiplying only those around each place; all offsets share the same four neighbours. Source of the
lookup: Teed and Deng 2020, arXiv 2003.12039.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from post.interpolation.layers import rows_of_part

# Letters: C channels, h w height and width of the features, P places (h times w), N places of a chunk

LEVELS = 4  # each half as large as the one before
RADIUS = 4
SIDE = 2 * RADIUS + 1  # offsets in x and y
CHANNELS = LEVELS * SIDE**2
REACH = SIDE + 1  # whole places that the offsets fall between
VOLUME_BYTES = 3 << 29  # the products of all pairs are kept up to this size: 720p with all scales


class Correlation:
    """The features of two pictures, ready to be compared."""

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        keeps_volume: bool | None = None,
        *,
        levels: int = LEVELS,
        scale: float | None = None,
    ) -> None:
        """first, second: 1 C h w, float32. keeps_volume: None decides by the size.

        levels: scales to compare at. scale: factor of all products; None: 1 / sqrt(C).
        """
        self._size = first.shape[-2:]
        scale = first.shape[1] ** -0.5 if scale is None else scale
        self._first = rearrange(first.float(), "1 c h w -> (h w) c") * scale
        self._second = second[0].float().flatten(1)
        scales = [second.float()]
        for _ in range(levels - 1):
            scales.append(avg_pool2d(scales[-1], 2, stride=2))
        self._sizes = [(int(scale.shape[-2]), int(scale.shape[-1])) for scale in scales]
        if keeps_volume is None:
            keeps_volume = is_volume_small(first.shape[-2], first.shape[-1], levels)
        self._keeps_volume = keeps_volume
        if keeps_volume:
            self._levels = [self._first @ scale[0].flatten(1) for scale in scales]
        else:  # a row of channels for each place, with so many zeros around that a window may lie outside
            padded = [pad(scale, (REACH,) * 4) for scale in scales]
            self._levels = [rearrange(scale, "1 c h w -> (h w) c").contiguous() for scale in padded]

    def lookup(self, places: Tensor) -> Tensor:
        """Return 1 81*levels h w: products around a place of the second picture for each place of the first.

        places: 1 2 h w, x and y in the second picture's features. Channel level * 81 + i * 9 + j is that of
        the place moved by i - 4 in x and j - 4 in y at that scale; outside the picture it is 0.
        """
        centres = rearrange(places.float(), "1 two h w -> (h w) two")
        # a place that is not finite lies outside; so far outside that nothing near the edge is meant
        centres = centres.nan_to_num(-1e6, -1e6, -1e6).clamp(-1e6, 1e6)
        found = [self._around(level, centres / 2**level) for level in range(len(self._levels))]
        height, width = self._size
        return rearrange(torch.cat(found, dim=1), "(h w) c -> 1 c h w", h=height, w=width)

    def rows(self, start: int, end: int) -> Tensor:
        """Return n h w: products of the first picture's places start to end with all of the second's."""
        rows = self._levels[0][start:end] if self._keeps_volume else self._first[start:end] @ self._second
        return rows.unflatten(1, self._sizes[0])

    def _around(self, level: int, centres: Tensor) -> Tensor:
        """Return P 81. centres: P 2, at this scale."""
        corner = centres.floor()
        share = centres - corner
        start = corner.long() - RADIUS
        products = self._from_volume(level, start) if self._keeps_volume else self._sampled(level, start)
        x, y = share[:, 0, None, None], share[:, 1, None, None]
        rows = products[:, :-1] * (1 - y) + products[:, 1:] * y  # P 9 10
        mixed = rows[:, :, :-1] * (1 - x) + rows[:, :, 1:] * x  # P 9 9: y, x
        return mixed.transpose(1, 2).flatten(1)

    def _from_volume(self, level: int, start: Tensor) -> Tensor:
        """Return P 10 10 (y, x) products out of those that are kept."""
        height, width = self._sizes[level]
        steps = torch.arange(REACH, device=start.device)
        x, y = start[:, :1] + steps, start[:, 1:] + steps  # P 10 each
        is_inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
        index = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None]
        found = self._levels[level].gather(1, index.flatten(1)).view_as(index)
        return found * is_inside

    def _sampled(self, level: int, start: Tensor) -> Tensor:
        """Return P 10 10 (y, x) products, made of the features around each place."""
        height, width = self._sizes[level]
        features = self._levels[level]
        stride = width + 2 * REACH
        x, y = start[:, 0].clamp(-REACH, width) + REACH, start[:, 1].clamp(-REACH, height) + REACH
        steps = torch.arange(REACH, device=start.device)
        window = (steps[:, None] * stride + steps).flatten()
        index = (y * stride + x)[:, None] + window  # P 100
        channels = features.shape[1]
        chunk = rows_of_part(4 * channels * REACH**2, features.device)  # of gathered features
        products = [
            (features.index_select(0, places.flatten()).view(-1, REACH**2, channels) @ own[:, :, None])
            for places, own in zip(index.split(chunk), self._first.split(chunk), strict=True)
        ]
        return torch.cat(products).view(-1, REACH, REACH)


def is_volume_small(height: int, width: int, levels: int = LEVELS) -> bool:
    """Return whether the products of all pairs of places are kept for features of this size.

    It depends on nothing else, so that a clip gives the same pictures on every device.
    """
    places = sum((height >> level) * (width >> level) for level in range(levels))
    return 4 * height * width * places <= VOLUME_BYTES


def grid_of(features: Tensor) -> Tensor:
    """Return 1 2 h w: x and y of each place, in float32."""
    height, width = features.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=features.device, dtype=torch.float32),
        torch.arange(width, device=features.device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([x, y])[None]
