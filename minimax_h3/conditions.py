"""Conditions of a clip of MiniMax-H3 in addition to text: keyframes and references, noise and positions.

Images and clips are a sample of the VAE's posterior, always of the same seed, rounded to float16; the network
gets them at time 0.999, nearly clean. Audio is the mean of its posterior, and clean. Dictionaries use the
names in caches:

    latents_first, latents_last                       keyframes, 1 Z 1 h w
    latents_ref_000_image, ..._video, ..._audio       references, by number: 1 Z f h w, audio 1 Z' 2 A. A clip
                                                      and its audio share a number
    latents_control_000, one_frame_control_indices, one_frame_target_index      of a single image

Source: the released code of MiniMax-H3, as in diffusers.
"""
# Letters: F H W pixels, f h w latents, Z latent channels, A latents of audio in time

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoders.tiles import sample_posterior
from minimax_h3.configs import PATCH
from minimax_h3.model import IMAGE_CLEAN_FRACTION, H3Condition
from minimax_h3.positions import (
    TIME_PER_FRAME,
    AudioPosition,
    ImageGrid,
    ImagePosition,
    clip_duration,
    last_frame_time,
)
from minimax_h3.presentation import AUDIO, IMAGE, VIDEO
from minimax_h3.video_vae import H3VideoVae
from protocols.data import Conditions
from protocols.family import NoiseSource

SEED = 42  # seed for the posterior of every condition; the seed of the clip does not matter
LOG_VARIANCES = (-30.0, 20.0)  # limits of the posterior's log variances
FIRST, LAST = "latents_first", "latents_last"
REFERENCE = "latents_ref_"
CONTROL = "latents_control_"
TARGET_INDEX, CONTROL_INDICES = "one_frame_target_index", "one_frame_control_indices"
_REFERENCE_KEY = re.compile(rf"{REFERENCE}([0-9]+)_({IMAGE}|{VIDEO}|{AUDIO})")


def reference_key(number: int, kind: str) -> str:
    """Return the condition key of a reference's latents; `kind` is IMAGE, VIDEO, or AUDIO (also a clip's)."""
    return f"{REFERENCE}{number:03d}_{kind}"


def control_key(number: int) -> str:
    """Return the condition key for the latents of a control image."""
    return f"{CONTROL}{number:03d}"


@torch.no_grad()
def encode_condition(vae: H3VideoVae, pixels: Tensor) -> Tensor:
    """Encode a keyframe, reference image or clip as 1 Z f h w float32 on the CPU.

    The latents are normalized and not noised yet. `pixels` are 1 3 F H W uint8, F = 1 or 17n + 5.
    """
    moments = vae.encode_moments(pixels)
    generator = torch.Generator().manual_seed(SEED)
    latents = sample_posterior(moments, [generator], LOG_VARIANCES)
    rounded = latents.to(torch.float16).float()  # as the model was trained
    normalized = vae.normalize(rounded)
    return normalized if normalized.is_meta else normalized.cpu()  # a rehearsal of memory use has no values


def add_condition_noise(
    latents: Tensor, noise: Tensor, clean_fraction: float = IMAGE_CLEAN_FRACTION
) -> Tensor:
    """Mix a fraction of clean latents with noise, as the network expects of conditions."""
    # 1 - fraction is rounded, as released
    fraction = torch.tensor(clean_fraction, dtype=torch.float32, device=latents.device)
    return fraction * latents + (1 - fraction) * noise


def is_visual(key: str) -> bool:
    """Return whether a cache key names latents of an image or clip (which get noise), not of audio."""
    match = _REFERENCE_KEY.fullmatch(key)
    if match is not None:
        return match[2] != AUDIO
    return key in (FIRST, LAST) or key.startswith(CONTROL)


def sort_condition_keys(keys: Iterable[str]) -> list[str]:
    """Return the condition names in order: first and last frame, controls, references by number.

    Other names are left out. Noise is drawn in this order. A clip's audio comes before the clip.
    """
    names = set(keys)
    frames = [key for key in (FIRST, LAST) if key in names]
    controls = sorted(key for key in names if key.startswith(CONTROL))
    references = [key for key in names if _REFERENCE_KEY.fullmatch(key)]
    return [*frames, *controls, *sorted(references, key=_order_reference)]


def _order_reference(key: str) -> tuple[int, bool]:
    match = _REFERENCE_KEY.fullmatch(key)
    assert match is not None, "only references are sorted"
    return int(match[1]), match[2] != AUDIO


