"""Clean parts of clips: select the latents that stay clean, have time 0 and are excluded from the loss.

Training draws them for each clip (`CleanLatentRules`); generation takes them from its options. Positions
do not change. Source: the released trainer of LTX-2, and the fork of musubi-tuner whose options these are.
"""
# Letters: B batch, F H W latents of a video, T latents of the audio

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltx_2.configs import LATENT, MEL_RATE, MEL_STRIDE
from ltx_2.given_options import Ltx2GivenParts
from ltx_2.rope import latent_bounds
from modules.errors import DatasetError
from protocols.data import AUDIO_LATENTS, GUIDES, KEYFRAME_LATENTS, LATENT_GUIDE, LOSS_MASK, Batch, Conditions
from protocols.steps import FULLY_CLEAN, CleanTokens

logger = logging.getLogger(__name__)
ROUNDING = 0.002  # rounding error of masks in caches, which are float16
MASK = "given_mask"  # in batches: how much of each latent is white, B F H W
# names of the options of `ClipEndRule`, after ltx2_extend_ or ltx2_audio_extend_
_END_OPTIONS = ("prefix_frames", "suffix_frames", "p", "prefix_p", "suffix_p")
Intervals = Sequence[tuple[float, float]]  # beginnings and ends in seconds


def make_ends_mask(count: int, prefix: int, suffix: int) -> Tensor:
    """Return a bool mask of `count` latents, true for the first `prefix` and the last `suffix`."""
    indices = torch.arange(count)
    return (indices < prefix) | (indices >= count - suffix)


