"""The frozen records of data that caches, datasets and encoders hand to the loops."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.devices import send
from modules.errors import CacheError

# What a network is given beside the noisy latents. A list where lengths differ per sample (as T5's). Keys are
# the tensor names of the caches (`t5`, `clip`, `llama_vec`); entries have a batch dimension, a list one entry
# per sample.
Conditions = Mapping[str, Tensor | list[Tensor]]

# key of the mask of the loss in batches and caches: 1 is learned, 0 is not; F H W of the latents
LOSS_MASK = "reelsmith_loss_mask"
LATENTS_MADE = "latents"  # `MadeBy.part` of latent caches


def name_texts(conditions: Conditions, names: Mapping[str, str], device: torch.device) -> dict[str, Tensor]:
    """Return the conditions that texts give, under the names of the network's arguments, on its device.

    names: argument -> name in caches. Texts of different lengths are padded with zeros. Masks are on the
    host: the network reads them there, and must not wait for the device.
    """
    found = {}
    for argument, name in names.items():
        value = conditions[name]
        if not isinstance(value, Tensor):
            value = nn.utils.rnn.pad_sequence(value, batch_first=True)
        found[argument] = send(value, device)
    return found


@dataclass(frozen=True)
class MadeBy:
    """The encoders of a cache file, by its record."""

    path: Path
    part: str  # LATENTS_MADE, or the name of a text encoder
    encoder: Mapping[str, str]  # `Family.media_identity`, or `TextEncoder.identity`


@dataclass(frozen=True)
class Batch:
    """One training batch as read from caches: tensors by cache name (`latents` B C F H W, as the format
    stores them).
    """

    tensors: Conditions
    captions: tuple[str, ...]
    keys: tuple[str, ...]  # which items, for messages
    made_by: tuple[MadeBy, ...] = ()  # of all files that say so
    loss_weights: tuple[float, ...] = ()  # factors on the samples' losses in training; () where all are 1
    # which samples are to keep what the base model predicts for them; () where none is
    preserved: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def check(self, needed: Mapping[str, str], purpose: str) -> None:
        """Raise CacheError where a tensor is not there.

        needed: name -> command that caches it again. purpose: "--task i2v-14B".
        """
        for name, remedy in needed.items():
            if name not in self.tensors:
                raise CacheError(
                    f"{self.keys[0]}: the cache has no {name}, which {purpose} needs. Cache again with "
                    f"{remedy}."
                )

    def check_widths(self, widths: Mapping[str, int], taker: Path, remedy: str) -> None:
        """Raise CacheError where tensors were made by another encoder than the network was trained with.

        widths: name -> numbers in the last axis that the network in the file `taker` takes. remedy: how to
        cache again.
        """
        for name, taken in widths.items():
            value = self.tensors[name]
            for each in [value] if isinstance(value, Tensor) else value:
                found = each.shape[-1] if each.ndim else 1
                if not each.is_floating_point():
                    raise CacheError(
                        f"{self.keys[0]}: {name} in its cache has whole numbers ({each.dtype}), not states "
                        f"of a text encoder. Cache again with {remedy}."
                    )
                if found != taken:
                    raise CacheError(
                        f"{self.keys[0]}: {name} in its cache is {found} numbers wide, {taker} takes "
                        f"{taken}. Cache again with {remedy}."
                    )

    def tensor(self, name: str) -> Tensor:
        """The stacked tensor of that name. Raises KeyError where the caches have none."""
        value = self.tensors[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a list of tensors of different lengths")
        return value


@dataclass(frozen=True)
class MediaTable:
    """A table's facts about its items, for families that need more than a clip or a picture."""

    name: str = ""  # for messages: "data.toml, [[datasets]] 2 (clips)"
    kind: str = "video"  # or "image"
    has_control: bool = False
    # lengths that clips are cut to; () where each is as long as it is, and for images
    target_frames: tuple[int, ...] = ()
    max_frames: int | None = None  # of the longest clip, where each is as long as it is
    window: int = 9  # latent frames that are denoised together, where a clip has several sections
    clean_indices: tuple[int, ...] = ()  # places in time of the control images; those without one stand at 0
    target_index: int | None = None  # place in time of the target
    has_post: bool = True  # one black frame behind the control images


@dataclass(frozen=True)
class MediaBatch:
    """Frames to encode. All items are of one table and have one size and number of frames."""

    frames: Tensor  # B F H W C uint8, RGB
    keys: tuple[str, ...]  # item names, for messages and for seeding a posterior sample
    spans: tuple[tuple[int, int], ...]  # (first kept frame, number of frames) of each crop; (0, 1) for images
    control: tuple[Tensor, ...] = ()  # each B F H W C uint8; C = 4 where a control image has alpha
    alpha: Tensor | None = None  # B H W uint8: of pictures that are transparent somewhere
    table: MediaTable = MediaTable()

    def singly(self) -> "list[MediaBatch]":
        """The items as batches of one."""
        return [self._only(slice(index, index + 1)) for index in range(len(self.keys))]

    def _only(self, items: slice) -> "MediaBatch":
        alpha = None if self.alpha is None else self.alpha[items]
        control = tuple(control[items] for control in self.control)
        return replace(
            self,
            frames=self.frames[items],
            keys=self.keys[items],
            spans=self.spans[items],
            control=control,
            alpha=alpha,
        )

    def split_for(self, device: torch.device) -> "list[MediaBatch]":
        """The items as an encoder on that device takes them: all in one batch, on a CPU each by itself.

        A batch gains nothing there, and singly an item's numbers do not depend on what else a run that was
        killed had left to do.
        """
        return self.singly() if device.type == "cpu" else [self]


@dataclass(frozen=True)
class MomentsBatch:
    """Posteriors of a VAE that were computed before, instead of frames. All items are of one size."""

    # B 2C F H W, before any normalisation: means, then logarithms of variances, on the channel axis
    moments: Tensor
    keys: tuple[str, ...]  # item names, for messages and for seeding a posterior sample
    image: Tensor | None = None  # B 2C 1 H W: of each clip's first frame alone


@dataclass(frozen=True)
class MomentsRules:
    """Rules for making a family's caches from moments instead of frames."""

    refusal: str | None = None  # why they cannot: completes "load_tensors cannot be used: ..."
    with_image: bool = False  # whether those of the first frame alone are needed too


@dataclass(frozen=True)
class CacheEntry:
    """Content of one cache file: tensors without batch dimension, by their name without sizes and dtype
    (`latents`, `clip`).
    """

    tensors: Mapping[str, Tensor]
    section: int | None = None  # which section of the clip, from its start, where each has a file
    grid: tuple[int, int, int] | None = None  # F, H, W in the names of all latents; None: each tensor's own
    start: int = 0  # which latent frame of the clip the first of `latents` is


def add_batch_axis(conditions: Conditions) -> Conditions:
    """Give conditions of a single sample their batch dimension: tensors gain an axis, lists stay (one entry
    per sample).
    """
    return {
        name: value if isinstance(value, list) else value.unsqueeze(0) for name, value in conditions.items()
    }


@dataclass(frozen=True)
class MediaEncoders:
    """The networks that turn pixels into conditions and latents into pixels, on their device."""

    vae: Any  # the family's own VAE class
    image_encoder: Any = None
