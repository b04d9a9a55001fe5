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


class TokenPositions(NamedTuple):
    """Positions of tokens that determine their rotary table."""

    dim: int  # channels of all heads, N * D
    grid: tuple[int, ...]  # latent frames, rows and columns of a video, or the number of audio latents
    # frame rate of each sample, or one for all; () for audio, whose latents have their own rate
    fps: tuple[float, ...] = ()
    time_only: bool = False  # without rows and columns: all tokens of a frame share its rotation
    # factors on the sides and the seconds of a reference, so that it covers the same range as its target
    size_factor: int = 1
    time_factor: int = 1
    frame_index: int | None = None  # frame index of a keyframe; None for a clip that starts at frame 0
    ends_before_audio: bool = False  # audio that ends one latent before second 0; else it begins there


def make_table(config: LtxConfig, positions: TokenPositions, /, *, device: torch.device) -> Tensor:
    """Return the rotary table, (cosine, sine) pairs L N D/2 2, or B L N D/2 2 if samples differ in fps."""
    num_axes = 1 if positions.time_only or not positions.fps else 3
    num_frequencies = positions.dim // (2 * num_axes)
    make_rotations = partial(_make_rotations, config.rope_theta, num_frequencies, device)
    spatial = []  # rotations by row and by column
    for axis in range(1, num_axes):
        pixels = latent_bounds(positions.grid[axis], config.stride[axis]) * positions.size_factor
        spatial.append(make_rotations(pixels, config.max_positions[axis]))
    tables = []
    for seconds in _list_seconds(config, positions):
        temporal = make_rotations(seconds, config.max_positions[0])
        tables.append(_expand_to_tokens([temporal, *spatial], positions, config.num_heads))
    return tables[0] if len(tables) == 1 else torch.stack(tables)


def _list_seconds(config: LtxConfig, positions: TokenPositions) -> list[Tensor]:
    """Return each latent's start and end in seconds: a tensor per frame rate, or one for audio."""
    if not positions.fps:
        mel_frames = latent_bounds(positions.grid[0], MEL_STRIDE, is_causal=True)
        if positions.ends_before_audio:
            mel_frames = mel_frames - mel_frames[-1, 1] - MEL_STRIDE
        return [mel_frames / MEL_RATE]
    if positions.frame_index is not None:
        return [(latent_bounds(1, 1) + positions.frame_index) / fps for fps in positions.fps]
    frames = latent_bounds(positions.grid[0], config.stride[0], is_causal=True)
    # the first latent covers one frame only
    spread = (frames * positions.time_factor - (positions.time_factor - 1)).clamp(min=0)
    return [spread / fps for fps in positions.fps]


def make_tables(
    config: LtxConfig, positions: tuple[TokenPositions, ...], /, *, device: torch.device
) -> Tensor:
    """Return the rotary tables of several token sequences, concatenated along the tokens."""
    tables = [make_table(config, part, device=device) for part in positions]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=-4)


def make_text_table(
    num_tokens: int, max_position: float, dim: int, num_heads: int, device: torch.device
) -> Tensor:
    """Return the rotary pairs of a text's tokens, L N D/2 2 float32; the position is the token's index.

    Positions are divided by `max_position`. `dim` is the number of channels of all heads.
    """
    indices = torch.arange(num_tokens, dtype=torch.float32)[:, None].expand(-1, 2)
    rotations = _make_rotations(THETA, dim // 2, device, bounds=indices, max_position=max_position)
    return rotations.unflatten(1, (num_heads, -1))


def latent_bounds(count: int, stride: int, is_causal: bool = False) -> Tensor:
    """Return start and end of each latent, count 2; with `is_causal`, the first covers only one frame."""
    edges = torch.arange(count + 1, dtype=torch.float32) * stride
    return (edges + 1 - stride).clamp(min=0).unfold(0, 2, 1) if is_causal else edges.unfold(0, 2, 1)


def _make_rotations(
    theta: float, num_frequencies: int, device: torch.device, bounds: Tensor, max_position: float
) -> Tensor:
    """Return the rotary pairs, n K 2, of the centers of `bounds`, at K = `num_frequencies` frequencies."""
    frequencies = theta ** torch.linspace(0, 1, num_frequencies, dtype=torch.float64)
    fractions = (bounds[:, 0] + bounds[:, 1]) / 2 / max_position
    return send_ahead(
        cos_and_sin(torch.outer(fractions * 2 - 1, (frequencies * math.pi / 2).float())), device
    )


def _expand_to_tokens(axes: list[Tensor], positions: TokenPositions, num_heads: int) -> Tensor:
    """Expand the rotations of each axis, n K 2, to all tokens of the grid, divided by heads: L N D/2 2."""
    # For each frequency, the pairs of all axes are neighbors. The width may exceed the pairs: the remaining
    # channels come first and are not rotated.
    grid = positions.grid
    expanded = []
    for axis, rotations in enumerate(axes):  # n K 2
        shape = [1] * len(grid)
        shape[axis] = grid[axis]
        by_axis = rotations.view(*shape, *rotations.shape[1:])
        expanded.append(by_axis.expand(*grid, *rotations.shape[1:]))
    stacked = torch.stack(expanded, dim=-2)  # grid K A 2, with A axes
    pairs = stacked.flatten(-3, -2).flatten(0, -3)  # L K*A 2
    num_unrotated = positions.dim // 2 - pairs.shape[1]
    ones = pairs.new_ones(len(pairs), num_unrotated)
    unrotated = torch.stack([ones, torch.zeros_like(ones)], dim=-1)  # cosine 1, sine 0
    return torch.cat([unrotated, pairs], dim=1).unflatten(1, (num_heads, -1))
