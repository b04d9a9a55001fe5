"""The sections of a long video: how many, in which order they are made, what each sees of the others, how
they are joined.

FramePack denoises one window of latent frames after the other. A window sees the start image, and what was
made before it at full, half and quarter resolution; every latent frame that the network is given has a place
on one line of time, its index. Two orders exist. **Anti-drifting** (the default) makes the last section first
and ends at the start image, which stands before every section. **F1** makes them in playing order. Pure
arithmetic; nothing here knows a network.

Source: Zhang and Agrawala 2025, arXiv 2504.12626; section numbers and paddings as in the released code.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from modules.errors import OptionError
from modules.media.fading import cross_fade

FRAMES_PER_SECOND = 30  # what the model was trained with; --fps only labels the file
LATENT_STRIDE = 4  # frames of a latent frame, but for the first, which holds one
FRAMES_2X = 2  # latent frames of the past that are seen at half resolution
FRAMES_4X = 16  # and at quarter resolution
FURTHEST = 999  # sections between the start image and another; usual are 3 at most
HISTORY = 1 + FRAMES_2X + FRAMES_4X  # latent frames of the past that a section sees in all

# as released: the line through (256 tokens, 0.5) and (4096 tokens, 1.15), and its upper end
_SHIFT_LINE = ((256, 0.5), (4096, 1.15))
_LARGEST_SHIFT = 7.0

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Indices:
    """Places on the line of time of all latent frames that the network is given in one call; empty where
    there are none.
    """

    clean: tuple[int, ...]  # at full resolution: the start image and the neighbour in time
    clean_2x: tuple[int, ...]
    clean_4x: tuple[int, ...]
    target: tuple[int, ...]  # the frames to denoise


@dataclass(frozen=True)
class SectionPlan:
    """One section in the order of making."""

    index: int  # from the start of the video, 0 is the first to be played
    padding: int  # windows that the network is told to be between the start image and this section
    indices: Indices


# How many, how long


def count_sections(seconds: float, window: int, sections: int | None = None) -> int:
    """How many sections a video has. seconds: --video_seconds; sections: --video_sections, which is taken
    where given.

    window: latent frames of a section, --latent_window_size. Raises OptionError for lengths that no video
    has.
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
        raise OptionError(f"--video_seconds {seconds}: give a positive number of seconds.")
    return max(1, round(seconds * FRAMES_PER_SECOND / (LATENT_STRIDE * window)))


def sections_in(latent_frames: int, window: int) -> int:
    """How many whole sections a video of training has behind its first frame; 0 where it is too short for
    one.
    """
    return (latent_frames - 1) // window


def video_latents(sections: int, window: int) -> int:
    """Latent frames of the whole video: its sections behind the start image."""
    return sections * window + 1


def video_frames(sections: int, window: int) -> int:
    """Frames of the whole video."""
    return pixel_frames(video_latents(sections, window))


def section_frames(window: int) -> int:
    """Frames that one section alone decodes to; also by how many the clips of two neighbours overlap."""
    return pixel_frames(window)


def pixel_frames(latent_frames: int) -> int:
    """Frames that so many latent frames decode to."""
    return LATENT_STRIDE * (latent_frames - 1) + 1


# Where each latent frame stands


def default_paddings(sections: int) -> tuple[int, ...]:
    """Windows between the start image and each section, in the order of making.

    The released code does not count down from the length of a long video: it repeats 2.
    """
    if sections > 4:
        return (3, *[2] * (sections - 3), 1, 0)
    return tuple(reversed(range(sections)))


def parse_paddings(text: str) -> tuple[int, ...]:
    """Read --latent_paddings, as "3,2,1,0".

    Raises OptionError where it is no list of whole numbers from 0 to 999.
    """
    try:
        paddings = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        paddings = (-1,)
    if min(paddings) < 0 or max(paddings) > FURTHEST:
        raise OptionError(
            f"--latent_paddings {text!r}: give whole numbers from 0 to {FURTHEST} with commas between them, "
            "as 3,2,1,0."
        )
    return paddings


def section_indices(padding: int, window: int) -> Indices:
    """The line of an anti-drifting section: start image, `padding` windows left out, target, then what
    follows it in the video.
    """
    target = 1 + padding * window
    later = later_indices(target + window)
    return replace(later, clean=(0, *later.clean), target=_run(target, window))


def later_indices(first: int) -> Indices:
    """Where what follows a target stands, from index `first` on: one frame in full, two at half, sixteen at
    quarter resolution.
    """
    return Indices(
        clean=(first,),
        clean_2x=_run(first + 1, FRAMES_2X),
        clean_4x=_run(first + 1 + FRAMES_2X, FRAMES_4X),
        target=(),
    )


def f1_indices(window: int) -> Indices:
    """The line of every F1 section: start image, the past from far to near, target."""
    return Indices(
        clean=(0, HISTORY),
        clean_2x=_run(1 + FRAMES_4X, FRAMES_2X),
        clean_4x=_run(1, FRAMES_4X),
        target=_run(HISTORY + 1, window),
    )


def entry_for(entries: Mapping[int, Entry], index: int, sections: int) -> Entry:
    """What was given for a section (a prompt, an image): by its index from the end (-1 is the last), from the
    start, else 0.
    """
    return next(entries[key] for key in (index - sections, index, 0) if key in entries)


def _run(start: int, length: int) -> tuple[int, ...]:
    return tuple(range(start, start + length))


# What a section sees


