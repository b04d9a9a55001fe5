"""References of LTX-2 (IC-LoRA): read and encode them, and find the factors that a LoRA has learned.

Their tokens are clean, and have time 0 and positions of their own, starting at 0: pixels times the size
factor, and seconds times the time factor S, minus (S - 1) frames. Source: the released code of LTX-2.
"""

import logging
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.nn.functional as functional
from torch import Tensor

from ltx_2.configs import LATENT
from ltx_2.reference_options import (
    FRAMES,
    MAX_REFERENCES,
    SIZE_FACTOR,
    TIME_FACTOR,
    Ltx2GivenReferences,
    Ltx2ReferenceOptions,
)
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.integers import ceil_div
from modules.media.pixels import to_pixels
from modules.media.reading import is_single_image, read_image, resize_cover, video_frames
from modules.options import override_options
from modules.text_files import iterate_lora_metadata
from protocols.data import REFERENCE_LATENTS, AudioVideoShapes, Conditions, LatentSpec
from protocols.family import NoiseSource
from protocols.requests import count_frames_up_to
from protocols.rules import ReferenceRules
from protocols.steps import Section

logger = logging.getLogger(__name__)
# condition: strength of the attention between references and video
REFERENCE_STRENGTHS = "reference_strengths"
# option of generation -> names of the factor in the metadata of LoRAs
FACTOR_KEYS = {
    "reference_downscale": SIZE_FACTOR,
    "reference_temporal_scale": TIME_FACTOR,
    FRAMES: (FRAMES,),
}


def select_reference_frames(frames: Tensor, rules: ReferenceRules, frame_step: int) -> Tensor:
    """Return the frames of a reference, B F H W C, that are encoded.

    With the time factor S, their indices are 0, 1, 1 + S, 1 + 2S, ...; their number is 8n + 1.
    """
    thinned = torch.cat([frames[:, :1], frames[:, 1 :: rules.time_factor]], dim=1)
    return thinned[:, : count_reference_frames(frames.shape[1], rules, frame_step)]


def count_reference_frames(frames: int, rules: ReferenceRules, frame_step: int) -> int:
    """Return how many of a reference's `frames` are encoded: subsampled, then cut to whole latent frames."""
    # frame 0, then every `time_factor`-th from frame 1
    count = 1 + len(range(1, frames, rules.time_factor))
    maximum = min(count, rules.max_frames or count)
    return (maximum - 1) // frame_step * frame_step + 1


def check_references(
    paths: Sequence[Path], mask: Path | None, frames: int, rules: ReferenceRules, latent: LatentSpec
) -> None:
    """Decode references and their mask once, to find errors before a text encoder is loaded.

    `frames` is the length of the result. Raises MediaError if one cannot be decoded, OptionError if the mask
    is shorter than a reference.
    """
    for path in paths:
        num_frames = 1 if is_single_image(path) else count_frames_up_to(path, frames)
        num_encoded = count_reference_frames(num_frames, rules, latent.frame_step)
        if mask is None or is_single_image(mask):
            continue
        # the mask must be as long as the encoded frames; it is subsampled in the same way
        max_mask_frames = (num_encoded - 1) * rules.time_factor + 1
        mask_frames = count_frames_up_to(mask, max_mask_frames)
        num_encoded_mask = count_reference_frames(mask_frames, rules, latent.frame_step)
        check_mask_length(mask, num_encoded_mask, num_encoded)


def check_mask_length(mask: Path, frames: int, needed: int) -> None:
    """Raise OptionError if a mask has fewer frames than `needed`, the encoded frames of a reference."""
    if frames < needed:
        raise OptionError(
            f"--conditioning-attention-mask {mask}: it has {frames} usable frames, but a reference has "
            f"{needed}. Pass an image, or a clip as long as the reference"
        )


def reference_key(number: int) -> str:
    """Return the cache key of a reference's latents."""
    return f"{REFERENCE_LATENTS}_{number}"