def add_noise_to_conditions(conditions: Mapping[str, Any], noise: NoiseSource) -> dict[str, Tensor]:
    """Return the conditions, with a little noise added to images and clips.

    The noise is drawn for one after the other, in the order of the conditions.
    """
    noised = {}
    for key in sort_condition_keys(conditions):
        latents = conditions[key]
        if is_visual(key):
            drawn = noise.draw(latents.shape).to(latents.device)
            latents = add_condition_noise(latents, drawn)
        noised[key] = latents
    return noised


@dataclass(frozen=True)
class PositionedConditions:
    """Conditions with their positions, and the time position where the clip to denoise starts."""

    conditions: tuple[H3Condition, ...]
    start_time: float


def position_conditions(
    conditions: Conditions, sample: int, num_text: int, target: ImageGrid
) -> PositionedConditions:
    """Return a sample's conditions with positions; their times start after the text tokens.

    Keyframes have the times of the first and the last frame. References come one after another, followed by
    the frames to generate.

    Args:
        conditions: Conditions of the batch; images and clips are noised already. Other names are ignored.
        sample: Index of the sample.
        num_text: Number of tokens of the text.
        target: Grid of the frames to generate.
    """
    text_end = float(num_text)
    latents_by_key = {key: conditions[key][sample].unsqueeze(0) for key in sort_condition_keys(conditions)}
    control_times = _list_control_times(conditions, sample, text_end)
    # The keyframes and control images with their times; references are left out
    # The clip has `frames` latent frames, and its first keyframe is at `start_time`.
    remaining_control_times = iter(control_times)
    positioned = []
    for key, latents in latents_by_key.items():
        if key == FIRST:
            positioned.append(_position_image(latents, text_end))
        elif key == LAST:
            positioned.append(_position_image(latents, last_frame_time(text_end, target.frames)))
        elif key.startswith(CONTROL):
            positioned.append(_position_image(latents, next(remaining_control_times)))
    keyframes = positioned
    references = {key: latents for key, latents in latents_by_key.items() if key.startswith(REFERENCE)}
    positioned_references, start_time = _position_references(references, text_end, target)
    target_index = conditions.get(TARGET_INDEX)
    if target_index is not None:
        start_time += TIME_PER_FRAME * float(target_index[sample])
    return PositionedConditions((*keyframes, *positioned_references), start_time)


def _position_references(
    references: Mapping[str, Tensor], start_time: float, target: ImageGrid
) -> tuple[list[H3Condition], float]:
    """Place references one after another, starting at `start_time`."""
    # Return them and the end of the last one.
    # A clip and its audio start together; the audio comes first in `references`.
    time = start_time
    positioned: list[H3Condition] = []
    num_audio_latents = 0  # length of the audio that belongs to the next clip
    for key, latents in references.items():
        clip_key = key.removesuffix(AUDIO) + VIDEO
        if key.endswith(IMAGE):
            positioned.append(_position_image(latents, time))
            time += 1.0
            num_audio_latents = 0
        elif not key.endswith(AUDIO):
            positioned.append(_position_image(latents, time))
            # the next reference starts after both the clip and its audio
            time += max(float(num_audio_latents), clip_duration(latents.shape[2]))
            num_audio_latents = 0
        elif clip_key in references:
            # audio of a clip: its two channels are at the left and right edges of the clip's grid
            num_audio_latents = latents.shape[3]
            clip_grid = get_token_grid(references[clip_key])
            positioned.append(H3Condition(latents, AudioPosition(num_audio_latents, time, clip_grid)))
        else:  # audio without a clip uses the target's grid
            positioned.append(H3Condition(latents, AudioPosition(latents.shape[3], time, target)))
            time += latents.shape[3]
            num_audio_latents = 0
    return positioned, time


def _list_control_times(conditions: Conditions, sample: int, text_end: float) -> list[float]:
    """Return the times of a single image's control images, as positions for the rotary embedding."""
    indices = conditions.get(CONTROL_INDICES)
    if indices is None:
        return []
    return [text_end + TIME_PER_FRAME * float(index) for index in indices[sample]]


def get_token_grid(latents: Tensor) -> ImageGrid:
    """Return the token grid of latents, B Z f h w."""
    return ImageGrid(latents.shape[2], latents.shape[3] // PATCH, latents.shape[4] // PATCH)


def _position_image(latents: Tensor, start_time: float) -> H3Condition:
    return H3Condition(latents, ImagePosition(get_token_grid(latents), start_time))
