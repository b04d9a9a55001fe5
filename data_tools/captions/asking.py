"""What local models and servers share: select frames, ask the question, extract the answer's caption."""

import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from data_tools.captions.options import AskOptions, WordingOptions
from data_tools.captions.places import CaptionLocation
from dataset.caching.prefetch import run_ahead
from dataset.sources.captions import add_trigger
from modules.control_codes import extract_caption
from modules.limits import MAX_CAPTION_BYTES
from modules.media.reading import Frame, pick_frames, read_image, resize_stretched

Frames = tuple[Frame, ...]  # each H W 3
Look = Callable[[CaptionLocation], Frames]  # reads the frames that a model sees
# pairs of a location, and its caption or the reason why there is none; other errors end the run
Answers = Generator[tuple[CaptionLocation, str | Exception], None, None]
Answerer = Callable[[Sequence[CaptionLocation], Look], Answers]  # a model or server that makes captions
Shown = tuple[CaptionLocation, Frames]
AHEAD_BYTES = 1 << 30  # limit for the frames that wait for the model
WORKERS = 4  # threads that read frames

PROMPTS = {
    "image": "Describe this image in one paragraph of plain English, for a model that learns to make images "
    "from text: who or what is seen and how it looks, what happens, the surroundings, the light and the "
    "style. Begin with the subject. Say nothing that is not seen, and answer with the description alone.",
    "video": "These are frames of one video, in order. Describe the video in one paragraph of plain English, "
    "for a model that learns to make videos from text: who or what is seen and how it looks, what it does "
    "from beginning to end, the surroundings, how the camera moves, the light and the style. Begin with the "
    "subject. Say nothing that is not seen, do not mention frames, and answer with the description alone.",
}
# special tokens that may remain in an answer: <|im_end|>, </s>, <end_of_turn>
_TOKENS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|end_of_turn|end_of_utterance|end_of_text)>"
)
_MAX_CHARACTERS = MAX_CAPTION_BYTES // 4  # in UTF-8 a character has up to four bytes


class NoCaptionError(Exception):
    """An image or clip gets no caption, for the given reason; the run continues with the next one."""

    def __init__(self, reason: str, server_failed: bool = False) -> None:
        """Store the reason; `server_failed` says that the server answered none of several requests."""
        super().__init__(reason)
        self.server_failed = server_failed


def select_frames(num_frames: int, maximum: int) -> tuple[int, ...]:
    """Return the indices of at most `maximum` frames: the middle frame of each of as many equal segments.

    All frames of a shorter clip are shown.

    Source: segment sampling, Wang et al. 2016, arXiv 1608.00859, section 3.1.
    """
    if num_frames <= maximum:
        return tuple(range(num_frames))
    # part i covers [i, i + 1) * num_frames / maximum, with its middle at i + 1/2
    return tuple((2 * part + 1) * num_frames // (2 * maximum) for part in range(maximum))


def read_shown(path: Path, is_image: bool, num_frames: int, max_pixels: int) -> Frames:
    """Return the frames that the captioning model sees, H W 3 each, scaled down to `max_pixels`.

    For a clip these are evenly spaced frames.

    Raises:
        MediaError: If the file cannot be read.
    """

    def shrink(frame: Frame) -> Frame:
        """Reduce a frame to at most `max_pixels` pixels."""
        return _shrink(frame, max_pixels)

    if is_image:
        return (shrink(read_image(path)),)
    return tuple(pick_frames(path, lambda length: select_frames(length, num_frames), shrink))


def _shrink(frame: Frame, max_pixels: int) -> Frame:
    """Shrink a frame to at most `max_pixels` pixels, keeping its aspect ratio; never enlarge it."""
    height, width = frame.shape[:2]
    if height * width <= max_pixels:
        return frame
    scale = math.sqrt(max_pixels / (height * width))
    new_size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return resize_stretched(frame, new_size)


def answer_in_batches(
    locations: Sequence[CaptionLocation],
    look: Look,
    *,
    batch_size: int,
    item_bytes: int,
    answer_batch: Callable[[Sequence[Shown]], Iterable[tuple[CaptionLocation, str | Exception]]],
) -> Answers:
    """Caption images and clips in batches with a local model, while threads read files ahead.

    `look` reads the frames of a location, which take `item_bytes` of memory. `answer_batch` yields a caption,
    or the error, for each of at most `batch_size` locations with their frames.
    """
    workers = min(WORKERS, os.cpu_count() or 1)
    batch: list[Shown] = []
    ahead = run_ahead(
        locations, look, workers=workers, size_bytes=lambda _: item_bytes, limit_bytes=AHEAD_BYTES
    )
    for location, frames in ahead:
        if isinstance(frames, Exception):
            yield location, frames
            continue
        batch.append((location, frames))
        if len(batch) == batch_size:
            yield from answer_batch(batch)
            batch = []
    if batch:
        yield from answer_batch(batch)


def prompt_for(location: CaptionLocation, ask: AskOptions) -> str:
    """Return the prompt for a source: its own, else the option's, else the default for its kind."""
    if location.question is not None:
        return location.question
    return ask.prompt if ask.prompt is not None else PROMPTS[location.source.table.kind]


def caption_in(answer: str, was_cut: bool) -> str:
    """Extract the caption from a model's answer: one line without reasoning, quotes and special tokens.

    `was_cut` says that --max_new_tokens ended the answer.

    Raises:
        NoCaptionError: If no caption is left.
    """
    caption = extract_caption(_TOKENS.sub(" ", answer), _MAX_CHARACTERS)
    if not caption:
        why = ", and --max_new_tokens ended it: raise that" if was_cut else ""
        raise NoCaptionError(f"the model's answer holds no text{why}")
    return caption


def reword(caption: str, wording: WordingOptions) -> str:
    """Apply the wording options: replacements, then trigger word, prefix and suffix.

    The result is "prefix trigger, caption suffix", as with the keys of a dataset table. Parts that the
    caption already has are not added again.
    """
    for old, new in wording.replace:
        caption = caption.replace(old, new)
    for pattern, new in wording.replace_regex:
        caption = re.sub(pattern, new, caption)
    caption = add_trigger(caption.strip(), wording.trigger_word.strip())
    prefix, suffix = wording.caption_prefix.strip(), wording.caption_suffix.strip()
    if prefix and not caption.startswith(prefix):
        caption = f"{prefix} {caption}"
    if suffix and not caption.endswith(suffix):
        caption = f"{caption} {suffix}"
    return caption
