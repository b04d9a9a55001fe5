"""What encoders of pixels share: overlapping pieces joined by linear ramps, and draws from the posterior.

Cuts and ramps are those of the released VAE (hunyuanvideo, `enable_tiling`): a tile begins every three
quarters of a tile, however short that leaves the last one. In the overlap a tile fades in over the one above
it, then over the one to its left. Sizes count units, latent frames or latent pixels, which input and output
share; each unit is a number of frames or pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.layers.convolution import Compute, compute_piece
from modules.seeds import derive_seed


@dataclass(frozen=True)
class Cut:
    """Pieces of `size` units, one every `stride` units; sizes of a unit in input and output."""

    size: int
    unit_in: int
    unit_out: int

    @property
    def stride(self) -> int:
        return int(self.size * 0.75)


def compute_in_tiles(compute: Compute, x: Tensor, cut: Cut, device: torch.device) -> Tensor:
    """Apply `compute` to x, ... H W, tile by tile in height and width.

    Returns ... H' W', float32, on `device`.
    """
    height, width = (size // cut.unit_in for size in x.shape[-2:])
    inside = cut.stride * cut.unit_out
    whole = torch.empty(0)
    above: dict[int, Tensor] = {}  # by left edge: this tile's first rows as the tile above computed them
    for top in range(0, height, cut.stride):
        rows = slice(top * cut.unit_in, (top + cut.size) * cut.unit_in)
        beside = torch.empty(0)
        for left in range(0, width, cut.stride):
            tile = compute_piece(
                compute, x[..., rows, left * cut.unit_in : (left + cut.size) * cut.unit_in]
            ).float()
            if top:
                _fade_in(tile, above[left], -2)
            if left:
                _fade_in(tile, beside, -1)
            above[left], beside = tile[..., inside:, :].clone(), tile[..., inside:].clone()
            if not top and not left:
                whole = torch.empty(
                    (*tile.shape[:-2], height * cut.unit_out, width * cut.unit_out), device=device
                )
            kept = tile[..., :inside, :inside]
            first, second = top * cut.unit_out, left * cut.unit_out
            whole[..., first : first + kept.shape[-2], second : second + kept.shape[-1]] = kept
            del tile, kept  # free them before the next one is computed
    return whole


def compute_in_spans(compute: Compute, x: Tensor, cut: Cut) -> Iterator[Tensor]:
    """Apply `compute` to x, B C F H W, span by span of frames.

    Yields B C' F' H' W' in order and without overlaps. A span begins with the last frame of the units before
    it, because a clip begins with a single frame; the result for that frame is dropped.
    """
    units = (x.shape[2] - 1) // cut.unit_in  # without the first frame
    shared = torch.empty(0)
    for start in range(0, units, cut.stride):
        span = compute(x[:, :, start * cut.unit_in : (start + cut.size) * cut.unit_in + 1])
        if start:
            span = span[:, :, 1:]
            _fade_in(span, shared, 2)
        end = cut.stride * cut.unit_out + (not start)
        shared = span[:, :, end:].clone()
        yield span[:, :, :end]
        del span  # free it before the next one is computed


def _fade_in(piece: Tensor, before: Tensor, axis: int) -> None:
    """Blend the first entries of `piece` along an axis with those of `before`, which show the same."""
    length = min(piece.shape[axis], before.shape[axis])
    head = piece.narrow(axis, 0, length)
    shape = [1] * piece.ndim
    shape[axis] = length
    ramp = (torch.arange(length, device=piece.device) / max(1, length)).view(shape)
    head.copy_(before.narrow(axis, before.shape[axis] - length, length).lerp(head, ramp))


def posterior_generator(owner: int | str) -> torch.Generator:
    """Return the generator for the posterior sample of a clip or a picture.

    owner: the name of the cached item, or the seed of the generation. So an item's cache does not depend on
    the other items of a run, and a generation depends only on its seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))


def sample_posterior(
    moments: Tensor, generators: Sequence[torch.Generator], limits: tuple[float, float] | None = None
) -> Tensor:
    """Return a sample of each posterior, B Z ... float32, on the device of `moments`.

    moments: B 2Z ... float32, means and logarithms of variances on the channel axis; overwritten. generators:
    one for each item; the noise is drawn in float32 on their device. limits: of the logarithms of variances;
    None: they count as they are.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    if limits is not None:
        log_variance.clamp_(*limits)
    # in place: even the latents of a long clip are large
    deviation = log_variance.mul_(0.5).exp_()
    for item, each in enumerate(generators):
        noise = torch.randn(mean.shape[1:], generator=each, device=each.device)
        mean[item] += deviation[item].mul_(noise.to(mean.device))
    return mean.contiguous()
