"""The sections of a long video: their number and order, the context of each, and how they are joined.

FramePack denoises one window of latent frames after another. A window sees the start image, and the frames
generated before it at full, half and quarter resolution. Every latent frame that the network takes has an
index on one time line. There are two orders. **Anti-drifting** (the default) generates the last section first
and works back to the start image, which every section sees. **F1** generates the sections in playing order.
Pure arithmetic; no code here depends on a network.

Source: Zhang and Agrawala 2025, arXiv 2504.12626; section numbers and paddings as in the released code.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from frame_pack.options import FRAMES_PER_SECOND
from modules.errors import OptionError
from modules.media.pixels import cross_fade

LATENT_STRIDE = 4  # frames in a latent frame; the first one covers a single frame
FRAMES_2X = 2  # latent frames of the past seen at half resolution
FRAMES_4X = 16  # latent frames of the past seen at quarter resolution
FURTHEST = 999  # maximum number of sections between the start image and a section; usually at most 3
HISTORY = 1 + FRAMES_2X + FRAMES_4X  # number of past latent frames that a section sees

# as released: the line through (256 tokens, 0.5) and (4096 tokens, 1.15), and its upper end
_SHIFT_LINE = ((256, 0.5), (4096, 1.15))
_LARGEST_SHIFT = 7.0

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Indices:
    """Frame indices of all latents that the network takes in one call; empty for unused parts."""

    clean: tuple[int, ...]  # at full resolution: the start image and the neighbor in time
    clean_2x: tuple[int, ...]
    clean_4x: tuple[int, ...]
    target: tuple[int, ...]  # the frames to denoise

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Return the frame indices of each used part of the context, by cache key."""
        parts = {
            "latent_indices": self.target,
            "clean_latent_indices": self.clean,
            "clean_latent_2x_indices": self.clean_2x,
            "clean_latent_4x_indices": self.clean_4x,
        }
        return {name: numbers for name, numbers in parts.items() if numbers}


@dataclass(frozen=True)
class SectionPlan:
    """One section in the order of generation: its index and its frame indices."""

    index: int  # position in the video; 0 is played first
    padding: int  # windows between the start image and this section, for the time indices
    indices: Indices


# Number and length of sections


def count_sections(seconds: float, window: int, sections: int | None = None) -> int:
    """Return the number of sections of a video.

    Args:
        seconds: --video_seconds.
        window: --latent_window_size, the latent frames of a section.
        sections: --video_sections, which replaces `seconds` if given.

    Raises:
        OptionError: For invalid lengths.
    """
    if window < 1:
        raise OptionError(
            f"--latent_window_size {window}: a section has at least 1 latent frame; the model was trained "
            "with 9."
        )
    if sections is not None:
        if sections < 1:
            raise OptionError(f"--video_sections {sections}: a video has at least 1 section.")
        return sections
    if not (seconds > 0 and math.isfinite(seconds * FRAMES_PER_SECOND)):
        raise OptionError(f"--video_seconds {seconds}: pass a positive number of seconds.")
    return max(1, round(seconds * FRAMES_PER_SECOND / (LATENT_STRIDE * window)))  # at least one section


def count_window_sections(latent_frames: int, window: int) -> int:
    """Return how many full sections a clip has, after the latent frame of its start image."""
    return (latent_frames - 1) // window


def video_latents(sections: int, window: int) -> int:
    """Return the number of latent frames of a video, including the start image."""
    return sections * window + 1


def video_frames(sections: int, window: int) -> int:
    """Return the number of pixel frames of a video."""
    return pixel_frames(video_latents(sections, window))


def section_frames(window: int) -> int:
    """Return the number of pixel frames of one section."""
    return pixel_frames(window)


def pixel_frames(latent_frames: int) -> int:
    """Return the number of pixel frames that latent frames decode to."""
    return LATENT_STRIDE * (latent_frames - 1) + 1


# The time index of each latent frame


def default_paddings(sections: int) -> tuple[int, ...]:
    """Return how many windows lie between the start image and each section, in the order of generation.

    These count down to 0. For more than four sections the released code uses 3, 2, ..., 2, 1, 0 instead.
    """
    if sections > 4:
        return (3, *[2] * (sections - 3), 1, 0)
    return tuple(reversed(range(sections)))


def parse_paddings(text: str) -> tuple[int, ...]:
    """Parse --latent_paddings, such as "3,2,1,0".

    Raises OptionError if it is not a list of whole numbers from 0 to 999.
    """
    try:
        paddings = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        paddings = (-1,)  # refused below, with the same message
    if min(paddings) < 0 or max(paddings) > FURTHEST:
        raise OptionError(
            f"--latent_paddings {text!r}: use whole numbers from 0 to {FURTHEST} with commas between them, "
            "such as 3,2,1,0."
        )
    return paddings


def section_indices(padding: int, window: int) -> Indices:
    """Return the indices of an anti-drifting section: start image, target, and latents after the target.

    `padding` windows are left out between the start image and the target.
    """
    target = 1 + padding * window
    later = history_indices_after(target + window)
    return replace(later, clean=(0, *later.clean), target=_list_indices(target, window))


def history_indices_after(first: int) -> Indices:
    """Return the frame indices of clean latents that follow a target, starting at `first`.

    One frame is at full resolution, two at half and sixteen at quarter resolution.
    """
    return Indices(
        clean=(first,),
        clean_2x=_list_indices(first + 1, FRAMES_2X),
        clean_4x=_list_indices(first + 1 + FRAMES_2X, FRAMES_4X),
        target=(),
    )


def f1_indices(window: int) -> Indices:
    """Return every F1 section's frame indices: start image, past frames from oldest to newest, target."""
    return Indices(
        clean=(0, HISTORY),
        clean_2x=_list_indices(1 + FRAMES_4X, FRAMES_2X),
        clean_4x=_list_indices(1, FRAMES_4X),
        target=_list_indices(HISTORY + 1, window),
    )


