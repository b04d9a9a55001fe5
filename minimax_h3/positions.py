"""Positions of MiniMax-H3's tokens on one time axis, the clock, for text, conditions, audio and frames.

The tokens of a text are at 0, 1, 2, ...; the clock of everything else starts after them. A latent frame takes
5/3 units for each frame that it covers, a latent of audio takes one. All are float64: sums of thirds in
float32 would drift. Source: the released code of MiniMax-H3, as in diffusers.
"""
# Letters: L tokens

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TIME_PER_FRAME = 5 / 3
FRAMES_PER_LATENT = (1, 4, 4, 4, 4)  # frames per latent frame, a pattern that repeats
SIDE = 32.0  # side of a square image, in units of space


class ImageGrid(NamedTuple):
    """Number of latent frames, and of rows and columns of tokens in each."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class ImagePosition:
    """Position of an image or clip in the rotary embedding."""

    grid: ImageGrid
    start_time: float  # time of its first latent frame on the clock


@dataclass(frozen=True)
class AudioPosition:
    """Time position of audio tokens: all latents of the left channel, then of the right one."""

    num_latents: int  # of each channel
    start_time: float
    grid: ImageGrid  # grid of the images to whose left and right edges the two audio channels are placed


def latent_frame_durations(frames: int) -> Tensor:
    """Return the duration of each latent frame in rotary time units, float64."""
    pattern = [TIME_PER_FRAME * FRAMES_PER_LATENT[index % len(FRAMES_PER_LATENT)] for index in range(frames)]
    return torch.tensor(pattern, dtype=torch.float64)


def last_frame_time(start_time: float, frames: int) -> float:
    """Return the time position of a keyframe that ends a clip of `frames` latent frames."""
    durations = latent_frame_durations(frames)
    total = float(durations.numpy().sum())  # NumPy's order of summation, as in the released code
    return start_time + total - TIME_PER_FRAME


def clip_duration(frames: int) -> float:
    """Return the duration of a reference clip: the sum of its latent frames' durations."""
    return float(sum(latent_frame_durations(frames).tolist()))


def image_token_positions(position: ImagePosition) -> Tensor:
    """Return the time, height and width positions of an image's tokens, L 3 float64."""
    grid = position.grid
    durations = latent_frame_durations(grid.frames)
    times = position.start_time + torch.cat([durations.new_zeros(1), durations[:-1].cumsum(0)])
    heights, widths = _measure_edges(grid)
    axes = torch.meshgrid(times, heights, widths, indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=1)


def audio_token_positions(position: AudioPosition) -> Tensor:
    """Return time, height and width of each audio token, 2 latents x 3 float64; the height is constant."""
    times = position.start_time + torch.arange(position.num_latents, dtype=torch.float64)
    _, widths = _measure_edges(position.grid)
    channels = []
    for width in (widths[0], widths[-1]):
        zeros = torch.zeros_like(times)
        channels.append(torch.stack([times, zeros, width.expand_as(times)], dim=1))
    return torch.cat(channels)


def text_token_positions(num_tokens: int) -> Tensor:
    """Return the time, height and width positions of a text's tokens, L 3 float64."""
    positions = torch.zeros(num_tokens, 3, dtype=torch.float64)
    positions[:, 0] = torch.arange(num_tokens)
    return positions


def _measure_edges(grid: ImageGrid) -> tuple[Tensor, Tensor]:
    """Return the upper edges of rows and left edges of columns; a square image spans 0 to 32."""
    root = torch.tensor(grid.rows * grid.columns, dtype=torch.float64).sqrt()
    edges = []
    for size in (grid.rows, grid.columns):
        extent = size / root  # 1 for a square image
        steps = torch.arange(size, dtype=torch.float64)
        edges.append((steps * (extent / size) + (1 - extent) / 2) * SIDE)
    return edges[0], edges[1]


def token_positions(media: Sequence[ImagePosition | AudioPosition], num_text: int) -> Tensor:
    """Return all tokens' positions, media first, then text, L 3 float64."""
    positions = []
    for medium in media:
        if isinstance(medium, ImagePosition):
            positions.append(image_token_positions(medium))
        else:
            positions.append(audio_token_positions(medium))
    return torch.cat([*positions, text_token_positions(num_text)])
