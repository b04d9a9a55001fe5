"""The frozen records of data: latent spaces, and what caches, datasets and encoders hand to the loops."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.devices import send
from modules.errors import CacheError, DatasetError
from modules.media.lengths import ClipLengths
from protocols.rules import ONE_EXPERT, Expert, NpzFormat, ReferenceMedium

# Inputs of a network in addition to the noisy latents, by the tensor names of the caches (`t5`, `clip`,
# `llama_vec`). A tensor has a batch dimension. If lengths differ per sample (T5), the value is a list with
# one tensor per sample.
Conditions = Mapping[str, Tensor | list[Tensor]]


# key of the loss mask in batches and caches: 1 is learned, 0 is ignored; F H W of the latents
LOSS_MASK = "reelsmith_loss_mask"
CONTROL_MASK = "vace_mask"  # uint8, 255 where pixels are generated; without a mask all of them are

# conditions that a teacher may get and the trained model does not (`Described.teacher_only_conditions`)
CAPTION, FIRST_FRAME = "the caption before dropout", "the first frame"
REFERENCE = "the reference images before dropout"
# latents of a control video or a reference image, in caches and conditions; several have _0, _1, ... appended
CONTROL = "latents_control"
# control image for a network that takes pixels: 3 H W uint8 in caches; conditions also have its strength
CONTROL_PIXELS, CONTROL_STRENGTH = "control_pixels", "control_strength"
IMAGE_LATENTS = "latents_image"  # condition of image-to-video: latents of start, end or control images
# latents of references other than control media, with _0, _1, ... appended
REFERENCE_LATENTS = "latents_reference"

# Images that guide a clip. In caches, latents C 1 H W: keyframes (with _0, _1, ... appended), and an image
# that replaces a latent frame. In batches, GUIDES has B G 2 int64 for these images in this order: index of
# the frame (or latent frame), and the share in `steps.CleanTokens`
KEYFRAME_LATENTS, LATENT_GUIDE, GUIDES = "latents_keyframe", "latents_guide", "guides"
# latents of the rejected sample of a pair, in caches only; shaped like `latents`
REJECTED_LATENTS = "latents_worse"

# latents of a clip's audio, in caches (C T M), batches and conditions (B C T M)
AUDIO_LATENTS = "audio_latents"
# the same inside the cache of a clip's latents (`AudioSpec.is_in_latent_cache`); 0 for silence, else 1
INNER_AUDIO, AUDIO_PRESENT = "latents_audio", "audio_present"
# latents of the reference audio for a clip's audio, next to SOUND; its T may differ
REFERENCE_AUDIO = "reference_audio_latents"
# which samples have audio, in batches and conditions: B bool, on the host. Missing, like the audio latents,
# if no sample has audio
HAS_AUDIO = "has_sound"
# frames per second of a clip: one number in caches; in batches and conditions B integers, in thousandths,
# because integers stay on the host
FPS = "reelsmith_fps"

_REFERENCE_PREFIXES = (CONTROL, REFERENCE_LATENTS, REFERENCE_AUDIO)  # beginnings of names

# size conditions of each image (as in SDXL), in batches B 6 float32: height and width of the file, top and
# left of `modules.media.buckets.inner_box`, height and width in training
SIZES = "reelsmith_sizes"
# the same in caches of other programs that record it: width and height of the file; left, top, right and
# bottom of the box
FOREIGN_SIZES = "reelsmith_said_sizes"

# time indices of latent frames that are not consecutive (an image and its control images as frames of one
# latent): F in caches, B F in batches and conditions, on the host
FRAME_INDICES = "f_indices"

LATENTS_PART, AUDIO_PART = "latents", "sound"  # `CacheOrigin.part` for caches of latents and of audio


def name_texts(conditions: Conditions, names: Mapping[str, str], device: torch.device) -> dict[str, Tensor]:
    """Return the text conditions under the names of the network's arguments, on the network's device.

    Args:
        conditions: Conditions by the names that caches use.
        names: Name in caches by name of the argument.
        device: Device of the network.

    Returns:
        Embeddings, padded with zeros to equal length, and their masks. `send` leaves masks on
            the host: the network reads them there and must not wait for the device.
    """
    arguments = {}
    for argument, name in names.items():
        value = conditions[name]
        if not isinstance(value, Tensor):
            value = nn.utils.rnn.pad_sequence(value, batch_first=True)
        arguments[argument] = send(value, device)
    return arguments


def send_tensor(conditions: Conditions, name: str, device: torch.device) -> Tensor:
    """Return a condition that is one tensor, sent to the network's device."""
    tensor = conditions[name]
    assert isinstance(tensor, Tensor)
    return send(tensor, device)


