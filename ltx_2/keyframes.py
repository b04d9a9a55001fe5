"""Keyframes: images that guide a video at one of its frames, but are not part of the result.

Their latents are the last frames of the noisy latents, with the positions of a single frame. They are clean,
or partly noisy if their strength is below 1, and are removed after the network or the denoising loop. Source:
the released pipelines of LTX-2.
"""
# Letters: B batch, C channels, F H W latents of a video, K keyframes

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from ltx_2.given_media_options import PlacedImage
from modules.errors import OptionError
from modules.media.pixels import image_pixels
from protocols.data import AudioVideoShapes, Conditions
from protocols.family import NoiseSource
from protocols.requests import Prepared, check_opens
from protocols.steps import CleanTokens, FixedLatents, Section, clean_fraction

# names of conditions: clean latents 1 C K H W, their frame indices in the video 1 K int64, and how much of
# each is kept, as in `CleanTokens`, 1 K int16
KEYFRAMES, INDICES, WEIGHTS = "keyframe_latents", "keyframe_places", "keyframe_shares"
FIRST = -1  # frame index of an image that guides the entire video


def check_keyframes(images: Sequence[PlacedImage], frames: int) -> None:
    """Raise OptionError if a keyframe's image cannot be opened or its frame index exceeds the video."""
    for image in images:
        check_opens("keyframe", image.path, is_image=True)
        if not FIRST <= image.index < frames:
            raise OptionError(
                f"--keyframe {image.option_value}: it has the frames 0 to {frames - 1}. Pass one of them, or "
                f"{FIRST}, right before the first"
            )


def encode_keyframes(
    images: Sequence[PlacedImage], prepared: Prepared, encode: Callable[[Tensor], Tensor], crf: int
) -> dict[str, Tensor]:
    """Return the conditions of keyframes: latents, frame indices and clean weights; {} without any.

    Args:
        images: The keyframes.
        prepared: The request, or a stage's request, for width and height.
        encode: Encodes pixels 1 3 F H W.
        crf: H.264 quality to which the images are compressed first.
    """
    if not images:
        return {}
    latents = [encode(image_pixels(image.path, prepared.width, prepared.height, crf=crf)) for image in images]
    return {
        KEYFRAMES: torch.cat(latents, dim=2),
        INDICES: torch.tensor([[image.index for image in images]]),
        WEIGHTS: torch.tensor([[image.clean_weight for image in images]], dtype=torch.int16),
    }


def space_generated_keyframes(count: int, num_frames: int) -> list[int]:
    """Return the frame indices of `count` keyframes to generate, evenly spaced over the clip."""
    indices = numpy.linspace(0, num_frames - 1, count + 2).round()[1:-1]
    return [int(index) for index in indices]


def add_generated_keyframes(
    keyframes: Conditions, count: int, num_frames: int, shape: Sequence[int]
) -> Conditions:
    """Append `count` keyframes to generate, which start as noise, to the conditions of given keyframes.

    Args:
        keyframes: Conditions of the given keyframes, from `pop_keyframes`.
        count: Number of keyframes to generate.
        num_frames: Number of frames of the clip.
        shape: Shape of its latents, B C F H W.
    """
    if not count:
        return keyframes
    batch, channels, _, rows, columns = shape
    generated = {
        KEYFRAMES: torch.zeros(batch, channels, count, rows, columns),
        INDICES: torch.tensor([space_generated_keyframes(count, num_frames)]),
        WEIGHTS: torch.zeros(batch, count, dtype=torch.int16),  # they start as pure noise
    }
    joined: dict[str, Tensor] = {}
    # keyframes of the request come first
    for name, tensor in generated.items():
        earlier = keyframes.get(name)
        axis = 2 if name == KEYFRAMES else 1  # keyframe axis
        joined[name] = torch.cat([earlier, tensor], dim=axis) if isinstance(earlier, Tensor) else tensor
    return joined


def pop_keyframes(conditions: dict[str, Any]) -> Conditions:
    """Remove the keyframes from `conditions`, and return them."""
    return {name: conditions.pop(name) for name in (KEYFRAMES, INDICES, WEIGHTS) if name in conditions}


