"""Positions of video and audio tokens in seconds and pixels, and rotation by them.

Source: the released code of LTX-2. A position is the middle of what a latent covers, as a fraction of the
longest that was trained, from -1 to 1. Frequencies are computed in float64. Positions and angles are float32,
as in training: at the highest frequency, of 15708, angles are coarse, and the model was trained with these.
"""
# Letters: B batch, L tokens, N heads, D head width, A axes, K frequencies of an axis

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ltx_2.configs import MEL_RATE, MEL_STRIDE, LtxConfig
from modules.devices import send_ahead
from modules.layers.rope import THETA, cos_and_sin


class Places(NamedTuple):
    """Positions of latents that determine a rotary table."""

    width: int  # channels of all heads, N * D
    grid: tuple[int, ...]  # latent frames, rows and columns of a video, or the number of audio latents
    # frame rate of each sample, or one for all; () for audio, whose latents have a rate of their own
    fps: tuple[float, ...] = ()
    by_time: bool = False  # without rows and columns: all tokens of a frame share its rotation
    # factors on the sides and the seconds of a reference, so that it covers the same range as its target
    factors: tuple[int, int] = (1, 1)
    frame: int | None = None  # frame index of a keyframe; None for a clip that starts at frame 0
    is_before: bool = False  # audio that ends one latent before second 0; else it begins there


def make_table(config: LtxConfig, places: Places, /, *, device: torch.device) -> Tensor:
    """Return the rotary table, (cosine, sine) pairs L N D/2 2, or B L N D/2 2 if samples differ in fps."""
    num_axes = 1 if places.by_time or not places.fps else 3
    turn = partial(_turn, config.rope_theta, places.width // (2 * num_axes), device)
    times = [turn(seconds, config.longest[0]) for seconds in _time_latents(config, places)]
    sides = []
    for axis in range(1, num_axes):
        pixels = place_latents(places.grid[axis], config.stride[axis]) * places.factors[0]
        sides.append(turn(pixels, config.longest[axis]))
    tables = [_join([time, *sides], places, config.num_heads) for time in times]
    return tables[0] if len(tables) == 1 else torch.stack(tables)


def _time_latents(config: LtxConfig, places: Places) -> list[Tensor]:
    """Return each latent's start and end in seconds: a tensor per frame rate, or one for audio."""
    if not places.fps:
        frames = place_latents(places.grid[0], MEL_STRIDE, is_causal=True)
        if places.is_before:
            frames = frames - frames[-1, 1] - MEL_STRIDE
        return [frames / MEL_RATE]
    if places.frame is not None:
        return [(place_latents(1, 1) + places.frame) / fps for fps in places.fps]
    _, time_factor = places.factors
    frames = place_latents(places.grid[0], config.stride[0], is_causal=True)
    # the first latent covers one frame only
    spread = (frames * time_factor - (time_factor - 1)).clamp(min=0)
    return [spread / fps for fps in places.fps]


def make_tables(config: LtxConfig, places: tuple[Places, ...], /, *, device: torch.device) -> Tensor:
    """Return the rotary tables of several token sequences, concatenated along the tokens."""
    tables = [make_table(config, key, device=device) for key in places]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=-4)


def make_row_table(rows: int, longest: float, width: int, heads: int, device: torch.device) -> Tensor:
    """Return the rotary pairs of a text's rows, L N D/2 2 float32; the position is the row's index.

    Positions are divided by `longest`. `width` is the number of channels of all heads.
    """
    numbers = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, 2)
    return _turn(THETA, width // 2, device, bounds=numbers, longest=longest).unflatten(1, (heads, -1))


def place_latents(count: int, stride: int, is_causal: bool = False) -> Tensor:
    """Return start and end of each latent, count 2; with `is_causal`, the first covers a single frame."""
    edges = torch.arange(count + 1, dtype=torch.float32) * stride
    return (edges + 1 - stride).clamp(min=0).unfold(0, 2, 1) if is_causal else edges.unfold(0, 2, 1)


def _turn(theta: float, count: int, device: torch.device, bounds: Tensor, longest: float) -> Tensor:
    """Return the rotary pairs, n K 2, of the centers of `bounds`, at K = `count` frequencies."""
    frequencies = theta ** torch.linspace(0, 1, count, dtype=torch.float64)
    share = (bounds[:, 0] + bounds[:, 1]) / 2 / longest
    return send_ahead(cos_and_sin(torch.outer(share * 2 - 1, (frequencies * math.pi / 2).float())), device)


def _join(axes: list[Tensor], places: Places, heads: int) -> Tensor:
    """Expand the rotations of each axis, n K 2, to all tokens of the grid, divided by heads: L N D/2 2.

    For each frequency, the pairs of all axes are neighbors. The width may exceed the pairs: the remaining
    channels come first and are not rotated.
    """
    grid = places.grid
    spread = []
    for axis, table in enumerate(axes):  # n K 2
        shape = [1] * len(grid)
        shape[axis] = grid[axis]
        spread.append(table.view(*shape, *table.shape[1:]).expand(*grid, *table.shape[1:]))
    stacked = torch.stack(spread, dim=-2)  # grid K A 2, with A axes
    pairs = stacked.flatten(-3, -2).flatten(0, -3)  # L K*A 2
    num_missing = places.width // 2 - pairs.shape[1]
    ones = pairs.new_ones(len(pairs), num_missing)
    unrotated = torch.stack([ones, torch.zeros_like(ones)], dim=-1)  # cosine 1, sine 0
    return torch.cat([unrotated, pairs], dim=1).unflatten(1, (heads, -1))
