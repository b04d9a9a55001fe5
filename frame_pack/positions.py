"""Rotary positions of FramePack's tokens: frames by given indices, rows and columns counted.

A coarse token has the mean of the turns it covers. Source: the released model code; Zhang and Agrawala 2025,
arXiv 2504.12626.
"""
# Letters: B batch, L latent tokens, D head width

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.devices import send_ahead
from modules.layers.rope import CPU, angles_at, on_grid, turns


@dataclass(frozen=True)
class Stretch:
    """Consecutive latents of the sequence, embedded by patches of one size."""

    # for each of the B samples: positions of its latents on the frame axis
    indices: tuple[tuple[int, ...], ...]
    coarseness: int  # how many frames, rows and columns of patches one token covers


@dataclass(frozen=True)
class WindowLayout:
    """Everything that the rotary table of a sequence depends on."""

    stretches: tuple[Stretch, ...]  # front to back
    rows: int  # patches, before any are joined into coarse tokens
    columns: int
    scale: float  # factor for positions along rows and columns


def position_scale(timesteps: Tensor, threshold: float | None, factor: float) -> float:
    """Return the factor for positions along rows and columns: `factor` from timestep `threshold` on, else 1.

    timesteps: B, as the model takes them; the noisiest decides for all. threshold: None always returns 1. At
    high noise the model lays out the picture; closer positions then keep a model that was trained on small
    pictures from repeating itself in a large one.
    """
    return factor if threshold is not None and float(timesteps.max()) >= threshold else 1.0


def rotary_table(
    layout: WindowLayout, widths: Sequence[int], theta: float, device: torch.device = CPU
) -> Tensor:
    """Return the turns as (cosine, sine) pairs, float32 on `device`.

    L 1 D/2 2 if all samples have the same indices, else B L 1 D/2 2. widths: channels for frames, rows and
    columns; they sum to D.
    """
    batch = len(layout.stretches[0].indices)
    samples = [tuple(stretch.indices[sample] for stretch in layout.stretches) for sample in range(batch)]
    tables = {indices: _table(layout, indices, widths, theta, device) for indices in set(samples)}
    return tables[samples[0]] if len(tables) == 1 else torch.stack([tables[indices] for indices in samples])


def _table(
    layout: WindowLayout,
    indices: Sequence[Sequence[int]],
    widths: Sequence[int],
    theta: float,
    device: torch.device,
) -> Tensor:
    """Return the turns of one sample: L 1 D/2 2."""
    rows, columns = (torch.arange(size) * layout.scale for size in (layout.rows, layout.columns))
    parts = []
    for stretch, frames in zip(layout.stretches, indices, strict=True):
        positions = (torch.tensor(frames), rows, columns)
        axes = [
            _axis(one, width, theta, stretch.coarseness) for one, width in zip(positions, widths, strict=True)
        ]
        parts.append(on_grid([send_ahead(one, device) for one in axes]))
    return torch.cat(parts).unsqueeze(1)


def _axis(positions: Tensor, width: int, theta: float, coarseness: int) -> Tensor:
    """Return the turns along one axis: ceil(n / coarseness) x width/2 x 2 float32.

    It averages cosines and sines, not positions, as in training: the turns of coarse tokens also shrink the
    vectors they turn. A mean over a cell of the grid equals the mean over the cell's axis, because the turns
    of an axis do not depend on the other axes.
    """
    each = turns(angles_at(positions.double(), width, theta))
    missing = -len(each) % coarseness
    each = torch.cat([each, each[-1:].expand(missing, -1, -1)])
    return each.unflatten(0, (-1, coarseness)).mean(dim=1).float()
