"""Bernini-R: Wan with source clips and images in the sequence, in front of the noisy latents.

A number alone tells each source apart: videos come first, from 1, and images follow; the noisy latents are 0.
All tokens have the time of the noisy latents. Its tensors are those of Wan's text to video, so only names and
records show that a file is Bernini-R's. Source: the released code (bytedance/Bernini).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.model_files import read_once
from checkpoints.opening import Checkpoint
from modules.devices import send
from modules.errors import CacheError, CheckpointError, OptionError
from modules.media.buckets import size_within
from modules.media.pixels import image_size, to_pixels, video_pixels
from modules.media.reading import is_single_image, read_image, resize_stretched
from protocols.data import CONTROL, REFERENCE_LATENTS, Batch, CacheEntry, Conditions, MediaBatch, split_items
from protocols.requests import Prepared, Prompt, Request
from protocols.rules import GuidanceRules, ReferenceGuidance, ReferenceRules
from wan.bernini_options import (
    AUTO,
    DEFAULT_SCALES,
    LOW_NOISE_FACTOR,
    MODE_KEY,
    MODES,
    PROMPT_KEY,
    SENTENCE_START,
    SENTENCES,
    choose_mode,
    choose_topic,
    find_named_sign,
)
from wan.spec import LATENT, SourceLatents
from wan.vae import WanVae

logger = logging.getLogger(__name__)

MAX_REFERENCES = 8
MAX_TRAINED_NUMBER = 5  # more sources share the numbers from 1 to this one
LONGEST_SIDE = 848  # pixels of a source's long side, as in the released sampling
REFERENCES = ReferenceRules(MAX_REFERENCES, clips=True, longest_side=LONGEST_SIDE)

TRAINER_PREFIXES = ("ema.diff_dec.", "diff_dec.")


def find_sign(dit: Path) -> str:
    """Return what shows that a transformer's file is Bernini-R's, for the log; "" if nothing does."""
    named = find_named_sign(dit)
    if named or not dit.exists():
        return named
    try:
        is_trainers = read_once(dit, _has_trainer_names)
    except CheckpointError:  # whoever loads the file reports it
        return ""
    return f"its tensors are named {TRAINER_PREFIXES[0]}..., as its trainer saves them" if is_trainers else ""


def _has_trainer_names(checkpoint: Checkpoint) -> bool:
    return any(name.startswith(TRAINER_PREFIXES) for name in checkpoint.tensors)


# sources in caches and conditions


def encode_items(vae: WanVae, media: MediaBatch, store: torch.dtype) -> list[CacheEntry]:
    """Encode items of one size with their control media and references, each at its own size."""

    def encode(frames: Tensor) -> Tensor:
        return vae.encode(to_pixels(frames.to(vae.device))).to(store)

    tensors = {"latents": encode(media.frames)}
    for index, control in enumerate(media.control):
        tensors[f"{CONTROL}_{index}" if len(media.control) > 1 else CONTROL] = encode(control)
    for index, reference in enumerate(media.references):
        tensors[f"{REFERENCE_LATENTS}_{index}"] = encode(reference)
    return split_items(tensors)


def batch_sources(batch: Batch) -> dict[str, Tensor]:
    """Return the latents of a batch's sources by their names in caches.

    Raises CacheError if they were cached for another model.
    """
    sources = {
        name: batch.tensor(name) for name in batch.tensors if name.startswith((CONTROL, REFERENCE_LATENTS))
    }
    for name, latents in sources.items():
        if latents.shape[1] != LATENT.channels:
            raise CacheError(
                f"{batch.keys[0]}: {name} has {latents.shape[1]} channels in the cache, Bernini takes "
                f"{LATENT.channels}. Cache again with wan_cache_latents.py --bernini."
            )
    return sources


def list_sources(cond: Conditions, maximum: int | None, device: torch.device) -> list[SourceLatents]:
    """Return the sources in the conditions in their order, with their numbers; at most `maximum`."""
    named: list[tuple[int, str]] = []
    for start in (CONTROL, REFERENCE_LATENTS):  # what is changed, then what is shown
        names = [name for name in cond if name.startswith(start)]
        named += sorted((int(name.removeprefix(start).lstrip("_") or 0), name) for name in names)
    latents = [send(value, device) for _, name in named if isinstance(value := cond[name], Tensor)]
    latents.sort(key=lambda source: source.shape[2] == 1)  # videos first; the order is kept otherwise
    latents = latents[:maximum]
    return [SourceLatents(*pair) for pair in zip(latents, number_sources(len(latents)), strict=True)]


def number_sources(count: int) -> list[float]:
    """Return the numbers of sources: 1, 2, ...; more than training had are spread evenly over its numbers."""
    if count <= MAX_TRAINED_NUMBER:
        return [float(number) for number in range(1, count + 1)]
    return [float(number) for number in torch.linspace(1, MAX_TRAINED_NUMBER, count)]


# requests


@dataclass(frozen=True)
class BerniniRequest:
    """Sources of a request, and its settings."""

    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    topic: str  # key of SENTENCES
    mode: str  # key of MODES
    scales: Mapping[str, float]  # weights of the video and of the images

    def add_to(self, prepared: Prepared) -> Prepared:
        """Return the prepared request with the sentence in front of its prompt, and guidance by sources."""
        texts = prepared.prompts[0]
        prompts = replace(
            texts,
            positive=begin_with(texts.positive, SENTENCES[self.topic]),
            negative=None if texts.negative is None else replace(texts.negative, is_negative=True),
            nag=None if texts.nag is None else replace(texts.nag, is_negative=True),
        )
        metadata = {
            **prepared.extra_metadata,
            PROMPT_KEY: self.topic,
            MODE_KEY: self.mode,
            **{name: f"{scale:g}" for name, scale in self.scales.items() if name in MODES[self.mode].weights},
        }
        return replace(
            prepared,
            prompts={0: prompts},
            rules=GuidanceRules(references=self.make_guidance(len(prepared.guidance_scale))),
            family_settings=self,
            extra_metadata=metadata,
        )

    def make_guidance(self, num_experts: int) -> ReferenceGuidance | None:
        """Return the chain of passes; None if plain guidance by the prompt is the same.

        Passes that would see the same sources are one. The low-noise expert, the first of two, has smaller
        weights.
        """
        mode = MODES[self.mode]
        num_sources = len(self.videos) + len(self.images)
        seen = {0: 0, 1: min(len(self.videos), 1), None: num_sources}  # by count in MODES
        counts: list[int] = []
        weights: list[float] = []
        for index, count in enumerate(mode.sources):
            if index and seen[count] != counts[-1]:
                weights.append(self.scales[mode.weights[index - 1]])
            if not counts or seen[count] != counts[-1]:
                counts.append(seen[count])
        if counts == [num_sources] and not mode.is_projected:
            return None
        factors = [1.0] * num_experts
        if num_experts > 1:
            factors[0] = LOW_NOISE_FACTOR
        return ReferenceGuidance(
            counts=tuple(None if count == num_sources else count for count in counts),
            weights=tuple(tuple(factor * weight for weight in weights) for factor in factors),
            is_projected=mode.is_projected,
        )


def begin_with(prompt: Prompt, sentence: str) -> Prompt:
    """Return a prompt that begins with a sentence, without a space between; weighted parts move along.

    An empty prompt, and one that begins with such a sentence, stays as it is.
    """
    if not prompt.text.strip() or prompt.text.startswith(SENTENCE_START):
        return prompt
    text = prompt.text.lstrip()
    shift = len(sentence) + len(text) - len(prompt.text)
    spans = tuple((start + shift, end + shift, weight) for start, end, weight in prompt.weighted_spans)
    return replace(prompt, text=sentence + text, weighted_spans=spans)


def read_bernini_request(request: Request, topic: str | None, is_still: bool) -> BerniniRequest:
    """Return the sources of a request and its settings.

    Args:
        request: The request, with the media that the task takes.
        topic: Topic of a training's captions, which its samples get too; None chooses by the sources.
        is_still: Whether an image is generated.

    Raises:
        OptionError: For too many sources, or settings that are not known.
    """
    paths = [] if request.control_path is None else [request.control_path]
    paths += request.control_images
    if len(paths) > MAX_REFERENCES:
        raise OptionError(f"{len(paths)} sources: use at most {MAX_REFERENCES}")
    images = tuple(path for path in paths if is_still or is_single_image(path))
    videos = tuple(path for path in paths if path not in images)
    asked_topic = request.extra.get(PROMPT_KEY, topic or AUTO)
    asked_mode = request.extra.get(MODE_KEY, AUTO)
    counts = (len(videos), len(images))
    found_topic = choose_topic(is_still, *counts) if asked_topic == AUTO else asked_topic
    found_mode = choose_mode(found_topic, *counts) if asked_mode == AUTO else asked_mode
    for name, value, known in ((PROMPT_KEY, found_topic, SENTENCES), (MODE_KEY, found_mode, MODES)):
        if value not in known:
            raise OptionError(f"--{name} {value}: use {', '.join((AUTO, *known))}")
    scales = {}
    for name, default in DEFAULT_SCALES.items():
        text = request.extra.get(name, str(default))
        try:
            scales[name] = float(text)
        except ValueError:
            raise OptionError(f"--{name} {text}: use a number, such as {default:g}") from None
        if scales[name] != default and name not in MODES[found_mode].weights:
            logger.warning("--%s is ignored because --%s %s has no such pass", name, MODE_KEY, found_mode)
    if not paths:
        logger.info(
            "no --src_video and no --src_ref_images: Bernini generates from the text alone, as Wan does"
        )
    return BerniniRequest(videos, images, found_topic, found_mode, scales)


def encode_request(vae: WanVae, prepared: Prepared) -> dict[str, Tensor | list[Tensor]]:
    """Encode a request's sources on the CPU, 1 16 f h w each, by their names in caches.

    The clip to change has the size and the length of the result; references keep their aspect ratio.
    """
    request = prepared.request
    conditions: dict[str, Tensor | list[Tensor]] = {}
    if request.control_path is not None:
        pixels = video_pixels(
            request.control_path,
            "--src_video",
            width=prepared.width,
            height=prepared.height,
            frames=prepared.frames,
        )
        conditions[CONTROL] = vae.encode(pixels).cpu()
    for index, path in enumerate(request.control_images):
        width, height = size_within(image_size(path), LONGEST_SIDE, REFERENCES.step)
        if path in prepared.family_settings.images:
            frame = resize_stretched(read_image(path), (width, height))
            pixels = to_pixels(torch.from_numpy(frame[None, None]))
        else:
            pixels = video_pixels(
                path, "--src_ref_images", width=width, height=height, frames=prepared.frames
            )
        conditions[f"{REFERENCE_LATENTS}_{index}"] = vae.encode(pixels).cpu()
    return conditions
