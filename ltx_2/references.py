"""References of LTX-2 (IC-LoRA): what is read of them, and the factors that a LoRA has learned.

Their tokens are clean and have time 0 and positions of their own, from 0: pixels times the size factor, and
seconds times the time factor S, less (S - 1) frames. Source: the released code of LTX-2.
"""

import logging
import math
import re
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.nn.functional as functional
from torch import Tensor

from ltx_2.configs import LATENT
from ltx_2.reference_options import (
    FRAMES,
    MOST,
    SIZE_FACTOR,
    TIME_FACTOR,
    Ltx2GivenReferences,
    Ltx2ReferenceOptions,
)
from modules.contract.data import REFERENCE_LATENTS, Conditions, Joint, LatentSpec
from modules.contract.family import NoiseSource
from modules.contract.requests import count_frames_up_to
from modules.contract.rules import ReferenceRules
from modules.contract.steps import Section
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.media.decoding import is_animation
from modules.media.pixels import to_pixels
from modules.media.reading import image_suffixes, read_image, resize_cover, video_frames
from modules.options import override_options
from modules.text_files import texts_of_files

logger = logging.getLogger(__name__)
STRENGTHS = "reference_strengths"  # condition: by which tokens of references and the video see each other


def thin_out(frames: Tensor, rules: ReferenceRules, frame_step: int) -> Tensor:
    """Return the frames of a reference that are encoded, of B F H W C.

    With the time factor S these are 0, 1, 1 + S, 1 + 2S, ..., and 8n + 1 in number.
    """
    taken = torch.cat([frames[:, :1], frames[:, 1 :: rules.time_factor]], dim=1)
    return taken[:, : count_taken(frames.shape[1], rules, frame_step)]


def count_taken(frames: int, rules: ReferenceRules, frame_step: int) -> int:
    """Return how many of so many frames of a reference are encoded; see `thin_out`."""
    taken = 1 + len(range(1, frames, rules.time_factor))
    most = min(taken, rules.frames or taken)
    return (most - 1) // frame_step * frame_step + 1


def check_references(
    paths: Sequence[Path], mask: Path | None, frames: int, rules: ReferenceRules, latent: LatentSpec
) -> None:
    """Decode references and their mask, before a text encoder is loaded. frames: of the target.

    Raises MediaError if one cannot be decoded, OptionError if the mask is shorter than a reference.
    """
    for path in paths:
        count = 1 if is_picture(path) else count_frames_up_to(path, frames)
        taken = count_taken(count, rules, latent.frame_step)
        if mask is None or is_picture(mask):
            continue
        white = count_frames_up_to(mask, (taken - 1) * rules.time_factor + 1)
        check_mask_length(mask, count_taken(white, rules, latent.frame_step), taken)


def check_mask_length(mask: Path, taken: int, needed: int) -> None:
    """Raise OptionError if too few frames of a mask are taken for those of a reference."""
    if taken < needed:
        raise OptionError(
            f"--conditioning-attention-mask {mask}: {taken} frames are taken of it, {needed} of a reference. "
            "Give a picture, or a clip as long as the reference"
        )


def reference_key(number: int) -> str:
    return f"{REFERENCE_LATENTS}_{number}"


def references_of(cond: Conditions) -> tuple[Tensor, ...]:
    """Return the latents of references among conditions, each B C f h w, in their order."""
    names = sorted(name for name in cond if name.startswith(REFERENCE_LATENTS))
    found = [cond[name] for name in names]
    return tuple(one for one in found if isinstance(one, Tensor))


def join_tokens(references: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.flatten(2) for one in references], dim=2)  # B C N


def pack(picture: Tensor, tokens: Tensor) -> Tensor:
    """Put tokens of references, B C N, behind the frames of a picture, B C F H W, filled up with zeros."""
    tokens = functional.pad(tokens, (0, -tokens.shape[2] % math.prod(picture.shape[3:])))
    return torch.cat([picture, tokens.unflatten(2, (-1, *picture.shape[3:]))], dim=2)