def make_region_mask(region: Sequence[int], rows: int, columns: int, step: int) -> Tensor:
    """Return a mask of the latents, H W bool, inside a region [y1, x1, y2, x2] of pixels.

    Each number is divided by `step` and rounded down, as in the released trainer.
    """
    top, left, bottom, right = (number // step for number in region)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def covered_fractions(starts: Tensor, ends: Tensor, intervals: Intervals) -> Tensor:
    """Return the fraction of each latent's duration that `intervals` cover; all times are in seconds."""
    covered = torch.zeros_like(starts)
    for start, end in intervals:
        covered += (ends.clamp(max=end) - starts.clamp(min=start)).clamp(min=0)
    return covered / (ends - starts)


def audio_latent_times(count: int) -> tuple[Tensor, Tensor]:
    """Return the start and end of each of `count` audio latents, in seconds."""
    starts, ends = (latent_bounds(count, MEL_STRIDE, is_causal=True) / MEL_RATE).unbind(1)
    return starts, ends


def video_latent_times(count: int, stride: int, fps: float) -> tuple[Tensor, Tensor]:
    """Return the start and end of each of `count` latent frames, in seconds."""
    starts, ends = (latent_bounds(count, stride, is_causal=True) / fps).unbind(1)
    return starts, ends


@dataclass(frozen=True)
class ClipEndRule:
    """How many latents at the start and the end of clips stay clean, for a LoRA that extends clips."""

    prefix: int  # number of latents at the start
    suffix: int  # at the end
    prefix_p: float  # probability, for each clip, that its start is clean
    suffix_p: float
    is_one_draw: bool  # whether one random number decides about both ends of a clip

    def draw_mask(self, count: int, draws: Tensor, sample_names: Sequence[str], unit: str) -> Tensor:
        """Draw which first and last latents of each sample stay clean, B count bool.

        Args:
            count: Number of latents in a row.
            draws: Two random numbers for each sample, 2 B.
            sample_names: Names of the samples, for messages.
            unit: Plural name of the latents, for messages.

        Raises:
            DatasetError: If no latent between the clean ones would be left.
        """
        prefix_draws = draws[0]
        suffix_draws = prefix_draws if self.is_one_draw else draws[1]
        if self.prefix + self.suffix >= count:
            raise DatasetError(
                f"{sample_names[0]} has {count} {unit}, and {self.prefix} at its start and "
                f"{self.suffix} at its end stay clean: nothing would be learned. Use fewer, or longer clips"
            )
        is_prefix = make_ends_mask(count, self.prefix, 0) & (prefix_draws < self.prefix_p)[:, None]
        is_suffix = make_ends_mask(count, 0, self.suffix) & (suffix_draws < self.suffix_p)[:, None]
        return is_prefix | is_suffix


@dataclass(frozen=True)
class MaskRule:
    """How a mask determines which latents of a clip stay clean."""

    probability: float
    is_inverted: bool
    threshold: float = 0.5  # latents with a larger mask value are clean

    def draw_mask(self, values: Tensor, draws: Tensor) -> Tensor:
        """Return which latents stay clean, bool, in the samples to which the rule applies.

        `values`, B ..., is 0 to 1; `draws` has a random number per sample.
        """
        is_selected = (values > self.threshold) != self.is_inverted
        is_drawn = (draws < self.probability).view(-1, *[1] * (values.ndim - 1))
        return is_selected & is_drawn

    def find_clean(self, masks: Tensor) -> Tensor:
        """Return which latents the masks of clips select to stay clean, bool, before any random choice.

        A latent is clean only if all of its frames are; otherwise the model could copy frames that it has to
        generate. Caches only have the mean over a latent's frames. A latent of a moving mask therefore counts
        as clean if its mean is too high for any frame to be below the threshold. Masks that are equal in all
        frames are compared with the threshold itself.

        Args:
            masks: Means over the pixels and frames of each latent, 0 to 1, B F H W.
        """
        is_moving = ((masks - masks[:, :1]).abs() > ROUNDING).flatten(1).any(1)
        # mean at which a single frame could be at the threshold, and all other frames at 1 (inverted: at 0)
        if self.is_inverted:
            moving_threshold = self.threshold / LATENT.frame_step
        else:
            moving_threshold = 1 - (1 - self.threshold) / LATENT.frame_step
        thresholds = torch.full_like(masks, self.threshold, dtype=torch.float32)
        thresholds[is_moving, 1:] = moving_threshold  # the first latent has one frame
        return (masks.float() > thresholds) != self.is_inverted


@dataclass(frozen=True)
class CleanFrameRule:
    """Which whole latent frames of a clip stay clean in training, how often, and how clean."""

    probability: float  # that a clip has clean frames
    strategy: str  # which frames: endpoints, random, or both ends and random ones between them
    count: int  # number of random frames
    strength: float  # fraction of a frame that is clean

    def draw_mask(self, num_frames: int, generator: torch.Generator, draws: Tensor) -> Tensor:
        """Draw which latent frames of each sample stay clean, B F bool."""
        scores = torch.rand((len(draws), num_frames), generator=generator)
        ends = make_ends_mask(num_frames, 1, 1)
        if self.strategy == "endpoints":
            is_clean = ends.expand_as(scores)
        elif self.strategy == "random":
            is_clean = _select_lowest(scores, self.count)
        else:
            scores[:, ends] = 2.0  # greater than any random number: frames are drawn between the ends
            is_clean = _select_lowest(scores, self.count) | ends
        return is_clean & (draws < self.probability)[:, None]


def _select_lowest(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` lowest values in each row."""
    # the second argsort turns the order of values into each value's rank
    return scores.argsort(1).argsort(1) < count


@dataclass(frozen=True)
class KeyframeRule:
    """Which latent frames the network also gets as keyframes in training, drawn for each clip.

    Those between the ends are the same for all clips of a batch that have them.
    """

    first_p: float  # probability of the first frame as a keyframe
    last_p: float
    interior_p: float
    max_interior: int  # maximum number of latent frames between the ends

    def draw_mask(self, batch_size: int, num_frames: int, generator: torch.Generator) -> Tensor:
        """Draw which of the clips' latent frames each sample gets as keyframes, B F bool."""
        first, last, interior = torch.rand((3, batch_size), generator=generator)
        count_draw = float(torch.rand(1, generator=generator))
        # the same inner frames for all samples of the batch
        order = torch.randperm(max(num_frames - 2, 0), generator=generator)
        max_interior = min(self.max_interior, num_frames - 2)
        num_interior = 1 + int(count_draw * max_interior) if max_interior > 0 else 0
        interior_frames = order[:num_interior] + 1
        is_keyframe = torch.zeros(batch_size, num_frames, dtype=torch.bool)
        is_keyframe[:, interior_frames] = (interior < self.interior_p)[:, None]
        is_keyframe[:, 0] = first < self.first_p
        is_keyframe[:, -1] = last < self.last_p
        return is_keyframe


class RandomDraws(NamedTuple):
    """Uniform random numbers that decide which rules apply to each sample of a batch, B or 2 B each."""

    ends: Tensor  # 2 B: for the start and the end of a clip
    region: Tensor
    mask: Tensor
    frames: Tensor
    audio_ends: Tensor  # 2 B
    audio_intervals: Tensor

    @classmethod
    def make(cls, batch_size: int, generator: torch.Generator) -> "RandomDraws":
        """Draw the numbers for all rules, so that turning one off does not change the others' numbers."""
        rows = torch.rand((8, batch_size), generator=generator)
        return cls(rows[:2], rows[2], rows[3], rows[4], rows[5:7], rows[7])


@dataclass(frozen=True)
class CleanLatentRules:
    """Rules for keeping parts of clips clean in training: inputs at time 0, excluded from the loss."""

    ends: ClipEndRule | None = None
    region: MaskRule | None = None
    mask: MaskRule | None = None
    frames: CleanFrameRule | None = None
    audio_ends: ClipEndRule | None = None
    audio_intervals: MaskRule | None = None
    keyframes: KeyframeRule | None = None

    def always(self) -> "CleanLatentRules":
        """Return the same rules with all probabilities set to 1."""
        changes: dict[str, Any] = {}
        for field_name, rule in vars(self).items():
            if isinstance(rule, ClipEndRule):
                changes[field_name] = replace(rule, prefix_p=1.0, suffix_p=1.0)
            elif isinstance(rule, KeyframeRule):
                names = ("first_p", "last_p", "interior_p")
                changes[field_name] = replace(
                    rule, **{name: math.ceil(getattr(rule, name)) for name in names}
                )
            elif rule is not None:
                changes[field_name] = replace(rule, probability=1.0)
        return replace(self, **changes)

    def draw(self, batch: Batch, generator: torch.Generator) -> CleanTokens | None:
        """Draw which latents of each clip stay clean, and which keyframes it gets; None if there are none.

        Raises:
            DatasetError: If a rule leaves nothing to learn, or its mask, region or times are missing.
        """
        guides = read_guides(batch)
        if self == CleanLatentRules() and not guides:
            return None
        draws = RandomDraws.make(len(batch), generator)
        image = self._draw_image_weights(batch, generator, draws)
        for guide in guides:
            if not guide.is_keyframe:
                # How clean each video latent is, B 1 F H W, with the guide's values at its latent frame
                weights = image
                if weights is None:
                    batch_size, _, *grid = batch.tensor("latents").shape
                    weights = torch.zeros(batch_size, 1, *grid, dtype=torch.int16)
                weights[:, :, guide.index] = guide.clean_weights[:, None, None, None]
                image = weights
        audio = self._draw_audio_weights(batch, draws)
        _warn_if_all_clean(batch.keys, image)
        clean_tokens = CleanTokens(_none_if_zero(image), _none_if_zero(audio))
        keyframes = [guide for guide in guides if guide.is_keyframe]
        keyframes += self._draw_keyframes(batch.tensor("latents"), generator)
        if keyframes:
            return _add_keyframes(clean_tokens, keyframes, generator)
        has_clean_latents = clean_tokens.image is not None or clean_tokens.audio is not None
        return clean_tokens if has_clean_latents else None

    def _draw_keyframes(self, latents: Tensor, generator: torch.Generator) -> list["GuideImages"]:
        """Draw latent frames of the clips as keyframes, and omit frames that no clip gets."""
        # `latents` are B C F H W.
        batch_size, _, num_frames = latents.shape[:3]
        if self.keyframes is None or num_frames == 1:
            return []
        weights = (self.keyframes.draw_mask(batch_size, num_frames, generator) * FULLY_CLEAN).short()
        keyframes = []
        for index in weights.any(0).nonzero()[:, 0].tolist():
            frame = latents[:, :, index : index + 1]
            keyframes.append(GuideImages(frame, LATENT.frame_step * index, weights[:, index]))
        return keyframes

    def _draw_image_weights(
        self, batch: Batch, generator: torch.Generator, draws: RandomDraws
    ) -> Tensor | None:
        """Return how clean each video latent is, 0 to FULLY_CLEAN, as B 1 F H W int16; None without rules."""
        if not (self.ends or self.region or self.mask or self.frames):
            return None
        weights = self._draw_fully_clean(batch, draws) * FULLY_CLEAN
        num_frames = weights.shape[1]
        if self.frames is not None and num_frames > 1:
            frame_mask = self.frames.draw_mask(num_frames, generator, draws.frames)[:, :, None, None]
            # where rules overlap, the larger weight is used
            weights = torch.maximum(weights, frame_mask * round(FULLY_CLEAN * self.frames.strength))
        return weights[:, None].short()

    def _draw_fully_clean(self, batch: Batch, draws: RandomDraws) -> Tensor:
        """Draw which video latents are entirely clean (at ends, in a region, by a mask), B F H W bool."""
        batch_size, _, num_frames, rows, columns = batch.tensor("latents").shape
        is_clean = torch.zeros(batch_size, num_frames, rows, columns, dtype=torch.bool)
        if self.ends is not None and num_frames > 1:
            ends = self.ends.draw_mask(num_frames, draws.ends, batch.keys, "latent frames")
            is_clean |= ends[:, :, None, None]
        if self.region is not None:
            region_masks = _make_region_masks(batch, (rows, columns))
            is_clean |= self.region.draw_mask(region_masks, draws.region)[:, None]
        if self.mask is not None:
            is_drawn = draws.mask < self.mask.probability
            is_clean |= _read_masks(self.mask, batch) & is_drawn[:, None, None, None]
        return is_clean

    def _draw_audio_weights(self, batch: Batch, draws: RandomDraws) -> Tensor | None:
        """Return how clean each audio latent is, 0 or FULLY_CLEAN, as B 1 T 1 int16."""
        # Returns None if the clips have no audio, or if there are no rules for audio.
        audio_latents = batch.tensors.get(AUDIO_LATENTS)
        if not isinstance(audio_latents, Tensor) or not (self.audio_ends or self.audio_intervals):
            return None
        num_latents = audio_latents.shape[2]
        is_clean = torch.zeros(len(batch), num_latents, dtype=torch.bool)
        if self.audio_ends is not None and batch.tensor("latents").shape[2] > 1:  # not an image
            is_clean |= self.audio_ends.draw_mask(
                num_latents, draws.audio_ends, batch.keys, "latents of audio"
            )
        if self.audio_intervals is not None:
            # The fraction of each audio latent that the intervals in the samples' files cover, B T
            starts, ends = audio_latent_times(num_latents)
            fractions = []
            for key, intervals in zip(batch.keys, batch.clean_times or (None,) * len(batch), strict=True):
                if intervals is None:
                    raise DatasetError(
                        f"{key}: --ltx2_audio_inpaint_mask needs a file of its name, .json or .txt, in "
                        "audio_cond_mask_directory of its table"
                    )
                fractions.append(covered_fractions(starts, ends, intervals))
            covered = torch.stack(fractions)
            is_clean |= self.audio_intervals.draw_mask(covered, draws.audio_intervals)
        return (is_clean * FULLY_CLEAN).short()[:, None, :, None]


def _none_if_zero(weights: Tensor | None) -> Tensor | None:
    """Return weights that say how clean latents are; None if no latent is clean."""
    return weights if weights is not None and weights.any() else None


def _make_region_masks(batch: Batch, grid: tuple[int, int]) -> Tensor:
    """Return which latents lie in the regions of the samples' tables, B H W float, 0 or 1."""
    region_masks = []
    for key, region in zip(batch.keys, batch.crop_regions or (None,) * len(batch), strict=True):
        if region is None:
            raise DatasetError(
                f"{key}: --ltx2_spatial_crop needs spatial_crop_region = [y1, x1, y2, x2] in its table"
            )
        region_mask = make_region_mask(region, *grid, LATENT.pixel_step)
        if region_mask.all() or not region_mask.any():
            raise DatasetError(
                f"{key}: spatial_crop_region {list(region)} covers "
                f"{'all' if region_mask.all() else 'none'} of its {grid[0]} x {grid[1]} latents, which have "
                f"{LATENT.pixel_step} pixels a side"
            )
        region_masks.append(region_mask)
    return torch.stack(region_masks).float()


def _add_keyframes(
    clean_tokens: CleanTokens, keyframes: Sequence["GuideImages"], generator: torch.Generator
) -> CleanTokens:
    """Add keyframes, extra frames after the clips; draw noise for them if one is not entirely clean."""
    latents = torch.cat([keyframe.latents for keyframe in keyframes], dim=2)
    weights = torch.stack([keyframe.clean_weights for keyframe in keyframes], dim=1)
    noise = None
    if weights.min() < FULLY_CLEAN:
        noise = torch.randn(latents.shape, generator=generator)
    return replace(
        clean_tokens,
        keyframes=latents,
        keyframe_indices=tuple(keyframe.index for keyframe in keyframes),
        keyframe_strengths=weights,
        keyframe_noise=noise,
    )


@dataclass(frozen=True)
class GuideImages:
    """Guide images, one for each clip of a batch: extra keyframes, or replacements of a latent frame."""

    latents: Tensor  # B C 1 H W, in the form of latents in caches
    index: int  # index of its frame, or of the latent frame that it replaces
    clean_weights: Tensor  # how clean each clip's image is, as in `CleanTokens`, B int16
    is_keyframe: bool = True  # True: appended to the clip; False: replaces a latent frame


def read_guides(batch: Batch) -> list[GuideImages]:
    """Return the guide images of a batch; [] if there are none, or if its items are single frames.

    A guide is an extra keyframe after the clip, or replaces one of its latent frames.

    Raises:
        DatasetError: If the index of a replaced latent frame is out of range.
    """
    tensors = batch.tensors
    frames = batch.tensor("latents").shape[2]
    if GUIDES not in tensors or frames == 1:
        return []
    guides = []
    # the table's guides are equal for all samples
    for number, (index, weight) in enumerate(batch.tensor(GUIDES)[0].tolist()):
        name = f"{KEYFRAME_LATENTS}_{number}"
        is_keyframe = name in tensors
        latents = batch.tensor(name if is_keyframe else LATENT_GUIDE)
        if not is_keyframe and index >= frames:
            raise DatasetError(
                f"{batch.keys[0]}: latent_idx_guide_frame_idx = {index}, and it has the latent frames 0 to "
                f"{frames - 1}. Set one of these"
            )
        clean_weights = torch.full((len(latents),), weight, dtype=torch.int16)
        guides.append(GuideImages(latents, index, clean_weights, is_keyframe))
    return guides


def insert_guides(tensors: Conditions, _: str, __: torch.Generator) -> Conditions:
    """Return the batch's tensors; the last guide image replaces a latent frame if it was cached as one."""
    if LATENT_GUIDE not in tensors or GUIDES not in tensors:
        return tensors
    latents, guide, guides = (tensors[name] for name in ("latents", LATENT_GUIDE, GUIDES))
    assert isinstance(latents, Tensor)
    assert isinstance(guide, Tensor)
    assert isinstance(guides, Tensor)
    index = int(guides[0, -1, 0])  # the last guide
    if latents.shape[2] == 1 or index >= latents.shape[2]:  # none, or `read_guides` fails
        return tensors
    latents = latents.clone()
    latents[:, :, index : index + 1] = guide
    return {**tensors, "latents": latents}


def _read_masks(rule: MaskRule, batch: Batch) -> Tensor:
    """Return which latents a batch's masks select to stay clean, B F H W bool."""
    masks = batch.tensors.get(MASK)
    if not isinstance(masks, Tensor):
        raise DatasetError(
            f"{batch.keys[0]}: --ltx2_inpaint_mask needs masks. Set mask_directory in its table, and cache "
            "again"
        )
    is_clean = rule.find_clean(masks)
    for key, is_sample_clean in zip(batch.keys, is_clean, strict=True):
        if is_sample_clean.all():
            raise DatasetError(
                f"{key}: its mask keeps the whole clip, or it has no mask: nothing would be learned. Its "
                f"mask needs {'white' if rule.is_inverted else 'black'} parts"
            )
    return is_clean


def _warn_if_all_clean(keys: Sequence[str], weights: Tensor | None) -> None:
    """Warn about samples in which every latent is clean, so that nothing is learned."""
    if weights is None:
        return
    for key, sample_weights in zip(keys, weights, strict=True):
        if (sample_weights > 0).all():
            logger.warning("%s: all of it is given in this step, so nothing is learned from it", key)


def select_clean_latents_by_mask(tensors: Conditions, name: str, generator: torch.Generator) -> Conditions:
    """Turn loss masks of a batch into masks of clean latents by renaming the tensors."""
    renamed = {MASK if key == LOSS_MASK else key: value for key, value in tensors.items()}
    return insert_guides(renamed, name, generator)


def make_clean_latent_rules(options: Ltx2GivenParts) -> CleanLatentRules:
    """Return the rules for clean parts of clips, from the options; warn about probabilities of 0."""
    for name in ("ltx2_spatial_crop", "ltx2_inpaint_mask", "ltx2_audio_inpaint_mask"):
        if getattr(options, name) and not getattr(options, f"{name}_p"):
            logger.warning("--%s has no effect with --%s_p 0, the default. Pass 1, for all clips", name, name)
    return CleanLatentRules(
        ends=_make_end_rule(options, ""),
        region=_make_mask_rule(
            options.ltx2_spatial_crop, options.ltx2_spatial_crop_p, options.ltx2_spatial_crop_invert
        ),
        mask=_make_mask_rule(
            options.ltx2_inpaint_mask,
            options.ltx2_inpaint_mask_p,
            options.ltx2_inpaint_mask_invert,
            options.ltx2_inpaint_mask_threshold,
        ),
        frames=_make_frame_rule(options),
        audio_ends=_make_end_rule(options, "audio_"),
        audio_intervals=_make_mask_rule(
            options.ltx2_audio_inpaint_mask,
            options.ltx2_audio_inpaint_mask_p,
            options.ltx2_audio_inpaint_mask_invert,
            options.ltx2_audio_inpaint_mask_threshold,
        ),
        keyframes=_make_keyframe_rule(options),
    )


def _make_end_rule(options: Ltx2GivenParts, stream: str) -> ClipEndRule | None:
    """Return the rule that keeps ends of clips clean, or of their audio ("audio_"); None if both are off."""
    values = {name: getattr(options, f"ltx2_{stream}extend_{name}") for name in _END_OPTIONS}
    is_one_draw = values["prefix_p"] is None and values["suffix_p"] is None
    prefix_p = values["p"] if values["prefix_p"] is None else values["prefix_p"]
    suffix_p = values["p"] if values["suffix_p"] is None else values["suffix_p"]
    prefix, suffix = values["prefix_frames"], values["suffix_frames"]
    if not (prefix and prefix_p) and not (suffix and suffix_p):
        return None
    return ClipEndRule(prefix, suffix, prefix_p, suffix_p, is_one_draw)


def _make_mask_rule(
    is_on: bool, probability: float, is_inverted: bool, threshold: float = 0.5
) -> MaskRule | None:
    return MaskRule(probability, is_inverted, threshold) if is_on and probability else None


def _make_keyframe_rule(options: Ltx2GivenParts) -> KeyframeRule | None:
    if not options.keyframe_endpoint_training:
        return None
    return KeyframeRule(
        options.keyframe_first_frame_p,
        options.keyframe_last_frame_p,
        options.keyframe_random_interior_p,
        options.keyframe_max_random_interior,
    )


def _make_frame_rule(options: Ltx2GivenParts) -> CleanFrameRule | None:
    if not options.video_anchor_training or not options.video_anchor_probability:
        return None
    return CleanFrameRule(
        options.video_anchor_probability,
        options.video_anchor_strategy,
        options.video_anchor_count,
        options.video_anchor_strength,
    )