def name_text_and_mask(
    conditions: Conditions, argument: str, name: str, device: torch.device
) -> dict[str, Tensor]:
    """Return text embeddings, zero-padded to equal length, and the mask of valid tokens, `{argument}_mask`.

    Args:
        conditions: Conditions by the names that caches use.
        argument: Name of the network's argument.
        name: Name of the text embeddings in caches.
        device: Device of the network.
    """
    lengths = torch.tensor([len(rows) for rows in conditions[name]])
    arguments = name_texts(conditions, {argument: name}, device)
    mask = torch.arange(arguments[argument].shape[1]) < lengths[:, None]  # on the host, which reads it
    return {**arguments, f"{argument}_mask": mask}


@dataclass(frozen=True)
class CacheOrigin:
    """The encoder that wrote a cache file, according to the file's metadata."""

    path: Path
    part: str  # LATENTS_PART, AUDIO_PART, or the name of a text encoder
    encoder: Mapping[str, str]  # `Family.media_identity`, `audio_identity` or `TextEncoder.identity`
    # written by a version that read control clips and masks by their own timestamps
    has_separate_timing: bool = False
    windows: int = 0  # number of items from the same clip; 0: not recorded
    earlier_decoder_version: int | None = None  # of an earlier version's clip decoder; None: the current one


