"""How MiniMax-H3 presents keyframes and references to its text encoder: before the prompt.

An image is `<Picture i>: ` and a vision block. A clip is `<Video n>: ` and, for each pair of its frames, two
per second, `<T seconds>` and a vision block. Audio is `<Audio n>: ` alone: the encoder does not hear it. The
prompt follows unchanged. Rows of a vision block, including its two borders, have the tag of images, 0;
all others that of texts, 1. Each text is tokenized separately. Source: the released code, as in diffusers.

    prompt = replace(prompt, presented=present_keyframes([first, last]))      # H W 3 uint8, on the canvas
    prompt = replace(prompt, presented=(present_clip(frames, has_audio=True), PRESENTED_AUDIO))
    conditions = encoder.encode([prompt])                                     # H3TextEncoder, of files.py
"""
# Letters: F frames, H W pixels

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from encoders.picture_prompts import ImagePromptFormat, PatchedImages
from minimax_h3.options import FPS
from minimax_h3.vision import Preprocessing, cut_clip, cut_image
from modules.errors import MediaError

IMAGE, VIDEO, AUDIO = "image", "video", "audio"  # kinds, as in `--reference_jsonl` and in caches
LABELS = {IMAGE: "Picture", VIDEO: "Video", AUDIO: "Audio"}
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PLACEHOLDERS = (IMAGE_PAD, "<|video_pad|>")  # not allowed in prompts with images
IMAGE_PROMPT = ImagePromptFormat(
    text=f"<Picture {{number}}>: {VISION_START}{{tokens}}{VISION_END}",
    token=IMAGE_PAD,
    loads_tower_at_once=False,
)
IMAGE_TAG, TEXT_TAG = 0, 1
ENCODER_FPS = 2.0  # frames of a clip that the encoder sees each second


@dataclass(frozen=True)
class PresentedMedium:
    """An image, clip or audio file that is presented to the text encoder before a prompt."""

    kind: str  # IMAGE, VIDEO or AUDIO
    has_audio: bool = False  # whether a clip has audio
    source: Hashable = None  # where the pixels come from; equal sources are encoded once
    # reads H W 3 of an image, or F H W 3 of a clip at 24 frames per second, uint8; None for audio
    read: Callable[[], Tensor] | None = field(default=None, compare=False)

    def pixels(self) -> Tensor:
        """Return the pixels, H W 3 or F H W 3 uint8; audio media have no pixels."""
        assert self.read is not None, "audio has no pixels"
        return self.read()


PRESENTED_AUDIO = PresentedMedium(AUDIO)


def present_image(pixels: Tensor) -> PresentedMedium:
    """Present an image, H W 3 uint8, to the text encoder."""
    return PresentedMedium(IMAGE, source=_hash(pixels), read=lambda: pixels)


def present_clip(frames: Tensor, has_audio: bool = False) -> PresentedMedium:
    """Present a clip, F H W 3 uint8 at 24 frames per second, to the text encoder."""
    return PresentedMedium(VIDEO, has_audio, source=_hash(frames), read=lambda: frames)


def _hash(pixels: Tensor) -> str:
    digest = hashlib.sha256(pixels.contiguous().cpu().numpy().tobytes()).hexdigest()
    return f"{tuple(pixels.shape)} {digest}"


def present_keyframes(images: Sequence[Tensor]) -> tuple[PresentedMedium, ...]:
    """Present the first and last keyframes, H W 3 uint8 each in the clip's size, to the text encoder."""
    return tuple(present_image(image) for image in images)


class PromptPiece(NamedTuple):
    """A text, or a block of vision tokens, in the order of the prompt."""

    text: str = ""
    num_image_tokens: int = 0  # between the block's start and end tokens


@dataclass(frozen=True)
class Presentation:
    """Texts and image patches that precede a prompt in the text encoder."""

    pieces: tuple[PromptPiece, ...]
    images: PatchedImages  # images of the vision blocks, in order


