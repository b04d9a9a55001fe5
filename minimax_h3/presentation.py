"""How MiniMax-H3 presents keyframes and references to its text encoder: before the prompt.

An image is `<Picture i>: ` and a vision block. A clip is `<Video n>: ` and, for each pair of its frames, two
per second, `<T seconds>` and a vision block. Audio is `<Audio n>: ` alone: the encoder does not hear it. The
prompt follows as it was typed. Rows of a vision block, including its two borders, have the tag of images, 0;
all others that of texts, 1. Each text is tokenized separately. Source: the released code, as in diffusers.

    prompt = replace(prompt, presented=present_keyframes([first, last]))      # H W 3 uint8, on the canvas
    prompt = replace(prompt, presented=(show_clip(frames, has_sound=True), SHOWN_AUDIO))
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
BEGIN, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PADS = (PAD, "<|video_pad|>")  # not allowed in prompts with images
USE = ImagePromptFormat(
    text=f"<Picture {{number}}>: {BEGIN}{{tokens}}{END}", token=PAD, loads_tower_at_once=False
)
IMAGE_TAG, TEXT_TAG = 0, 1
SEEN_FPS = 2.0  # frames of a clip that the encoder sees each second


@dataclass(frozen=True)
class Shown:
    """An image, clip or audio file that is presented to the text encoder before a prompt."""

    kind: str  # IMAGE, VIDEO or AUDIO
    has_sound: bool = False  # whether a clip has audio
    source: Hashable = None  # where the pixels come from; equal sources are encoded once
    # reads H W 3 of an image, or F H W 3 of a clip at 24 frames per second, uint8; None for audio
    read: Callable[[], Tensor] | None = field(default=None, compare=False)

    def pixels(self) -> Tensor:
        """Return the pixels, H W 3 or F H W 3 uint8; audio media have no pixels."""
        assert self.read is not None, "a sound has no pixels"
        return self.read()


SHOWN_AUDIO = Shown(AUDIO)


def show_image(pixels: Tensor) -> Shown:
    """Present an image, H W 3 uint8, to the text encoder."""
    return Shown(IMAGE, source=_hash(pixels), read=lambda: pixels)


def show_clip(frames: Tensor, has_sound: bool = False) -> Shown:
    """Present a clip, F H W 3 uint8 at 24 frames per second, to the text encoder."""
    return Shown(VIDEO, has_sound, source=_hash(frames), read=lambda: frames)


def _hash(pixels: Tensor) -> str:
    digest = hashlib.sha256(pixels.contiguous().cpu().numpy().tobytes()).hexdigest()
    return f"{tuple(pixels.shape)} {digest}"


def present_keyframes(pictures: Sequence[Tensor]) -> tuple[Shown, ...]:
    """Present the first and last keyframes, H W 3 uint8 each in the clip's size, to the text encoder."""
    return tuple(show_image(image) for image in pictures)


class PresentedPiece(NamedTuple):
    """A text or a block of vision tokens, in the order of presentation."""

    text: str = ""
    tokens: int = 0  # number of tokens between the block's start and end tokens


@dataclass(frozen=True)
class Presentation:
    """Texts and image patches that precede a prompt in the text encoder."""

    pieces: tuple[PresentedPiece, ...]
    pictures: PatchedImages  # images of the vision blocks, in order


def present(
    media: Sequence[Shown], tower: nn.Module, preprocessing: Preprocessing, use: ImagePromptFormat = USE
) -> Presentation:
    """Return the text labels and image patches that present media to the text encoder, in order.

    `tower` is the text encoder's loaded vision model, which defines the patches.

    Raises MediaError if an image cannot be shown, or a clip has too few frames.
    """
    pieces: list[PresentedPiece] = []
    cuts: list[PatchedImages] = []
    counts = dict.fromkeys(LABELS, 0)

    def label(kind: str) -> PresentedPiece:
        counts[kind] += 1
        return PresentedPiece(f"<{LABELS[kind]} {counts[kind]}>: ")

    for medium in media:
        # audio is only named by its label: the encoder does not hear it
        if medium.kind == AUDIO or medium.has_sound:
            pieces.append(label(AUDIO))
        if medium.kind == IMAGE:
            cut = cut_image(tower, medium.pixels(), preprocessing.pictures, use)
            pieces += [label(IMAGE), PresentedPiece(tokens=cut.counts[0])]
            cuts.append(cut)
        elif medium.kind == VIDEO:
            frames = medium.pixels()
            # the encoder sees fewer frames, in groups that each follow the time in seconds
            indices, seconds = sample_clip(len(frames), int(tower.config.temporal_patch_size))  # type: ignore[union-attr,arg-type]
            cut = cut_clip(tower, frames[list(indices)], preprocessing.clips)
            pieces.append(label(VIDEO))
            for second, tokens in zip(seconds, cut.counts, strict=True):
                pieces += [PresentedPiece(f"<{second:.1f} seconds>"), PresentedPiece(tokens=tokens)]
            cuts.append(cut)
    patch_grids = tuple(side for cut in cuts for side in cut.token_grids)
    patches = torch.cat([cut.patches for cut in cuts]) if cuts else torch.zeros(0)
    return Presentation(tuple(pieces), PatchedImages(patches, patch_grids))


def sample_clip(frames: int, at_once: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the indices of the frames that the encoder sees, and the time of each frame group in seconds.

    `frames` is the clip's length at 24 per second, `at_once` the number of frames in a group; the clip's last
    frame may be repeated to fill its group. Raises MediaError if the clip has fewer frames than one group.
    """
    stride = FPS / SEEN_FPS
    indices = tuple(range(0, frames, round(stride)))
    if len(indices) < at_once:
        minimum = round((at_once - 1) * stride) + 1
        raise MediaError(
            f"a reference video of {frames} frames at {FPS:g} a second is too short for the text encoder, "
            f"which needs {minimum}. Give a longer one."
        )
    times = [index / SEEN_FPS for index in range(len(indices))]
    # negative modulo: how many frames the last group lacks
    times += [times[-1]] * (-len(times) % at_once)
    seconds = tuple(
        (times[first] + times[first + at_once - 1]) / 2 for first in range(0, len(times), at_once)
    )
    return indices, seconds
