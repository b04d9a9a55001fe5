"""The frozen records that cross folder borders."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.attention_options import SDPA, AttentionChoice
from modules.checkpoint_files import TensorInfo
from modules.errors import CacheError
from modules.fp8_options import Quantisation

# What a network is given beside the noisy latents. A list where lengths differ per sample (as T5's). Keys are the tensor names of
# the caches (`t5`, `clip`, `llama_vec`); entries have a batch dimension, a list one entry per sample.
Conditions = Mapping[str, Tensor | list[Tensor]]


LATENTS_MADE = "latents"  # `MadeBy.part` of latent caches


@dataclass(frozen=True)
class MadeBy:
    """What encoded a cache file, as its record says."""

    path: Path
    part: str  # LATENTS_MADE, or the name of a text encoder
    encoder: Mapping[str, str]  # `Family.media_identity`, or `TextEncoder.identity`


@dataclass(frozen=True)
class Batch:
    """One training batch as read from caches: tensors by cache name (`latents` B C F H W, as the format stores them)."""

    tensors: Conditions
    captions: tuple[str, ...]
    keys: tuple[str, ...]  # which items, for messages
    made_by: tuple[MadeBy, ...] = ()  # of all files that say so

    def __len__(self) -> int:
        return len(self.captions)

    def check(self, needed: Mapping[str, str], purpose: str) -> None:
        """Raise CacheError where a tensor is not there. needed: name -> what to cache again with. purpose: "--task i2v-14B"."""
        for name, remedy in needed.items():
            if name not in self.tensors:
                raise CacheError(f"{self.keys[0]}: the cache has no {name}, which {purpose} needs. Cache again with {remedy}.")

    def check_widths(self, widths: Mapping[str, int], taker: Path, remedy: str) -> None:
        """Raise CacheError where tensors were made by another encoder than the network was trained with.

        widths: name -> numbers in the last axis that the network in the file `taker` takes. remedy: what to cache again with.
        """
        for name, taken in widths.items():
            width = self.tensor(name).shape[-1]
            if width != taken:
                raise CacheError(
                    f"{self.keys[0]}: {name} in its cache is {width} numbers wide, {taker} takes {taken}. "
                    f"Cache again with {remedy}."
                )

    def tensor(self, name: str) -> Tensor:
        """The stacked tensor of that name. Raises KeyError where the caches have none."""
        value = self.tensors[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a list of tensors of different lengths")
        return value


@dataclass(frozen=True)
class MediaTable:
    """What a dataset table says of its items, for families to whom a clip or a picture alone does not say all."""

    name: str = ""  # for messages: "data.toml, [[datasets]] 2 (clips)"
    kind: str = "video"  # or "image"
    has_control: bool = False
    target_frames: tuple[int, ...] = ()  # lengths that clips are cut to; () where each is as long as it is, and for images
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
            self, frames=self.frames[items], keys=self.keys[items], spans=self.spans[items], control=control, alpha=alpha
        )

    def encoded_at_once(self, device: torch.device) -> "list[MediaBatch]":
        """The items as an encoder on that device takes them: all in one batch, on a CPU each by itself.

        A batch gains nothing there, and singly an item's numbers do not depend on what else a run that was killed had left to do.
        """
        return self.singly() if device.type == "cpu" else [self]


@dataclass(frozen=True)
class CacheEntry:
    """What one cache file holds: tensors without batch dimension, by their name without sizes and dtype (`latents`, `clip`)."""

    tensors: Mapping[str, Tensor]
    section: int | None = None  # which section of the clip, from its start, where each has a file
    grid: tuple[int, int, int] | None = None  # F, H, W in the names of all latents; None: each tensor's own


@dataclass(frozen=True)
class Prompt:
    """A text to encode, with weights for parts of it as (start, end, weight) in characters."""

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()
    second: str | None = None  # for the second text encoder of a family that has two; None: the same text


@dataclass(frozen=True)
class Prompts:
    """The texts of one section: what to show, what to avoid, and the empty prompt where a guidance idea needs it."""

    positive: Prompt
    negative: Prompt | None = None
    blank: Prompt | None = None


@dataclass(frozen=True)
class Request:
    """One video or image to make. None = not said; `Family.prepare` fills it from the task, the images and the options."""

    prompt: str
    seed: int
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    flow_shift: float | None = None
    solver: str | None = None  # euler, unipc, unipc-bh1, dpm++
    fps: float | None = None
    negative_prompt: str | None = None
    cfg_schedule: str | None = None
    image_path: Path | None = None
    end_image_path: Path | None = None
    control_path: Path | None = None
    video_path: Path | None = None
    strength: float | None = None  # how much of `video_path` is made anew, 0..1
    extra: Mapping[str, str] = field(default_factory=dict)  # family-only prompt options, as text

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, height and frames, once `Family.prepare` has settled them."""
        assert self.width is not None
        assert self.height is not None
        assert self.frames is not None
        return self.width, self.height, self.frames