def unpack(packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the picture and the tokens that stand behind it, B C N. count: N."""
    frames = packed.shape[2] - -(-count // math.prod(packed.shape[3:]))
    return packed[:, :, :frames], packed[:, :, frames:].flatten(2)[..., :count]


def with_noisy_references(
    sections: Generator[Section, Tensor, Tensor], strength: float, joint: Joint | None, noise: NoiseSource
) -> Generator[Section, Tensor, Tensor]:
    """Wrap sections: denoise their references behind their pictures. joint: of sections that have none.

    References begin as `strength` of themselves and the rest noise, which is drawn token by token.
    """
    section = next(sections)
    try:
        while True:
            references = references_of(section.positive)
            if not references:
                section = sections.send((yield section))
                continue
            joint, tweaks = section.tweaks.joint or joint, section.tweaks
            start, sound = (section.noise, None) if joint is None else joint.split(section.noise)
            clean = join_tokens(references).to(start.device)
            drawn = noise.draw((1, clean.shape[2], clean.shape[1])).to(start.device).mT
            packed = noisy = pack(start, strength * clean + (1 - strength) * drawn)
            if joint is not None and sound is not None:
                both = Joint((packed.shape[1], *packed.shape[2:]), joint.sound)
                noisy, tweaks = both.join(packed, sound), replace(tweaks, joint=both)
            made = yield replace(section, noise=noisy, tweaks=tweaks, shown=start.shape[2])
            if joint is not None and sound is not None:
                picture, sound = both.split(made)
                made = joint.join(picture[:, :, : start.shape[2]], sound)
            else:
                made = made[:, :, : start.shape[2]]
            section = sections.send(made)
    except StopIteration as end:
        return end.value


def velocity_of_references(
    velocity: Tensor, noisy: Tensor, clean: Tensor, strength: float, sigma: Tensor
) -> Tensor:
    """Return the velocity, B C N, by which references follow the video's noise level `sigma`, B.

    velocity: the network's, at a noise level of (1 - strength) sigma. Its clean prediction is mixed with
    `strength` of the reference. Source: the released code of LTX-2.
    """
    return (1 - strength) ** 2 * velocity + strength * (noisy - clean) / sigma.view(-1, 1, 1)


def read_pixels(path: Path, size: tuple[int, int, int], rules: ReferenceRules, latent: LatentSpec) -> Tensor:
    """Read a clip, folder of images or picture: 1 3 f h w, -1..1, cropped to the reduced size of the target.

    size: width, height and frames of the target. Of a shorter clip all frames are taken.
    """
    small = size[0] // rules.size_factor, size[1] // rules.size_factor
    frames = [read_image(path)] if is_picture(path) else islice(video_frames(path), size[2])
    found = [resize_cover(numpy.ascontiguousarray(one[..., :3]), small) for one in frames]
    taken = thin_out(torch.from_numpy(numpy.stack(found)[None]), rules, latent.frame_step)
    return to_pixels(taken)


def read_strengths(mask: Path, shown: Sequence[Tensor], rules: ReferenceRules, latent: LatentSpec) -> Tensor:
    """Return how white a picture or clip is at the tokens of references: 1 M float32, 0..1.

    shown: pixels of the references, 1 3 f h w. Raises OptionError if a clip is shorter than one of them.
    """
    found, steps = [], (latent.frame_step, latent.pixel_step, latent.pixel_step)
    for reference in shown:
        _, _, frames, height, width = reference.shape
        size = width * rules.size_factor, height * rules.size_factor, (frames - 1) * rules.time_factor + 1
        white = (read_pixels(mask, size, rules, latent).mean(1, keepdim=True) + 1) / 2
        if is_picture(mask):
            white = white.expand(-1, -1, frames, -1, -1)
        check_mask_length(mask, white.shape[2], frames)
        # the first latent frame is of one frame
        first = white[:, :, :1].expand(-1, -1, latent.frame_step - 1, -1, -1)
        found.append(functional.avg_pool3d(torch.cat([first, white], dim=2), steps).flatten(1))
    return torch.cat(found, dim=1)


def check_sides(width: int, height: int, rules: ReferenceRules) -> None:
    step = rules.step * rules.size_factor
    if width % step or height % step:
        raise OptionError(
            f"--video_size {height} {width}: with references {rules.size_factor} times smaller, sides are "
            f"multiples of {step}. Give such a size"
        )


def factors_of(loras: Sequence[Path]) -> dict[str, int]:
    """Return the reference factors and frame limit in the metadata of LoRAs, by option of generation.

    Raises OptionError if values differ, or one is not a whole number.
    """
    found: dict[str, tuple[int, Path]] = {}
    for path, metadata in texts_of_files(loras):
        for option, names in {
            "reference_downscale": SIZE_FACTOR,
            "reference_temporal_scale": TIME_FACTOR,
            FRAMES: (FRAMES,),
        }.items():
            said = [metadata[name] for name in names if name in metadata]
            if not said:
                continue
            if len(set(said)) > 1 or not re.fullmatch("0{0,4}[1-9][0-9]{0,4}", said[0]):
                told = shorten(" and ".join(said), 60)
                raise OptionError(f"--lora_weight {path}: its metadata say {names[0]} = {told}")
            factor, other = found.setdefault(option, (int(said[0]), path))
            if factor != int(said[0]):
                raise OptionError(
                    f"--lora_weight {path} has learned references with {names[0]} {said[0]}, {other} with "
                    f"{factor}: they do not work together. Give one of them"
                )
    return {option: factor for option, (factor, _) in found.items()}


def settle_factors(given: Ltx2GivenReferences, loras: Sequence[Path]) -> Ltx2GivenReferences:
    """Fill reference factors that are not given from the metadata of LoRAs."""
    said = factors_of(loras)
    if not said and given.paths and given.reference_downscale is None:
        logger.info(
            "no LoRA says by which factors its references were smaller: --reference_downscale does, else 1"
        )
    for option, factor in said.items():
        own = getattr(given, option)
        if own is not None and own != factor:
            logger.warning("--%s %d: the LoRA has learned with %d", option, own, factor)
        elif own is None:
            logger.info("--%s %d, as the LoRA says", option, factor)
            given = override_options(given, {option: factor})
    return given


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.is_dir() and not is_animation(path)


def rules_of(options: Ltx2ReferenceOptions | Ltx2GivenReferences) -> ReferenceRules:
    return ReferenceRules(
        MOST,
        LATENT.pixel_step,
        clips=True,
        size_factor=options.reference_downscale or 1,
        time_factor=options.reference_temporal_scale or 1,
        frames=options.reference_frames or 0,
    )


def factor_metadata(rules: ReferenceRules) -> dict[str, str]:
    """Return what a LoRA's metadata say of the references that it has learned, under all names."""
    sizes = dict.fromkeys(SIZE_FACTOR, str(rules.size_factor))
    found = sizes | dict.fromkeys(TIME_FACTOR, str(rules.time_factor))
    return found | ({FRAMES: str(rules.frames)} if rules.frames else {})