def select_entry(entries: Mapping[int, Entry], index: int, sections: int) -> Entry:
    """Return a section's entry: stored under its index from the end (-1: last), its index, or 0."""
    # the first existing key in this order
    return next(entries[key] for key in (index - sections, index, 0) if key in entries)


def _list_indices(start: int, length: int) -> tuple[int, ...]:
    return tuple(range(start, start + length))


# What a section sees


@dataclass(frozen=True)
class CleanLatents:
    """Clean latents around the target that the network attends to, B C F H W each.

    Their frame indices are the fields of `Indices` with the same names.
    """

    clean: Tensor  # F 2
    clean_2x: Tensor  # at full size, like `clean_4x`: the network reduces both
    clean_4x: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """Return the latents of the context by cache key."""
        return {
            "latents_clean": self.clean,
            "latents_clean_2x": self.clean_2x,
            "latents_clean_4x": self.clean_4x,
        }


@dataclass(frozen=True)
class GenerationOrder:
    """Order in which sections are generated, for a loop over them.

    The history contains the finished latents, B C F H W in playing order, and always at least 19 frames:
    black ones fill in for missing ones. The same loop over true latents, instead of generated ones, gives
    training inputs.
    """

    prepends_sections: bool  # whether each section is played before the sections generated earlier

    def plan_sections(self, sections: int, window: int, paddings: Sequence[int]) -> tuple[SectionPlan, ...]:
        """Plan the sections in the order of generation; F1 ignores `paddings` (--latent_paddings)."""
        if not self.prepends_sections:
            return tuple(SectionPlan(index, 0, f1_indices(window)) for index in range(sections))
        further_paddings = default_paddings(sections)[len(paddings) :]
        all_paddings = (*paddings, *further_paddings)
        plans = []
        for number, padding in enumerate(all_paddings[:sections]):
            indices = section_indices(padding, window)
            plans.append(SectionPlan(sections - 1 - number, padding, indices))
        return tuple(plans)

    def start_history(self, start: Tensor, end: Tensor | None) -> Tensor:
        """Return the latent frames that serve as history for the first section.

        The images are B C 1 H W latents. F1 ignores the end image.
        """
        history = start.new_zeros(*start.shape[:2], HISTORY, *start.shape[3:])
        if not self.prepends_sections:
            return torch.cat([history, start], dim=2)
        if end is not None:
            history[:, :, :1] = end
        return history

    def clean_latents(self, start: Tensor, history: Tensor) -> CleanLatents:
        """Return the clean latents on which the next section is conditioned."""
        if self.prepends_sections:
            near, half, quarter = history[:, :, :HISTORY].split([1, FRAMES_2X, FRAMES_4X], dim=2)
        else:
            quarter, half, near = history[:, :, -HISTORY:].split([FRAMES_4X, FRAMES_2X, 1], dim=2)
        return CleanLatents(torch.cat([start, near], dim=2), half, quarter)

    def add_to_history(self, history: Tensor, section: Tensor) -> Tensor:
        """Return the history with a new section at its end, or at its front for generation from the end."""
        return torch.cat([section, history] if self.prepends_sections else [history, section], dim=2)

    def join_video(self, start: Tensor, history: Tensor, frames: int) -> Tensor:
        """Return the start image and `frames` latent frames of the history, in playing order."""
        if self.prepends_sections:
            return torch.cat([start, history[:, :, :frames]], dim=2)
        return history[:, :, -(frames + 1) :]  # this includes the start image


ANTI_DRIFTING = GenerationOrder(prepends_sections=True)
F1 = GenerationOrder(prepends_sections=False)


# The flow shift


def count_tokens(latent_frames: int, height: int, width: int) -> int:
    """Return the number of target tokens; a token covers 2 x 2 latent pixels."""
    return latent_frames * (height // 2) * (width // 2)


def compute_flow_shift(tokens: int) -> float:
    """Return the flow shift for a target of this many tokens: it grows exponentially, up to 7.

    `make_schedule("unipc-bh1", ...)` makes the noise levels from it.
    """
    (few, low), (many, high) = _SHIFT_LINE
    exponent = low + (high - low) * (tokens - few) / (many - few)
    return _LARGEST_SHIFT if exponent > math.log(_LARGEST_SHIFT) else math.exp(exponent)


# Decoding


def decoding_slices(sections: int, window: int) -> tuple[slice, ...]:
    """Return the latent frames to decode together, in playing order: two sections each, for smooth seams."""
    total = video_latents(sections, window)
    starts = [0, *(index * window + 1 for index in range(1, sections))]
    ends = [min((index + 2) * window + 1, total) for index in range(sections)]
    return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))


def blend_overlaps(clips: Iterable[Tensor], overlap: int) -> Iterator[Tensor]:
    """Join clips that repeat the last `overlap` frames of the previous clip, with a linear cross-fade.

    Yields pieces in playing order, and keeps at most two clips in memory. `clips` are B C F H W in playing
    order. Raises ValueError if a clip is shorter than `overlap`.
    """
    tail: Tensor | None = None
    for clip in clips:
        if clip.shape[2] < overlap:
            raise ValueError(f"a clip of {clip.shape[2]} frames cannot overlap by {overlap}")
        if tail is not None:
            # the repeated frames are blended with the previous clip's last ones
            clip = torch.cat([cross_fade(tail, clip[:, :, :overlap]), clip[:, :, overlap:]], dim=2)
        body, tail = clip.tensor_split([clip.shape[2] - overlap], dim=2)
        if body.shape[2]:
            yield body
    if tail is not None:
        yield tail