def present_media(
    media: Sequence[PresentedMedium],
    vision_tower: nn.Module,
    preprocessing: Preprocessing,
    prompt_format: ImagePromptFormat = IMAGE_PROMPT,
) -> Presentation:
    """Return the text labels and image patches that show media to the text encoder, before the prompt.

    `vision_tower` is the text encoder's loaded vision model, which defines the patches.

    Raises MediaError if an image cannot be shown, or a clip has too few frames.
    """
    pieces: list[PromptPiece] = []
    all_patches: list[PatchedImages] = []
    counts = dict.fromkeys(LABELS, 0)  # media of each kind so far

    def make_label(kind: str) -> PromptPiece:
        counts[kind] += 1
        return PromptPiece(f"<{LABELS[kind]} {counts[kind]}>: ")

    for medium in media:
        # audio is only named by its label: the encoder does not hear it
        if medium.kind == AUDIO or medium.has_audio:
            pieces.append(make_label(AUDIO))
        if medium.kind == AUDIO:
            continue
        pieces.append(make_label(medium.kind))
        if medium.kind == VIDEO:
            clip_pieces, patches = _present_clip_frames(vision_tower, medium.pixels(), preprocessing)
            pieces += clip_pieces
        else:
            patches = cut_image(vision_tower, medium.pixels(), preprocessing.images, prompt_format)
            pieces.append(PromptPiece(num_image_tokens=patches.counts[0]))
        all_patches.append(patches)
    # Concatenate the patches of several images; without images there are none
    token_grids = tuple(grid for image in all_patches for grid in image.token_grids)
    joined = torch.cat([image.patches for image in all_patches]) if all_patches else torch.zeros(0)
    return Presentation(tuple(pieces), PatchedImages(joined, token_grids))


def _present_clip_frames(
    vision_tower: nn.Module, frames: Tensor, preprocessing: Preprocessing
) -> tuple[list[PromptPiece], PatchedImages]:
    """Return the prompt pieces (time and tokens) of each frame group of a clip, and the clip's patches."""
    group_size = int(vision_tower.config.temporal_patch_size)  # type: ignore[union-attr,arg-type]
    sampled = sample_clip_frames(len(frames), group_size)
    patches = cut_clip(vision_tower, frames[list(sampled.indices)], preprocessing.clips)
    pieces = []
    for seconds, num_tokens in zip(sampled.group_seconds, patches.counts, strict=True):
        pieces += [PromptPiece(f"<{seconds:.1f} seconds>"), PromptPiece(num_image_tokens=num_tokens)]
    return pieces, patches


class SampledFrames(NamedTuple):
    """The frames of a clip that the text encoder sees."""

    indices: tuple[int, ...]
    group_seconds: tuple[float, ...]  # middle time of each group of frames that are encoded together


def sample_clip_frames(num_frames: int, group_size: int) -> SampledFrames:
    """Select the frames of a clip that the encoder sees, `ENCODER_FPS` each second, in groups.

    `num_frames` is the clip's length at 24 per second. The last group may have fewer frames than the others:
    here only its time is padded, with the last frame's, because `cut_clip` repeats the frame itself. Raises
    MediaError if the clip has fewer frames than one group.
    """
    stride = FPS / ENCODER_FPS
    indices = tuple(range(0, num_frames, round(stride)))
    if len(indices) < group_size:
        minimum = round((group_size - 1) * stride) + 1
        raise MediaError(
            f"a reference video of {num_frames} frames at {FPS:g} a second is too short for the text "
            f"encoder, which needs {minimum}. Use a longer one."
        )
    times = [index / ENCODER_FPS for index in range(len(indices))]
    num_missing = -len(times) % group_size  # frames that the last group lacks
    times += [times[-1]] * num_missing
    group_seconds = []
    for first in range(0, len(times), group_size):
        last = first + group_size - 1
        group_seconds.append((times[first] + times[last]) / 2)
    return SampledFrames(indices, tuple(group_seconds))
