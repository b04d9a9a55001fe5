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
KEYFRAMES, PLACES, SHARES = "keyframe_latents", "keyframe_places", "keyframe_shares"
FIRST = -1  # frame index of an image that guides the entire video


def check_keyframes(images: Sequence[PlacedImage], frames: int) -> None:
    """Raise OptionError if a keyframe's image cannot be opened or its frame index exceeds the video."""
    for image in images:
        check_opens("keyframe", image.path, is_image=True)
        if not FIRST <= image.index < frames:
            raise OptionError(
                f"--keyframe {image.words}: it has the frames 0 to {frames - 1}. Give one of them, or "
                f"{FIRST}, right before the first"
            )


def encode_keyframes(
    images: Sequence[PlacedImage], prepared: Prepared, encode: Callable[[Tensor], Tensor], crf: int
) -> dict[str, Tensor]:
    """Return the conditions of keyframes: their latents, frame indices and given shares; {} without any.

    Args:
        images: The keyframes.
        prepared: The request, or a stage's request: gives width and height.
        encode: Encodes pixels 1 3 F H W.
        crf: H.264 quality to which the images are compressed first.
    """
    if not images:
        return {}
    latents = [encode(image_pixels(image.path, prepared.width, prepared.height, crf=crf)) for image in images]
    return {
        KEYFRAMES: torch.cat(latents, dim=2),
        PLACES: torch.tensor([[image.index for image in images]]),
        SHARES: torch.tensor([[image.share for image in images]], dtype=torch.int16),
    }


def place_generated(count: int, frames: int) -> list[int]:
    """Return the frame indices of `count` keyframes to generate, evenly spaced over the clip."""
    places = numpy.linspace(0, frames - 1, count + 2).round()[1:-1]
    return [int(place) for place in places]


def add_generated(keyframes: Conditions, count: int, frames: int, shape: Sequence[int]) -> Conditions:
    """Append `count` keyframes to generate, which start as noise, to the conditions of the keyframes given.

    Args:
        keyframes: From `take_keyframes`.
        count: Number of generated keyframes.
        frames: Number of frames of the clip.
        shape: Shape of its latents, B C F H W.
    """
    if not count:
        return keyframes
    batch, channels, _, rows, columns = shape
    added = {
        KEYFRAMES: torch.zeros(batch, channels, count, rows, columns),
        PLACES: torch.tensor([place_generated(count, frames)]),
        SHARES: torch.zeros(batch, count, dtype=torch.int16),  # nothing of them is given
    }
    joined: dict[str, Tensor] = {}
    # keyframes of the request come first
    for name, tensor in added.items():
        given = keyframes.get(name)
        axis = 2 if name == KEYFRAMES else 1
        joined[name] = torch.cat([given, tensor], dim=axis) if isinstance(given, Tensor) else tensor
    return joined


def take_keyframes(conditions: dict[str, Any]) -> Conditions:
    """Remove the keyframes from `conditions`, and return them."""
    return {name: conditions.pop(name) for name in (KEYFRAMES, PLACES, SHARES) if name in conditions}