@dataclass(frozen=True)
class Batch:
    """One training batch as read from caches: tensors by the names that caches use.

    `latents` is B C F H W, with the values that the cache format stores.
    """

    tensors: Conditions
    captions: tuple[str, ...]
    keys: tuple[str, ...]  # names of the items, for messages
    cache_origins: tuple[CacheOrigin, ...] = ()  # of all cache files that record their encoder
    loss_weights: tuple[float, ...] = ()  # factors on the samples' losses in training; () if all are 1
    # custom_attributes that are enabled in the table of each sample; () if no table has any
    attributes: tuple[frozenset[str], ...] = ()
    # region of each sample that training may keep clean, from its table: top, left, bottom, right in pixels;
    # () if no table has one
    crop_regions: tuple[tuple[int, ...] | None, ...] = ()
    # start and end of the parts of each sample's audio that training may keep clean, in seconds of the clip;
    # () if no table names files with them
    clean_times: tuple[tuple[tuple[float, float], ...] | None, ...] = ()
    # dropped tensors, for a teacher: encoded captions before dropout, latents of reference images
    undropped: Conditions = field(default_factory=dict)
    network_multiplier: float = 1.0  # multiplier of the network in training steps with this batch
    # for `batch_conditions`: the conditions of a teacher (--teacher_sees); "": the trained network's
    condition_set: str = ""
    empty_text: Conditions = field(default_factory=dict)  # of the empty prompt, for targets that need them
    # latents of the rejected sample of each pair, for targets that need them; shaped like `latents`
    rejected: Tensor | None = None
    has_empty_text: tuple[bool, ...] = ()  # whether each sample has the empty prompt; () if no sample has
    # plain metadata of each sample's text cache, which other programs write too; () if texts are encoded live
    text_metadata: tuple[Mapping[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def without_references(self) -> "Batch":
        """Return the batch without reference images: their latents move from `tensors` to `undropped`."""
        dropped = {
            name: value for name, value in self.tensors.items() if name.startswith(_REFERENCE_PREFIXES)
        }
        remaining = {name: value for name, value in self.tensors.items() if name not in dropped}
        return replace(self, tensors=remaining, undropped={**self.undropped, **dropped})

    def restore_dropped(self, names: Collection[str]) -> "Batch":
        """Return the batch with captions or references restored that dropout had removed.

        Args:
            names: Kinds of tensors to restore: CAPTION and REFERENCE.
        """
        parts = {
            name: value
            for name, value in self.undropped.items()
            if (REFERENCE if name.startswith(_REFERENCE_PREFIXES) else CAPTION) in names
        }
        return replace(self, tensors={**self.tensors, **parts})

    def with_empty_text(self) -> "Batch":
        """Return the batch with every text replaced by the empty prompt; media conditions do not change."""
        assert self.empty_text, "the batch was read without the empty prompt"
        tensors = {**self.tensors, **self.empty_text}
        count = len(self)
        return replace(self, tensors=tensors, captions=("",) * count, has_empty_text=(True,) * count)

    def check(self, needed: Mapping[str, str], purpose: str) -> None:
        """Raise CacheError if a tensor is missing.

        Args:
            needed: Caching options that would add it, by the name of each required tensor.
            purpose: What needs the tensors, for the message, such as "--task i2v-14B".
        """
        for name, remedy in needed.items():
            if name not in self.tensors:
                raise CacheError(
                    f"{self.keys[0]}: the cache has no {name}, which {purpose} needs. Cache again with "
                    f"{remedy}."
                )

    def check_widths(self, widths: Mapping[str, int], network_path: Path, remedy: str) -> None:
        """Raise CacheError if cached embeddings do not have the width that the network requires.

        Args:
            widths: Size of the last axis that the network expects, by tensor name.
            network_path: File of the network, for the message.
            remedy: Options to cache again with, for the message.
        """
        for name, expected in widths.items():
            value = self.tensors[name]
            tensors = [value] if isinstance(value, Tensor) else value  # a list: lengths differ
            label = f"{self.keys[0]}: {name} in its cache"
            for tensor in tensors:
                width = tensor.shape[-1] if tensor.ndim else 1
                if not tensor.is_floating_point():  # token ids, as another program may cache them
                    raise CacheError(
                        f"{label} has integers ({tensor.dtype}), not states of a text encoder. Cache "
                        f"again with {remedy}."
                    )
                if width != expected:
                    raise CacheError(
                        f"{label} has width {width}, but {network_path} requires {expected}. Cache again "
                        f"with {remedy}."
                    )

    def tensor(self, name: str) -> Tensor:
        """Return the stacked tensor of that name.

        Raises:
            KeyError: If the caches have none.
        """
        value = self.tensors[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a list of tensors of different lengths")
        return value


@dataclass(frozen=True)
class MediaTable:
    """Properties of a dataset table, for families that need to know more than its clips or images."""

    name: str = ""  # for messages: "data.toml, [[datasets]] 2 (clips)"
    kind: str = "video"  # or "image"
    has_control: bool = False
    has_references: bool = False  # whether it has a reference_directory
    # lengths in frames to which clips are cut; () if clips keep their length, and for images
    target_frames: tuple[int, ...] = ()
    max_frames: int | None = None  # limit for clips that keep their length
    window: int = 9  # latent frames that are denoised together, if a clip has several sections
    clean_indices: tuple[int, ...] = ()  # time index of each control image; 0 for further ones
    target_index: int | None = None  # time index of the target
    has_post: bool = True  # whether a black frame follows the control images
    flips: bool = False  # whether mirrored latents are cached too
    guides: tuple[str, ...] = ()  # names for the latents of guides, the last of `MediaBatch.references`
    reference_media: tuple[
        tuple[ReferenceMedium, ...], ...
    ] = ()  # `MediaBatch.row_references` of each source; () if none has any

    def reject_control(self, model: str) -> None:
        """Raise DatasetError if the table has control media, which `model` does not use."""
        if self.has_control:
            raise DatasetError(
                f"{self.name}: {model} takes no control media. Remove control_directory or control_path."
            )


@dataclass(frozen=True)
class MediaBatch:
    """Frames to encode; all items are from one dataset table, with equal size and number of frames."""

    frames: Tensor  # B F H W C uint8, RGB; RGBA for a family with `LatentSpec.has_alpha`
    keys: tuple[str, ...]  # item names, for messages and for seeding a posterior sample
    spans: tuple[tuple[int, int], ...]  # (first kept frame, number of frames) of each crop; (0, 1) for images
    # control media, each B F H W C uint8; C = 4 if a control image has alpha. Reference images are B 1 H W C,
    # each with its own size and with the C of `frames`
    control: tuple[Tensor, ...] = ()
    alpha: Tensor | None = None  # B H W uint8, if an image has transparent pixels
    table: MediaTable = MediaTable()
    # references from reference_directory (see `ReferenceRules.clips`), each B f h w 3 uint8 with f = 1 or F,
    # followed by guides
    references: tuple[Tensor, ...] = ()
    control_mask: Tensor | None = None  # B F H W uint8: 255 where pixels are generated
    # audio of clips, for a family with `AudioSpec.is_in_latent_cache`: B C S float32, zeros for silence
    audio: Tensor | None = None
    has_audio: tuple[bool, ...] = ()  # whether each clip has audio
    row_references: tuple[
        tuple[ReferenceMedium, ...], ...
    ] = ()  # references of each item, from its row in a list

    def split_for(self, device: torch.device) -> "list[MediaBatch]":
        """Split the items into batches for an encoder on `device`: single items on a CPU, else one batch.

        Batches are not faster on a CPU, and the values of an item that is encoded alone do not depend on the
        items that remain after an interruption.
        """
        if device.type != "cpu":
            return [self]
        return [self.item(number) for number in range(len(self.keys))]

    def item(self, number: int) -> "MediaBatch":
        """Return a batch that contains only the item with this index."""
        single = slice(number, number + 1)
        return replace(
            self,
            frames=self.frames[single],
            keys=self.keys[single],
            spans=self.spans[single],
            control=tuple(control[single] for control in self.control),
            alpha=None if self.alpha is None else self.alpha[single],
            references=tuple(reference[single] for reference in self.references),
            control_mask=None if self.control_mask is None else self.control_mask[single],
            audio=None if self.audio is None else self.audio[single],
            has_audio=self.has_audio[single],
            row_references=self.row_references[single],
        )


@dataclass(frozen=True)
class MomentsBatch:
    """Precomputed posteriors of a VAE, used instead of frames. All items have the same size."""

    # B 2C F H W, before any normalization: means, then logarithms of variances, on the channel axis
    moments: Tensor
    keys: tuple[str, ...]  # item names, for messages and for seeding a posterior sample
    image: Tensor | None = None  # B 2C 1 H W: moments of each clip's first frame alone


@dataclass(frozen=True)
class MomentsRules:
    """Whether a family's caches can be made from posterior moments instead of frames."""

    rejection: str | None = None  # completes "load_tensors cannot be used: ..."; None: moments can be used
    with_image: bool = False  # whether moments of the first frame alone are needed too


@dataclass(frozen=True)
class CacheEntry:
    """Contents of one cache file.

    `tensors` have no batch dimension; their names are the file's without sizes and dtype (`latents`,
    `clip`).
    """

    tensors: Mapping[str, Tensor]
    section: int | None = None  # index of the section, if each section of a clip has a file
    grid: tuple[int, int, int] | None = None  # F, H, W for the names of all latents; None: each tensor's size
    start: int = 0  # index in the clip of the first latent frame
    variable: frozenset[str] = frozenset()  # names of tensors whose length differs per item
    # metadata of the file, in addition to those of all caches
    metadata: Mapping[str, str] = field(default_factory=dict)


def split_items(tensors: Mapping[str, Tensor]) -> list[CacheEntry]:
    """Return a cache entry for each item of a batch.

    Args:
        tensors: Tensors of shape B ..., by name.
    """
    batch_size = len(next(iter(tensors.values())))
    entries = []
    for item in range(batch_size):
        entries.append(CacheEntry({name: tensor[item] for name, tensor in tensors.items()}))
    return entries


def add_batch_axis(conditions: Conditions) -> Conditions:
    """Add a batch axis to a sample's tensors; lists are unchanged, since they have one item per sample."""
    return {
        name: value if isinstance(value, list) else value.unsqueeze(0) for name, value in conditions.items()
    }


@dataclass(frozen=True)
class MediaEncoders:
    """The networks that turn pixels into conditions and latents into pixels, on their device."""

    vae: Any  # the family's own VAE class
    image_encoder: Any = None
    audio: Any = None  # of a family with `AudioSpec.is_in_latent_cache`, in caching


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of a family's VAE, and how cached latents are converted to model space.

    Model-space latents are `cached * scale + shift`, or, with statistics of channels, `(cached - mean) /
    deviation`.
    """

    channels: int
    stride: tuple[int, int, int]  # frames, height, width
    pixel_step: int  # widths and heights are multiples of this
    frame_step: int  # frames are frame_step * n + 1; with `clip` as `lengths` says
    scale: float = 1.0
    shift: float = 0.0
    preview_factors: tuple[tuple[float, float, float], ...] = ()  # channels x RGB, latent to color
    preview_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # whether clips are trained in sections of a fixed length, which the dataset's fp_... keys configure
    in_sections: bool = False
    npz: NpzFormat | None = None  # npz caches of other trainers; None: there are none
    # whether cache files store an image's latents as C H W, without the frame axis
    flat_in_caches: bool = False
    # whether latents are 0 where images are transparent; otherwise images are composited on white
    masks_latents: bool = False
    # whether pixels of images and references have a fourth channel, alpha; 255 for files without one
    has_alpha: bool = False
    has_layers: bool = False  # whether frames are an image and its layers, back to front, each encoded alone
    has_full: bool = True  # with layers: whether the first frame is the full image, not the lowest layer
    names_frames: bool = True  # whether cache files name latents by F x H x W; otherwise by H x W
    # whether training puts the latents of references before the clip's, the last reference first
    references_first: bool = False
    # frames per second assumed for other programs' caches that do not record it; None: no assumption
    default_fps: float | None = None
    clip_frames: int = 0  # a video is encoded in separate clips of this number of frames; 0: in one piece
    tail_frames: int = 1  # number of frames that follow the complete clips of a video
    caches_audio: bool = False  # see `AudioSpec.is_in_latent_cache`
    # metadata (name, value of this run) that distinguishes caches of the same name for different uses
    required_metadata: tuple[tuple[str, str], ...] = ()
    has_size_conditions: bool = False  # whether batches have `SIZES`
    # whether image caches (means of the posterior) of another model with the same autoencoder can be used
    shares_caches: bool = False
    # statistics of the channels, by which cached latents are normalized; (): `scale` and `shift` hold for all
    channel_means: tuple[float, ...] = ()
    channel_deviations: tuple[float, ...] = ()
    # --- derived
    # whether images keep their alpha channel; otherwise they are composited on white
    keeps_alpha: bool = field(init=False, repr=False, compare=False)
    # whether time is not compressed, as in models that generate only single images
    is_image_only: bool = field(init=False, repr=False, compare=False)
    lengths: ClipLengths = field(init=False, repr=False, compare=False)  # possible numbers of frames

    def __post_init__(self) -> None:
        lengths = (
            ClipLengths(self.clip_frames, self.tail_frames)
            if self.clip_frames
            else ClipLengths(self.frame_step)
        )
        object.__setattr__(self, "keeps_alpha", self.masks_latents or self.has_alpha)
        object.__setattr__(self, "is_image_only", self.stride[0] == 1)
        object.__setattr__(self, "lengths", lengths)

    def count_latents(self, frames: int) -> int:
        """Return the number of latent frames for a number of frames.

        The first latent frame of each clip encodes a single frame.
        """
        if not self.clip_frames:
            return (frames - 1) // self.stride[0] + 1
        clips, rest = divmod(frames, self.clip_frames)
        return clips * ((self.clip_frames - 1) // self.stride[0] + 1) + (rest - 1) // self.stride[0] + 1

    def count_frames(self, latents: int) -> int:
        """Return the number of frames for a number of latent frames: the inverse of `count_latents`."""
        if not self.clip_frames:
            return (latents - 1) * self.stride[0] + 1
        clips, rest = divmod(latents, (self.clip_frames - 1) // self.stride[0] + 1)
        return clips * self.clip_frames + max((rest - 1) * self.stride[0] + 1, 0)

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Return the latents' shape, 1 C F H W, for a size in pixels."""
        return (
            1,
            self.channels,
            self.count_latents(frames),
            height // self.stride[1],
            width // self.stride[2],
        )

    def to_model(self, cached: Tensor) -> Tensor:
        """Return cached latents, ... C F H W, in model space, float32."""
        if not self.channel_means:
            return cached.float() * self.scale + self.shift
        means = torch.tensor(self.channel_means, device=cached.device)
        deviations = torch.tensor(self.channel_deviations, device=cached.device)
        return (cached.float() - means.view(-1, 1, 1, 1)) / deviations.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class AudioVideoShapes:
    """Shapes of a clip's video latents and audio latents, which the loops keep in one tensor, B N.

    The video's values come first. Code that treats each value separately, such as a solver, does not need to
    know that there are two parts.
    """

    image: tuple[int, int, int, int]  # C F H W
    audio: tuple[int, int, int]  # C T M

    def join(self, images: Tensor, audio: Tensor) -> Tensor:
        """Flatten image latents B C F H W and audio latents B C T M, and concatenate them to B N."""
        return torch.cat([images.flatten(1), audio.flatten(1)], dim=1)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Split B N into image latents B C F H W and audio latents B C T M, both as views."""
        count = math.prod(self.image)
        return joined[:, :count].unflatten(1, self.image), joined[:, count:].unflatten(1, self.audio)


@dataclass(frozen=True)
class AudioSpec:
    """Properties of a family's audio latents."""

    rate: int  # samples per second of the encoder's input
    channels: int
    # (frames of the clip, frames per second) -> C T M of the latents. It must be picklable, because workers
    # receive it: no lambda
    shape: Callable[[int, float], tuple[int, int, int]]
    # parts of module paths: modules that only clips with audio use have one of them
    modules: tuple[str, ...] = ("audio",)
    # for messages: the option for a run without audio; "": clips may all be silent
    silent_option: str = "another model"
    audio_only: bool = False  # whether only the audio of clips is trained
    time_axis: int = 1  # index of the axis of C T M that depends on the length of the clip
    # whether caches of latents also contain the clip's audio, or silence: `INNER_AUDIO` and `AUDIO_PRESENT`
    is_in_latent_cache: bool = False
    takes_references: bool = False  # whether tables may have reference_audio_directory: `REFERENCE_AUDIO`
    # fraction of training batches that leave these and other references out
    reference_dropout_rate: float = 0.0


@dataclass(frozen=True)
class Audio:
    """A generated track: samples C S, float32, -1..1."""

    samples: Tensor
    rate: int  # samples in a second


@dataclass(frozen=True)
class SamplingDefaults:
    """Default settings of generation and of training samples."""

    steps: int
    fps: float
    guidance_scale: float
    embedded_guidance: float | None
    flow_shift: float | None  # None: the family computes it from the size; training samples cannot set it
    solver: str
    width: int
    height: int
    frames: int
    noise_on_cpu: bool = False  # always draw noise on the CPU, as the released code does
    one_batch: bool = False  # always batch the passes of a step, as the released script does
    # name of an expert -> its own guidance scale
    expert_guidance: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[Expert, ...] = ONE_EXPERT  # all experts of the model, even if a run has only some of them
    # whether a request without a size gets that of its first reference or its start image, or a size like it
    sized_by_images: bool = False
    extras: tuple[str, ...] = ()  # keys of `Request.extra` that lines of training samples may set
    # names of the family's own solvers (`Section.solver`); (): the solvers that all models share
    solvers: tuple[str, ...] = ()


def weigh_tokens(embeddings: Tensor | list[Tensor], weights: Sequence[float]) -> Tensor:
    """Multiply the embeddings of a prompt's first tokens by their weights; the others do not change.

    The product is computed in float32 and rounded once, so that tokens of weight 1 keep every bit.

    Args:
        embeddings: Embeddings of one prompt's tokens, L C or L n C.
        weights: Weights of the prompt's tokens, at most L.
    """
    assert isinstance(embeddings, Tensor)
    num_weighted = len(weights)
    factors = torch.tensor(weights, dtype=torch.float32, device=embeddings.device)
    factors = factors.reshape(-1, *[1] * (embeddings.ndim - 1))
    weighted = embeddings.clone()
    weighted[:num_weighted] = (embeddings[:num_weighted].float() * factors).to(embeddings.dtype)
    return weighted