@dataclass(frozen=True)
class CleanLatents:
    """What the network is given beside the target: B C F H W each, placed by `Indices`."""

    clean: Tensor  # F 2
    clean_2x: Tensor  # in full, as the next one: the network makes them smaller
    clean_4x: Tensor


@dataclass(frozen=True)
class Order:
    """An order of making, as the functions that a loop over its sections calls.

    The history is what was made so far, B C F H W in playing order, never less than 19 frames: black stands
    for what is missing. A loop over true latents in place of made ones gives what training sees.
    """

    # number of sections, window, --latent_paddings
    plan: Callable[[int, int, Sequence[int]], tuple[SectionPlan, ...]]
    # start, end image (B C 1 H W) -> the history before the first section
    begin: Callable[[Tensor, Tensor | None], Tensor]
    seen: Callable[[Tensor, Tensor], CleanLatents]  # start, history -> what the next section sees
    grown: Callable[[Tensor, Tensor], Tensor]  # history, section just made -> history
    # start, history, latent frames made -> these, the start image first
    video: Callable[[Tensor, Tensor, int], Tensor]
    in_front: bool  # each section is played before those made until then


def _plan_backwards(sections: int, window: int, paddings: Sequence[int]) -> tuple[SectionPlan, ...]:
    all_paddings = (*paddings, *default_paddings(sections)[len(paddings) :])[:sections]
    return tuple(
        SectionPlan(sections - 1 - made, padding, section_indices(padding, window))
        for made, padding in enumerate(all_paddings)
    )


def _plan_forwards(sections: int, window: int, _paddings: Sequence[int]) -> tuple[SectionPlan, ...]:
    return tuple(SectionPlan(index, 0, f1_indices(window)) for index in range(sections))


def _begin_backwards(start: Tensor, end: Tensor | None) -> Tensor:
    history = _black(start)
    if end is not None:
        history[:, :, :1] = end
    return history


def _begin_forwards(start: Tensor, _end: Tensor | None) -> Tensor:
    return torch.cat([_black(start), start], dim=2)


def _black(start: Tensor) -> Tensor:
    return start.new_zeros(*start.shape[:2], HISTORY, *start.shape[3:])


def _seen_backwards(start: Tensor, history: Tensor) -> CleanLatents:
    near, half, quarter = history[:, :, :HISTORY].split([1, FRAMES_2X, FRAMES_4X], dim=2)
    return CleanLatents(torch.cat([start, near], dim=2), half, quarter)


def _seen_forwards(start: Tensor, history: Tensor) -> CleanLatents:
    quarter, half, near = history[:, :, -HISTORY:].split([FRAMES_4X, FRAMES_2X, 1], dim=2)
    return CleanLatents(torch.cat([start, near], dim=2), half, quarter)


def _grown_backwards(history: Tensor, section: Tensor) -> Tensor:
    return torch.cat([section, history], dim=2)


def _grown_forwards(history: Tensor, section: Tensor) -> Tensor:
    return torch.cat([history, section], dim=2)


def _video_backwards(start: Tensor, history: Tensor, made: int) -> Tensor:
    return torch.cat([start, history[:, :, :made]], dim=2)


def _video_forwards(_start: Tensor, history: Tensor, made: int) -> Tensor:
    return history[:, :, -(made + 1) :]  # the start image is in it


# --latent_paddings and the end image mean nothing to F1
ANTI_DRIFTING = Order(
    _plan_backwards, _begin_backwards, _seen_backwards, _grown_backwards, _video_backwards, in_front=True
)
F1 = Order(_plan_forwards, _begin_forwards, _seen_forwards, _grown_forwards, _video_forwards, in_front=False)


# The flow shift


def count_tokens(latent_frames: int, height: int, width: int) -> int:
    """Tokens of the target alone. height, width: of the latents; a token covers 2 x 2 of them."""
    return latent_frames * (height // 2) * (width // 2)


def flow_shift_for(tokens: int) -> float:
    """The flow shift of a target of so many tokens: exponential in them, 7 at most.

    The schedule is that of `make_schedule("unipc-bh1", ...)` with this shift.
    """
    (few, low), (many, high) = _SHIFT_LINE
    exponent = low + (high - low) * (tokens - few) / (many - few)
    return _LARGEST_SHIFT if exponent > math.log(_LARGEST_SHIFT) else math.exp(exponent)


# Decoding


def decoding_slices(sections: int, window: int) -> tuple[slice, ...]:
    """The latent frames that are decoded together, in playing order: each section with the next, for a seam
    without a jump.
    """
    total = video_latents(sections, window)
    starts = [0, *(index * window + 1 for index in range(1, sections))]
    ends = [min((index + 2) * window + 1, total) for index in range(sections)]
    return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))


def blend_overlaps(clips: Iterable[Tensor], overlap: int) -> Iterator[Tensor]:
    """Join clips, each of which repeats the last `overlap` frames of the one before, with a linear
    transition.

    clips: B C F H W in playing order. Yields pieces in playing order; no more than two clips are held at a
    time. Raises ValueError where a clip is too short for its transitions.
    """
    tail: Tensor | None = None
    for clip in clips:
        if clip.shape[2] < overlap:
            raise ValueError(f"a clip of {clip.shape[2]} frames cannot overlap by {overlap}")
        if tail is not None:
            clip = torch.cat([cross_fade(tail, clip[:, :, :overlap]), clip[:, :, overlap:]], dim=2)
        body, tail = clip.tensor_split([clip.shape[2] - overlap], dim=2)
        if body.shape[2]:
            yield body
    if tail is not None:
        yield tail