@dataclass(frozen=True)
class EncodedPrompts:
    """The conditions of one section's texts, without batch dimension, on the CPU."""

    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None

    def section(self, noise: Tensor, inputs: Conditions | None = None, source: Tensor | None = None) -> "Section":
        """Join texts, noise (B C F H W) and media conditions (with batch dimension) into what is denoised."""

        def joined(text: Conditions | None) -> Conditions | None:
            return None if text is None else {**batched(text), **(inputs or {})}

        positive = joined(self.positive)
        assert positive is not None
        return Section(noise, positive, joined(self.negative), joined(self.blank), source)


def batched(conditions: Conditions) -> Conditions:
    """Give conditions of a single sample their batch dimension: tensors gain an axis, lists stay (one entry per sample)."""
    return {name: value if isinstance(value, list) else value.unsqueeze(0) for name, value in conditions.items()}


@dataclass(frozen=True)
class MediaEncoders:
    """The networks that turn pixels into conditions and latents into pixels, on their device."""

    vae: Any  # the family's own VAE class
    image_encoder: Any = None


DecodePart = Callable[[MediaEncoders, Tensor], Iterator[Tensor]]  # as `Family.decode`, but not limited to -1..1


@dataclass(frozen=True)
class Piece:
    """What a section added to a video that grows, for a preview of it."""

    latents: Tensor  # B C F H W, to decode by themselves
    overlap: int  # how many of its frames show what is there already and fade into it; 0 for the first piece
    in_front: bool  # it is played before the video so far; else after it
    decode: DecodePart  # makes its pixels, before they fade into what is there


@dataclass(frozen=True)
class Section:
    """One run of the denoising loop. Conditions have a batch dimension."""

    noise: Tensor  # B C F H W, model space, float32
    positive: Conditions
    negative: Conditions | None = None
    blank: Conditions | None = None
    source: Tensor | None = None  # clean latents to start from (video-to-video), B C F H W
    made: Piece | None = None  # what the section before this one added to the video
    label: str = ""  # which one it is of several ("section 2 of 4"), for the progress bar


WeightPatch = Callable[[str, Tensor], Tensor]  # (parameter name, loaded weight) -> weight with LoRA deltas added, same dtype


class HostPlace(Protocol):
    """Where weights are kept that stay in host memory although their network computes on a device."""

    def hold(self, network: nn.Module, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Tensor]:
        """Memory for those that are to stay, by name. network: may be on the meta device. tensors: all that it has."""
        ...

    @property
    def is_filled_here(self) -> bool: ...  # else another process writes them

    def finish(self) -> None: ...  # all are written; returns when those of other processes are too


@dataclass(frozen=True)
class Placement:
    """Where and how a network is loaded."""

    device: torch.device
    storage_dtype: torch.dtype | None = None  # None: as the file stores it (fp8 files: upcast to the compute dtype)
    compute_dtype: torch.dtype | None = None  # None: that of the file's block weights (fp8 files: bfloat16)
    fp8_compute_dtype: torch.dtype | None = None  # what fp8 files compute in where nothing else is said; None: bfloat16
    keep_file_dtypes: bool = False  # every tensor as the file stores it, where it mixes dtypes
    attention: AttentionChoice = SDPA
    patch: WeightPatch | None = None  # LoRA deltas to add while loading, before any rounding
    fp8: Quantisation | None = None  # how the linear layers of the blocks are kept in 8 bits; None: they are not
    host: HostPlace | None = None  # keeps some weights in host memory; None: all go to the device


@dataclass(frozen=True)
class Tweaks:
    """Ideas that change a single call of the network."""

    skip_blocks: frozenset[int] = frozenset()  # these blocks pass their input through (skip-layer guidance)


NO_TWEAKS = Tweaks()
Predict = Callable[..., tuple[Tensor, ...]]  # predict(*conditions, tweaks=...) -> one velocity per condition
DitAt = Callable[[float], nn.Module]  # timestep -> the expert to call