def append_keyframes(
    section: Section,
    conditions: Conditions,
    joint: AudioVideoShapes | None,
    noise: NoiseSource,
    start_sigma: float,
) -> Section:
    """Append keyframes to a section's video as additional latent frames, which are denoised with it.

    1. Add noise to the keyframes, less to those that are partly clean.
    2. Record which latents stay clean, for the network (tokens) and for the sampler (fixed latents).
    3. Lengthen the section's noise, and note how many frames are visible in the result.

    Args:
        section: A section that starts from noise.
        conditions: Latents, indices and weights of the keyframes, from `pop_keyframes`.
        joint: Shapes of its video and audio; None for video alone.
        noise: Source of the noise of keyframes that do not stay entirely clean.
        start_sigma: Noise level at which the section starts.
    """
    start = section.noise
    image = start if joint is None else joint.split(start)[0]
    keyframes = _get_tensor(conditions, KEYFRAMES).to(start.device)
    keyframe_weights = _get_tensor(conditions, WEIGHTS)
    weights = keyframe_weights[:, None, :, None, None].expand(1, 1, *keyframes.shape[2:])
    fractions = clean_fraction(weights, keyframes).expand_as(keyframes)
    # a partly clean keyframe has less noise than the section
    sigmas = start_sigma * (1 - fractions)
    noisy = (1 - sigmas) * keyframes + sigmas * noise.draw(keyframes.shape).to(keyframes.device)

    fixed = section.fixed_latents or FixedLatents(torch.zeros_like(start), torch.zeros_like(start))
    clean_tokens = replace(
        append_clean_weights(section.overrides.clean_tokens, image, weights),
        keyframe_indices=tuple(_get_tensor(conditions, INDICES)[0].tolist()),
        num_generated=int((keyframe_weights == 0).sum()),  # given images have a weight above 0
    )
    overrides = replace(section.overrides, clean_tokens=clean_tokens)
    if joint is not None:
        overrides = replace(overrides, audio_video_shapes=_lengthen_video(joint, keyframes.shape[2]))
    return replace(
        section,
        noise=_append_frames(start, noisy, joint),
        fixed_latents=FixedLatents(
            _append_frames(fixed.clean, keyframes, joint),
            _append_frames(fixed.clean_weights, fractions, joint),
        ),
        overrides=overrides,
        num_visible_frames=image.shape[2],
    )


def _get_tensor(conditions: Conditions, name: str) -> Tensor:
    tensor = conditions[name]
    assert isinstance(tensor, Tensor)
    return tensor


def _lengthen_video(joint: AudioVideoShapes, num_frames: int) -> AudioVideoShapes:
    """Return the shapes of video and audio with more latent frames of the video."""
    channels, frames, rows, columns = joint.image
    return replace(joint, image=(channels, frames + num_frames, rows, columns))


def _append_frames(latents: Tensor, frames: Tensor, joint: AudioVideoShapes | None) -> Tensor:
    """Append latent frames to the video in `latents`, which may be joined with audio."""
    if joint is None:
        return torch.cat([latents, frames], dim=2)
    image, audio = joint.split(latents)
    return joint.join(torch.cat([image, frames], dim=2), audio)


def append_clean_weights(
    clean_tokens: CleanTokens | None, image: Tensor, keyframe_weights: Tensor
) -> CleanTokens:
    """Append the clean weights of keyframes to those of a clip; a weight says how clean a latent stays.

    Args:
        clean_tokens: Clean weights of the clip alone; None if all of it is generated.
        image: Latents of the clip, B C F H W; only their shape is used.
        keyframe_weights: Clean weights of the keyframes, B 1 K H W int16.
    """
    clean_tokens = clean_tokens or CleanTokens()
    weights = clean_tokens.image
    if weights is None:
        weights = torch.zeros(len(image), 1, *image.shape[2:], dtype=torch.int16)
    keyframe_weights = keyframe_weights.expand(len(weights), -1, -1, -1, -1)
    return replace(clean_tokens, image=torch.cat([weights, keyframe_weights], dim=2))


def append_training_keyframes(
    image: Tensor, clean_tokens: CleanTokens, keyframes: Tensor, sigmas: Tensor
) -> tuple[Tensor, CleanTokens]:
    """Append keyframes to a training batch's noisy latents, noised unless they are entirely clean.

    Args:
        image: Noisy latents of the clips, B C F H W.
        clean_tokens: How clean each latent of the clips and each keyframe is, and noise.
        keyframes: Clean latents in model space, B C K H W.
        sigmas: Noise level of each sample, B.

    Returns:
        The latents with the keyframes, and how clean each latent of both is.
    """
    _, _, _, rows, columns = keyframes.shape
    assert clean_tokens.keyframe_strengths is not None
    weights = clean_tokens.keyframe_strengths[:, None, :, None, None]
    if clean_tokens.keyframe_noise is not None:
        fractions = clean_fraction(weights, keyframes)
        keyframe_sigmas = sigmas.view(-1, 1, 1, 1, 1) * (1 - fractions)
        # a clip that may not see a keyframe gets pure noise for it: the clean one would reveal the target
        keyframe_sigmas = keyframe_sigmas.masked_fill(fractions == 0, 1)
        noise = clean_tokens.keyframe_noise.to(keyframes.device)
        keyframes = ((1 - keyframe_sigmas) * keyframes + keyframe_sigmas * noise).to(image.dtype)
    weights = weights.expand(-1, -1, -1, rows, columns)
    return torch.cat([image, keyframes], dim=2), append_clean_weights(clean_tokens, image, weights)


def cut_appended_frames(sections: Generator[Section, Tensor, Tensor]) -> Generator[Section, Tensor, Tensor]:
    """Pass sections on to the sampler, and cut appended latents (references, keyframes) off their results.

    Returns what the generator `sections` returns.
    """
    section = next(sections)
    # each yield hands out a section to denoise and gets its latents, which the next section may need
    try:
        while True:
            latents = yield section
            joint, num_frames = section.overrides.audio_video_shapes, section.num_visible_frames
            if num_frames is not None and joint is None:
                latents = latents[:, :, :num_frames]
            elif num_frames is not None and joint is not None:
                image, audio = joint.split(latents)
                latents = joint.join(image[:, :, :num_frames], audio)
            section = sections.send(latents)
    except StopIteration as end:
        return end.value