def get_reference_latents(cond: Conditions) -> tuple[Tensor, ...]:
    """Return the reference latents among conditions, B C f h w each, in order."""
    names = sorted(name for name in cond if name.startswith(REFERENCE_LATENTS))
    references = [cond[name] for name in names]
    return tuple(latents for latents in references if isinstance(latents, Tensor))


def join_tokens(references: Sequence[Tensor]) -> Tensor:
    """Concatenate reference latents as tokens, B C N."""
    return torch.cat([latents.flatten(2) for latents in references], dim=2)  # B C N


def pack(latents: Tensor, tokens: Tensor) -> Tensor:
    """Append reference tokens, B C N, to latents, B C F H W, padding with zeros to whole frames."""
    tokens = functional.pad(tokens, (0, -tokens.shape[2] % math.prod(latents.shape[3:])))
    return torch.cat([latents, tokens.unflatten(2, (-1, *latents.shape[3:]))], dim=2)


def unpack(packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return the latents and the `count` tokens after them, B C N."""
    frames = packed.shape[2] - ceil_div(count, math.prod(packed.shape[3:]))
    return packed[:, :, :frames], packed[:, :, frames:].flatten(2)[..., :count]


@dataclass(frozen=True)
class NoisyReferences:
    """Reference tokens, B C N, that are denoised together with the video and follow its frames."""

    clean: Tensor
    noisy: Tensor
    strength: float  # fraction of the clean reference at the start; the rest is noise

    def unflatten_like(self, references: Sequence[Tensor]) -> list[Tensor]:
        """Return the noisy reference tokens in the shapes of `references`, B C f h w each."""
        counts = [latents[0, 0].numel() for latents in references]
        parts = self.noisy.split(counts, dim=2)
        return [part.unflatten(2, clean.shape[2:]) for part, clean in zip(parts, references, strict=True)]

    def pack_velocity(self, velocity: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """Return the video's velocity, followed by the references' velocity, as one flat tensor.

        Args:
            velocity: B C N of the references' tokens, then the video's.
            latents: Latents of the video, B C F H W, for their shape.
            sigma: The video's noise level, B.
        """
        counts = [self.clean.shape[2], latents[0, 0].numel()]
        # the references' tokens come first
        reference_velocity, image_velocity = velocity.split(counts, dim=2)
        reference_velocity = compute_reference_velocity(
            reference_velocity,
            noisy=self.noisy,
            clean=self.clean,
            strength=self.strength,
            sigma=sigma,
        )
        return pack(image_velocity.unflatten(2, latents.shape[2:]), reference_velocity)


def split_audio(latents: Tensor, joint: AudioVideoShapes | None) -> tuple[Tensor, Tensor | None]:
    """Split latents into video and audio by the shapes in `joint`; None for a clip without audio."""
    if joint is None:
        return latents, None
    return joint.split(latents)


def split_noisy_references(
    packed: Tensor, references: Sequence[Tensor], strength: float
) -> tuple[Tensor, NoisyReferences]:
    """Split packed latents into the noisy video and its noisy references; `references` are clean."""
    clean = join_tokens(references)
    image, noisy = unpack(packed, clean.shape[2])
    return image, NoisyReferences(clean, noisy, strength)


def with_noisy_references(
    sections: Generator[Section, Tensor, Tensor],
    strength: float,
    joint: AudioVideoShapes | None,
    noise: NoiseSource,
) -> Generator[Section, Tensor, Tensor]:
    """Wrap sections so that references are denoised together with the video, as frames appended to it.

    Args:
        sections: The sections; those without references are yielded unchanged.
        strength: Fraction of each reference at the start; the rest is noise, drawn token by token.
        joint: Shapes of video and audio, for sections whose overrides have no `audio_video_shapes`; None
            without audio.
        noise: Source of the noise.
    """
    section = next(sections)
    # each yield hands out a section to denoise and gets its latents, which the next section may need
    try:
        while True:
            if get_reference_latents(section.positive):
                latents = yield from _denoise_with_references(section, strength, joint, noise)
            else:
                latents = yield section
            section = sections.send(latents)
    except StopIteration as end:
        return end.value


def _denoise_with_references(
    section: Section, strength: float, joint: AudioVideoShapes | None, noise: NoiseSource
) -> Generator[Section, Tensor, Tensor]:
    """Yield a section with its references appended to its video; return its latents without them."""
    joint = section.overrides.audio_video_shapes or joint
    image, audio = split_audio(section.noise, joint)
    frames = image.shape[2]
    references = join_tokens(get_reference_latents(section.positive)).to(image.device)
    packed = pack(image, _blend_with_noise(references, strength, noise))
    # a yield hands the section to the sampler, and returns its denoised latents
    if joint is None or audio is None:
        latents = yield replace(section, noise=packed, num_visible_frames=frames)
        return latents[:, :, :frames]
    packed_joint = AudioVideoShapes((packed.shape[1], *packed.shape[2:]), joint.audio)
    overrides = replace(section.overrides, audio_video_shapes=packed_joint)
    joint_noise = packed_joint.join(packed, audio)
    latents = yield replace(section, noise=joint_noise, overrides=overrides, num_visible_frames=frames)
    image, audio = packed_joint.split(latents)
    return joint.join(image[:, :, :frames], audio)


def _blend_with_noise(references: Tensor, strength: float, noise: NoiseSource) -> Tensor:
    """Mix `strength` parts of clean references, 1 C N, with noise drawn in token order."""
    _, channels, count = references.shape
    drawn = noise.draw((1, count, channels)).to(references.device).mT
    return strength * references + (1 - strength) * drawn


def compute_reference_velocity(
    velocity: Tensor, noisy: Tensor, clean: Tensor, strength: float, sigma: Tensor
) -> Tensor:
    """Return the velocity, B C N, that denoises references along with the video at noise level `sigma`, B.

    The network predicted `velocity` at the lower noise level (1 - strength) * sigma. The clean latents that
    follow from it are mixed with `strength` parts of `clean`. Source: the released code of LTX-2.
    """
    return (1 - strength) ** 2 * velocity + strength * (noisy - clean) / sigma.view(-1, 1, 1)


def read_pixels(path: Path, size: tuple[int, int, int], rules: ReferenceRules, latent: LatentSpec) -> Tensor:
    """Read a clip, image folder or image, 1 3 f h w in -1..1, cropped to the target's reduced size.

    `size` is the target's width, height and frames. A shorter clip is read to its end.
    """
    width, height, length = size
    reduced = (width // rules.size_factor, height // rules.size_factor)
    images = [read_image(path)] if is_single_image(path) else islice(video_frames(path), length)
    frames = []
    for image in images:
        colors = numpy.ascontiguousarray(image[..., :3])  # without an alpha channel
        frames.append(resize_cover(colors, reduced))
    clip = torch.from_numpy(numpy.stack(frames)[None])  # 1 F h w 3
    return to_pixels(select_reference_frames(clip, rules, latent.frame_step))


def read_strengths(
    mask: Path, reference_pixels: Sequence[Tensor], rules: ReferenceRules, latent: LatentSpec
) -> Tensor:
    """Read a mask as the strength of each reference token, 1 M float32, from 0 (black) to 1 (white).

    Args:
        mask: Path of the mask.
        reference_pixels: Pixels of each reference as it is encoded, 1 3 f h w.
        rules: How much smaller and shorter references are than the result.
        latent: The latent space.

    Raises:
        OptionError: If a clip is shorter than a reference.
    """
    strengths = []
    for reference in reference_pixels:
        _, _, frames, height, width = reference.shape
        size = (  # size of the result, because `read_pixels` reduces it to the reference's size
            width * rules.size_factor,
            height * rules.size_factor,
            (frames - 1) * rules.time_factor + 1,
        )
        pixels = read_pixels(mask, size, rules, latent)
        white = (pixels.mean(1, keepdim=True) + 1) / 2  # 1 1 f h w, 0..1
        if is_single_image(mask):  # the same for every frame
            white = white.expand((-1, -1, frames, -1, -1))
        check_mask_length(mask, white.shape[2], frames)
        # The mean brightness of the pixels of each latent, from 1 1 f h w
        # The first latent frame has one pixel frame, the others `frame_step`: the first is repeated to pool
        # evenly.
        first = white[:, :, :1].expand((-1, -1, latent.frame_step - 1, -1, -1))
        repeated = torch.cat([first, white], dim=2)
        strengths.append(
            functional.avg_pool3d(
                repeated, (latent.frame_step, latent.pixel_step, latent.pixel_step)
            ).flatten(1)
        )
    return torch.cat(strengths, dim=1)


def check_sides(width: int, height: int, rules: ReferenceRules) -> None:
    """Raise OptionError if a reduced reference's size is not a multiple of a latent's pixel size."""
    step = rules.step * rules.size_factor
    if width % step or height % step:
        raise OptionError(
            f"--video_size {height} {width}: with references {rules.size_factor} times smaller "
            f"(--reference_downscale), sides are multiples of {step}. Use such a size"
        )


def read_reference_factors(loras: Sequence[Path]) -> dict[str, int]:
    """Return the reference factors and frame limit recorded in LoRAs' metadata, keyed by generation option.

    Raises OptionError if values differ, or one is not a whole number.
    """
    factors: dict[str, int] = {}
    sources: dict[str, Path] = {}  # the LoRA that a factor was read from first
    for path, metadata in iterate_lora_metadata(loras):
        for option, names in FACTOR_KEYS.items():
            factor = _read_reference_factor(path, metadata, names)
            if factor is None:
                continue
            first_factor = factors.setdefault(option, factor)
            first_path = sources.setdefault(option, path)
            if first_factor != factor:
                text = next(metadata[name] for name in names if name in metadata)
                raise OptionError(
                    f"--lora_weight {path} was trained on references with {names[0]} {text}, {first_path} "
                    f"with {first_factor}: they cannot be combined. Pass one of them"
                )
    return factors


def _read_reference_factor(path: Path, metadata: Mapping[str, str], names: Sequence[str]) -> int | None:
    """Return the integer factor in a LoRA's metadata under one of `names`; None if it is missing."""
    texts = [metadata[name] for name in names if name in metadata]
    if not texts:
        return None
    if len(set(texts)) > 1 or not re.fullmatch("0{0,4}[1-9][0-9]{0,4}", texts[0]):
        shortened = shorten(" and ".join(texts), 60)
        raise OptionError(f"--lora_weight {path}: its metadata says {names[0]} = {shortened}")
    return int(texts[0])


def resolve_reference_factors(options: Ltx2GivenReferences, loras: Sequence[Path]) -> Ltx2GivenReferences:
    """Fill in unset reference factors (how much smaller references are) from the metadata of LoRAs.

    A typed factor is kept, with a warning if a LoRA records another one.
    """
    factors = read_reference_factors(loras)
    if not factors and options.paths and options.reference_downscale is None:
        logger.info(
            "no LoRA records how much smaller its references were: --reference_downscale is used, or 1"
        )
    for option, factor in factors.items():
        typed = getattr(options, option)
        if typed is None:
            logger.info("--%s %d, as the LoRA says", option, factor)
            options = override_options(options, {option: factor})
        elif typed != factor:
            logger.warning("--%s %d: the LoRA was trained with %d", option, typed, factor)
    return options


def make_rules(options: Ltx2ReferenceOptions | Ltx2GivenReferences) -> ReferenceRules:
    """Return the rules for references that the options set."""
    return ReferenceRules(
        MAX_REFERENCES,
        LATENT.pixel_step,
        clips=True,
        size_factor=options.reference_downscale or 1,
        time_factor=options.reference_temporal_scale or 1,
        max_frames=options.reference_frames or 0,
    )


def factor_metadata(rules: ReferenceRules) -> dict[str, str]:
    """Return a LoRA's metadata about references in training, under all keys that programs use."""
    metadata = dict.fromkeys(SIZE_FACTOR, str(rules.size_factor))
    metadata |= dict.fromkeys(TIME_FACTOR, str(rules.time_factor))
    if rules.max_frames:
        metadata[FRAMES] = str(rules.max_frames)
    return metadata