def append_keyframes(
    section: Section, conditions: Conditions, joint: AudioVideoShapes | None, noise: NoiseSource, level: float
) -> Section:
    """Append keyframes to a section's video as further latent frames, to be denoised with it.

    Args:
        section: A section that starts from noise.
        conditions: From `take_keyframes`.
        joint: Shapes of its video and audio; None for video alone.
        noise: Source of the noise of keyframes that do not stay entirely clean.
        level: Noise level at which the section starts.
    """
    start = section.noise
    image, audio = (start, None) if joint is None else joint.split(start)
    clean, frame_indices, shares = (conditions[name] for name in (KEYFRAMES, PLACES, SHARES))
    assert isinstance(clean, Tensor)
    assert isinstance(frame_indices, Tensor)
    assert isinstance(shares, Tensor)
    clean = clean.to(start.device)
    num_generated = int((shares == 0).sum())  # given images have a share above 0
    shares = shares[:, None, :, None, None].expand(1, 1, *clean.shape[2:])
    clean_share = clean_fraction(shares, clean).expand_as(clean)
    # a partly given keyframe has less noise than the section
    levels = level * (1 - clean_share)
    noisy = (1 - levels) * clean + levels * noise.draw(clean.shape).to(clean.device)

    def append(latents: Tensor, keyframes: Tensor) -> Tensor:
        if joint is None:
            return torch.cat([latents, keyframes], dim=2)
        image, audio = joint.split(latents)
        return joint.join(torch.cat([image, keyframes], dim=2), audio)

    held = section.fixed_latents or FixedLatents(torch.zeros_like(start), torch.zeros_like(start))
    given = append_shares(section.overrides.clean_tokens, image, shares)
    overrides = replace(
        section.overrides,
        clean_tokens=replace(
            given, keyframe_indices=tuple(frame_indices[0].tolist()), num_generated=num_generated
        ),
    )
    if joint is not None and audio is not None:
        channels, frames, rows, columns = joint.image
        picture = (channels, frames + clean.shape[2], rows, columns)
        overrides = replace(overrides, joint=replace(joint, image=picture))
    return replace(
        section,
        noise=append(start, noisy),
        fixed_latents=FixedLatents(append(held.clean, clean), append(held.clean_weights, clean_share)),
        overrides=overrides,
        num_visible_frames=image.shape[2],
    )


def append_shares(given: CleanTokens | None, image: Tensor, shares: Tensor) -> CleanTokens:
    """Return the clean share of each latent of a clip, and of the keyframes after it.

    Args:
        given: Clean shares of the clip alone; None if all of it is generated.
        image: Latents of the clip, B C F H W, of which only the shape is used.
        shares: Clean shares of the keyframes, B 1 K H W int16.
    """
    given = given or CleanTokens()
    of_image = given.image
    if of_image is None:
        of_image = torch.zeros(len(image), 1, *image.shape[2:], dtype=torch.int16)
    return replace(given, image=torch.cat([of_image, shares.expand(len(of_image), -1, -1, -1, -1)], dim=2))


def append_learned(
    image: Tensor, given: CleanTokens, keyframes: Tensor, sigmas: Tensor
) -> tuple[Tensor, CleanTokens]:
    """Append keyframes to a training batch's noisy latents, noised unless they are given clean.

    Args:
        image: Noisy latents of the clips, B C F H W.
        given: How much of each latent is given clean in the clips, the same of their keyframes, and noise.
        keyframes: Clean latents in model space, B C K H W.
        sigmas: Noise level of each sample, B.

    Returns:
        The latents with the keyframes, and how much of each latent is given clean.
    """
    _, _, _, rows, columns = keyframes.shape
    assert given.keyframe_strengths is not None
    shares = given.keyframe_strengths[:, None, :, None, None]
    if given.keyframe_noise is not None:
        kept_share = clean_fraction(shares, keyframes)
        levels = sigmas.view(-1, 1, 1, 1, 1) * (1 - kept_share)
        # a clip that may not see a keyframe gets pure noise for it: the clean one would show what is to learn
        levels = levels.masked_fill(kept_share == 0, 1)
        noise = given.keyframe_noise.to(keyframes.device)
        keyframes = ((1 - levels) * keyframes + levels * noise).to(image.dtype)
    shares = shares.expand(-1, -1, -1, rows, columns)
    return torch.cat([image, keyframes], dim=2), append_shares(given, image, shares)


def cut_to_shown(sections: Generator[Section, Tensor, Tensor]) -> Generator[Section, Tensor, Tensor]:
    """Yield the same sections, but cut appended latents (references, keyframes) off the results sent back.

    Returns what `sections` returns.
    """
    section = next(sections)
    # each yield hands out a section to denoise and gets its latents, which the next section may need
    try:
        while True:
            latents = yield section
            joint, shown = section.overrides.joint, section.num_visible_frames
            if shown is not None and joint is None:
                latents = latents[:, :, :shown]
            elif shown is not None and joint is not None:
                image, audio = joint.split(latents)
                latents = joint.join(image[:, :, :shown], audio)
            section = sections.send(latents)
    except StopIteration as end:
        return end.value
