"""Given parts of clips: select the latents that stay clean, have time 0 and are excluded from the loss.

Training draws them for each clip (`GivenRules`); a generation takes them from its options. Positions do not
change. Source: the released trainer of LTX-2, and the fork of musubi-tuner whose options these are.
"""
# Letters: B batch, F H W latents of a video, T latents of the audio

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
Times = Sequence[tuple[float, float]]  # beginnings and ends in seconds


def mark_ends(count: int, prefix: int, suffix: int) -> Tensor:
    """Return a bool mask of `count` latents, true for the first `prefix` and the last `suffix`."""
    indices = torch.arange(count)
    return (indices < prefix) | (indices >= count - suffix)


def mark_region(region: Sequence[int], rows: int, columns: int, step: int) -> Tensor:
    """Return the latents, H W bool, inside a region [y1, x1, y2, x2] of pixels.

    Each number is divided by `step` and rounded down, as in the released trainer.
    """
    top, left, bottom, right = (number // step for number in region)
    marked = torch.zeros(rows, columns, dtype=torch.bool)
    marked[top:bottom, left:right] = True
    return marked


def cover_times(starts: Tensor, ends: Tensor, times: Times) -> Tensor:
    """Return the fraction of each latent's duration, `starts` to `ends` in seconds, that `times` cover."""
    covered = torch.zeros_like(starts)
    for start, end in times:
        covered += (ends.clamp(max=end) - starts.clamp(min=start)).clamp(min=0)
    return covered / (ends - starts)


def audio_bounds(count: int) -> tuple[Tensor, Tensor]:
    """Return the start and end of each of `count` audio latents, in seconds."""
    starts, ends = (latent_bounds(count, MEL_STRIDE, is_causal=True) / MEL_RATE).unbind(1)
    return starts, ends


def video_bounds(count: int, stride: int, fps: float) -> tuple[Tensor, Tensor]:
    """Return the start and end of each of `count` latent frames, in seconds."""
    starts, ends = (latent_bounds(count, stride, is_causal=True) / fps).unbind(1)
    return starts, ends


@dataclass(frozen=True)
class Extension:
    """How many latents at the start and the end of a stream's clips are given instead of generated."""

    prefix: int  # number of latents at the start
    suffix: int  # at the end
    prefix_p: float  # probability, for each clip, of giving its start
    suffix_p: float
    is_one_draw: bool  # whether one random number decides about both ends of a clip

    def mark(self, count: int, draws: Tensor, sample_names: Sequence[str], unit: str) -> Tensor:
        """Draw which first and last latents of each sample are given as clean inputs, B count bool.

        Args:
            count: Number of latents in a row.
            draws: Two random numbers for each sample, 2 B.
            sample_names: Names of the samples, for messages.
            unit: Plural name of the latents, for messages.
        """
        prefix_draws = draws[0]
        suffix_draws = prefix_draws if self.is_one_draw else draws[1]
        if self.prefix + self.suffix >= count:
            raise DatasetError(
                f"{sample_names[0]} has {count} {unit}, and {self.prefix} at its start and "
                f"{self.suffix} at its end are given: nothing would be learned. Give fewer, or longer clips"
            )
        is_prefix = mark_ends(count, self.prefix, 0) & (prefix_draws < self.prefix_p)[:, None]
        is_suffix = mark_ends(count, 0, self.suffix) & (suffix_draws < self.suffix_p)[:, None]
        return is_prefix | is_suffix


@dataclass(frozen=True)
class MaskRule:
    """How a mask determines which latents of a clip are given to the network instead of generated."""

    probability: float
    is_inverted: bool
    threshold: float = 0.5  # latents with a larger mask value are given

    def mark(self, values: Tensor, draws: Tensor) -> Tensor:
        """Return a bool mask of given latents.

        `values`, B ..., is 0 to 1; `draws` has a random number per sample.
        """
        inside = (values > self.threshold) != self.is_inverted
        return inside & (draws < self.probability).view(-1, *[1] * (values.ndim - 1))

    def find_given(self, masks: Tensor) -> Tensor:
        """Return which latents the masks of clips give, bool, before any random choice.

        A latent is given only if all of its frames are; otherwise the model could copy frames that it has to
        generate. Caches only have the mean over a latent's frames. A latent of a moving mask therefore counts
        as given if its mean is too high for any frame to be below the threshold. Masks that are equal in all
        frames are compared with the threshold itself.

        Args:
            masks: Means over the pixels and frames of each latent, 0 to 1, B F H W.
        """
        is_moving = ((masks - masks[:, :1]).abs() > ROUNDING).flatten(1).any(1)
        frames = LATENT.frame_step
        limit = self.threshold / frames if self.is_inverted else 1 - (1 - self.threshold) / frames
        limits = torch.full_like(masks, self.threshold, dtype=torch.float32)
        limits[is_moving, 1:] = limit  # the first latent has one frame
        return (masks.float() > limits) != self.is_inverted


@dataclass(frozen=True)
class AnchorRule:
    """Rule for giving whole latent frames: how often, how many, which ones, how clean."""

    probability: float  # of giving frames, for each clip
    strategy: str  # which frames: endpoints, random, or both ends and random ones between them
    count: int  # number of random frames
    strength: float  # fraction of a frame that is clean

    def mark(self, frames: int, generator: torch.Generator, draws: Tensor) -> Tensor:
        """Draw which latent frames of each sample are given, B F bool."""
        ranks = torch.rand((len(draws), frames), generator=generator)
        ends = mark_ends(frames, 1, 1)
        if self.strategy == "endpoints":
            marked = ends.expand_as(ranks)
        elif self.strategy == "random":
            marked = _mark_lowest(ranks, self.count)
        else:
            ranks[:, ends] = 2.0  # ranked last: drawn frames lie between the ends
            marked = _mark_lowest(ranks, self.count) | ends
        return marked & (draws < self.probability)[:, None]


def _mark_lowest(ranks: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` lowest values in each row."""
    # the second argsort turns the order of values into each value's rank
    return ranks.argsort(1).argsort(1) < count


@dataclass(frozen=True)
class KeyframeRule:
    """Rule for latent frames that training also gives as keyframes, drawn for each clip.

    Those between the ends are the same for all clips of a batch that have them.
    """

    first: float  # probability of showing the first frame
    last: float
    interior: float
    max_interior: int  # maximum number of latent frames between the ends

    def choose(self, samples: int, frames: int, generator: torch.Generator) -> Tensor:
        """Draw the latent frames that each sample gets as keyframes, samples x frames bool.

        `frames` is the number of latent frames of the clips.
        """
        first, last, interior = torch.rand((3, samples), generator=generator)
        fraction = float(torch.rand(1, generator=generator))
        # the same inner frames for all samples of the batch
        order = torch.randperm(max(frames - 2, 0), generator=generator)
        max_between = min(self.max_interior, frames - 2)
        num_between = 1 + int(fraction * max_between) if max_between > 0 else 0
        is_shown = torch.zeros(samples, frames, dtype=torch.bool)
        is_shown[:, order[:num_between] + 1] = (interior < self.interior)[:, None]
        is_shown[:, 0] = first < self.first
        is_shown[:, -1] = last < self.last
        return is_shown


@dataclass(frozen=True)
class GivenRules:
    """Rules by which a training gives parts of clips: clean inputs at time 0, which have no loss."""

    ends: Extension | None = None
    region: MaskRule | None = None
    mask: MaskRule | None = None
    anchors: AnchorRule | None = None
    audio_ends: Extension | None = None
    audio_times: MaskRule | None = None
    keyframes: KeyframeRule | None = None

    def always(self) -> "GivenRules":
        """Return the same rules with all probabilities set to 1."""
        changes: dict[str, Any] = {}
        for name, rule in vars(self).items():
            if isinstance(rule, Extension):
                changes[name] = replace(rule, prefix_p=1.0, suffix_p=1.0)
            elif isinstance(rule, KeyframeRule):
                chances = {name: math.ceil(getattr(rule, name)) for name in ("first", "last", "interior")}
                changes[name] = replace(rule, **chances)
            elif rule is not None:
                changes[name] = replace(rule, probability=1.0)
        return replace(self, **changes)

    def draw(self, batch: Batch, generator: torch.Generator) -> CleanTokens | None:
        """Draw which latents of each clip are given as clean conditions; return None if none are.

        Raises:
            DatasetError: If a condition leaves nothing to learn, or its mask, region or times are missing.
        """
        # frames that the dataset's table gives, in the clip or as keyframes
        guides = read_guides(batch)
        if self == GivenRules() and not guides:
            return None
        # always 8 rows, so that other rules do not shift later random numbers
        draws = torch.rand((8, len(batch)), generator=generator)
        image = self._mark_images(batch, generator, draws)
        for guide in guides:
            if not guide.is_keyframe:
                image = _mark_guide(image, guide, batch)
        audio = None
        sound = batch.tensors.get(AUDIO_LATENTS)
        if isinstance(sound, Tensor):
            audio = self._mark_audio(batch, sound.shape[2], draws)
        _warn_of_whole(batch.keys, image)
        image_shares = image if image is not None and image.any() else None
        audio_shares = audio if audio is not None and audio.any() else None
        keyframes = [guide for guide in guides if guide.is_keyframe]
        keyframes += self._choose_keyframes(batch.tensor("latents"), generator)
        if image_shares is None and audio_shares is None and not keyframes:
            return None
        given = CleanTokens(image_shares, audio_shares)
        if not keyframes:
            return given
        # keyframes are extra frames after the clip; noise is needed if one is not entirely given
        latents = torch.cat([keyframe.latents for keyframe in keyframes], dim=2)
        shares = torch.stack([keyframe.shares for keyframe in keyframes], dim=1)
        noise = None
        if shares.min() < FULLY_CLEAN:
            noise = torch.randn(latents.shape, generator=generator)
        return replace(
            given,
            keyframes=latents,
            keyframe_indices=tuple(keyframe.index for keyframe in keyframes),
            keyframe_strengths=shares,
            keyframe_noise=noise,
        )

    def _choose_keyframes(self, latents: Tensor, generator: torch.Generator) -> list["BatchGuide"]:
        """Choose latent frames of the clips as keyframes, without those that no clip attends to.

        `latents` are B C F H W.
        """
        samples, _, frames = latents.shape[:3]
        if self.keyframes is None or frames == 1:
            return []
        shares = (self.keyframes.choose(samples, frames, generator) * FULLY_CLEAN).short()
        return [
            BatchGuide(latents[:, :, index : index + 1], LATENT.frame_step * index, shares[:, index])
            for index in shares.any(0).nonzero()[:, 0].tolist()
        ]

    def _mark_images(self, batch: Batch, generator: torch.Generator, draws: Tensor) -> Tensor | None:
        """Return how much of each video latent is given clean, 0 to WHOLE, as B 1 F H W int16.

        `draws` are random numbers, a row for each rule. None without rules for the video.
        """
        if not (self.ends or self.region or self.mask or self.anchors):
            return None
        samples, _, frames, rows, columns = batch.tensor("latents").shape
        is_given = torch.zeros(samples, frames, rows, columns, dtype=torch.bool)
        if self.ends is not None and frames > 1:
            ends = self.ends.mark(frames, draws[:2], batch.keys, "latent frames")
            is_given |= ends[:, :, None, None]
        if self.region is not None:
            is_given |= self._mark_regions(self.region, batch, (rows, columns), draws[2])[:, None]
        if self.mask is not None:
            is_drawn = draws[3] < self.mask.probability
            is_given |= _read_masks(self.mask, batch) & is_drawn[:, None, None, None]
        # anchors are frames given by a fraction; where rules overlap, the larger share counts
        shares = is_given * FULLY_CLEAN
        if self.anchors is not None and frames > 1:
            marked = self.anchors.mark(frames, generator, draws[4])[:, :, None, None]
            shares = torch.maximum(shares, marked * round(FULLY_CLEAN * self.anchors.strength))
        return shares[:, None].short()

    def _mark_regions(self, rule: MaskRule, batch: Batch, grid: tuple[int, int], draws: Tensor) -> Tensor:
        """Return which latents the regions in the samples' tables mark as given, B H W bool."""
        marked = []  # for each sample, the latents inside its region
        for key, region in zip(batch.keys, batch.crop_regions or (None,) * len(batch), strict=True):
            if region is None:
                raise DatasetError(
                    f"{key}: --ltx2_spatial_crop needs spatial_crop_region = [y1, x1, y2, x2] in its table"
                )
            inside = mark_region(region, *grid, LATENT.pixel_step)
            if inside.all() or not inside.any():
                raise DatasetError(
                    f"{key}: spatial_crop_region {list(region)} covers "
                    f"{'all' if inside.all() else 'none'} of its {grid[0]} x {grid[1]} latents, which have "
                    f"{LATENT.pixel_step} pixels a side"
                )
            marked.append(inside)
        return rule.mark(torch.stack(marked).float(), draws)

    def _mark_audio(self, batch: Batch, count: int, draws: Tensor) -> Tensor | None:
        """Draw which audio latents are given, B 1 T 1 int16, 0 or WHOLE; None without audio rules."""
        if not (self.audio_ends or self.audio_times):
            return None
        is_given = torch.zeros(len(batch), count, dtype=torch.bool)
        if self.audio_ends is not None and batch.tensor("latents").shape[2] > 1:  # not an image
            # rows of `draws` belong to rules: 5 and 6 to both ends of the audio, 7 to its mask
            is_given |= self.audio_ends.mark(count, draws[5:7], batch.keys, "latents of audio")
        if self.audio_times is not None:
            starts, ends = audio_bounds(count)
            covered = []
            for key, times in zip(batch.keys, batch.clean_times or (None,) * len(batch), strict=True):
                if times is None:
                    raise DatasetError(
                        f"{key}: --ltx2_audio_inpaint_mask needs a file of its name, .json or .txt, in "
                        "audio_cond_mask_directory of its table"
                    )
                covered.append(cover_times(starts, ends, times))
            is_given |= self.audio_times.mark(torch.stack(covered), draws[7])
        return (is_given * FULLY_CLEAN).short()[:, None, :, None]


@dataclass(frozen=True)
class BatchGuide:
    """Guide images, one for each clip of a batch: keyframes next to the clips, or latent frames of theirs."""

    latents: Tensor  # B C 1 H W, in the form of latents in caches
    index: int  # index of its frame, or of the latent frame that it replaces
    shares: Tensor  # how much of it is given to each clip, as in `CleanTokens`, B int16
    is_keyframe: bool = True  # True: appended to the clip; False: replaces a latent frame


def read_guides(batch: Batch) -> list[BatchGuide]:
    """Return the guide images of a batch, which are given clean; [] without any, or for single frames.

    A guide is a keyframe next to the clip, or replaces one of its latent frames.

    Raises:
        DatasetError: If the index of a replaced latent frame is out of range.
    """
    tensors = batch.tensors
    frames = batch.tensor("latents").shape[2]
    if GUIDES not in tensors or frames == 1:
        return []
    guides = []
    # the table's guides are equal for all samples
    for number, (index, share) in enumerate(batch.tensor(GUIDES)[0].tolist()):
        name = f"{KEYFRAME_LATENTS}_{number}"
        is_keyframe = name in tensors
        latents = batch.tensor(name if is_keyframe else LATENT_GUIDE)
        if not is_keyframe and index >= frames:
            raise DatasetError(
                f"{batch.keys[0]}: latent_idx_guide_frame_idx = {index}, and it has the latent frames 0 to "
                f"{frames - 1}. Give one of these"
            )
        shares = torch.full((len(latents),), share, dtype=torch.int16)
        guides.append(BatchGuide(latents, index, shares, is_keyframe))
    return guides


def _mark_guide(shares: Tensor | None, guide: BatchGuide, batch: Batch) -> Tensor:
    """Set a guide's share at its latent frame; return the shares of all video latents, B 1 F H W."""
    if shares is None:
        count, _, frames, rows, columns = batch.tensor("latents").shape
        shares = torch.zeros(count, 1, frames, rows, columns, dtype=torch.int16)
    shares[:, :, guide.index] = guide.shares[:, None, None, None]
    return shares


def put_guides_in(tensors: Conditions, _: str, __: torch.Generator) -> Conditions:
    """Return the batch's tensors, with guide images put in place of the latent frames they guide."""
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
    """Return which latents a batch's masks mark as given, B F H W bool.

    Raises DatasetError if there are no masks, or if one gives every latent.
    """
    masks = batch.tensors.get(MASK)
    if not isinstance(masks, Tensor):
        raise DatasetError(
            f"{batch.keys[0]}: --ltx2_inpaint_mask needs masks. Give its table mask_directory, and cache "
            "again"
        )
    given = rule.find_given(masks)
    for key, is_given in zip(batch.keys, given, strict=True):
        if is_given.all():
            raise DatasetError(
                f"{key}: its mask gives the whole clip, or it has no mask: nothing would be learned. Its "
                f"mask needs {'white' if rule.is_inverted else 'black'} parts"
            )
    return given


def _warn_of_whole(keys: Sequence[str], shares: Tensor | None) -> None:
    """Warn about samples whose conditions give every latent, so that nothing is learned."""
    if shares is None:
        return
    for key, share in zip(keys, shares, strict=True):
        if (share > 0).all():
            logger.warning("%s: all of it is given in this step, from which nothing is learned", key)


def take_masks(tensors: Conditions, name: str, generator: torch.Generator) -> Conditions:
    """Take masks out of a batch, so that they select given latents instead of weighting the loss."""
    renamed = {MASK if key == LOSS_MASK else key: value for key, value in tensors.items()}
    return put_guides_in(renamed, name, generator)


def make_given_rules(options: Ltx2GivenParts) -> GivenRules:
    """Return the rules for giving parts of clips, from the options; warn about probabilities of 0."""
    for name in ("ltx2_spatial_crop", "ltx2_inpaint_mask", "ltx2_audio_inpaint_mask"):
        if getattr(options, name) and not getattr(options, f"{name}_p"):
            logger.warning("--%s has no effect with --%s_p 0, the default. Give 1, for all clips", name, name)
    return GivenRules(
        ends=_make_extension(options, ""),
        region=_make_mask(
            options.ltx2_spatial_crop, options.ltx2_spatial_crop_p, options.ltx2_spatial_crop_invert
        ),
        mask=_make_mask(
            options.ltx2_inpaint_mask,
            options.ltx2_inpaint_mask_p,
            options.ltx2_inpaint_mask_invert,
            options.ltx2_inpaint_mask_threshold,
        ),
        anchors=_make_anchors(options),
        audio_ends=_make_extension(options, "audio_"),
        audio_times=_make_mask(
            options.ltx2_audio_inpaint_mask,
            options.ltx2_audio_inpaint_mask_p,
            options.ltx2_audio_inpaint_mask_invert,
            options.ltx2_audio_inpaint_mask_threshold,
        ),
        keyframes=_make_keyframes(options),
    )


def _make_extension(options: Ltx2GivenParts, kind: str) -> Extension | None:
    """Return how many frames a training gives at both ends of clips; None if neither end is used."""

    def read(name: str) -> Any:
        return getattr(options, f"ltx2_{kind}extend_{name}")

    prefix, suffix, both = read("prefix_frames"), read("suffix_frames"), read("p")
    chances = [both if chance is None else chance for chance in (read("prefix_p"), read("suffix_p"))]
    is_one_draw = read("prefix_p") is None and read("suffix_p") is None
    if not (prefix and chances[0]) and not (suffix and chances[1]):
        return None
    return Extension(prefix, suffix, chances[0], chances[1], is_one_draw)


def _make_mask(is_on: bool, probability: float, is_inverted: bool, threshold: float = 0.5) -> MaskRule | None:
    return MaskRule(probability, is_inverted, threshold) if is_on and probability else None


def _make_keyframes(options: Ltx2GivenParts) -> KeyframeRule | None:
    if not options.keyframe_endpoint_training:
        return None
    return KeyframeRule(
        options.keyframe_first_frame_p,
        options.keyframe_last_frame_p,
        options.keyframe_random_interior_p,
        options.keyframe_max_random_interior,
    )


def _make_anchors(options: Ltx2GivenParts) -> AnchorRule | None:
    if not options.video_anchor_training or not options.video_anchor_probability:
        return None
    return AnchorRule(
        options.video_anchor_probability,
        options.video_anchor_strategy,
        options.video_anchor_count,
        options.video_anchor_strength,
    )
