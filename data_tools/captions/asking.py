"""Shared by local models and servers: select frames and prompts, and extract captions from answers."""

import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools.captions.places import CaptionLocation
from dataset.caching.prefetch import run_ahead
from dataset.config_keys import MAX_WORDS
from dataset.sources.captions import add_trigger
from modules.control_codes import extract_caption
from modules.errors import OptionError
from modules.limits import MAX_CAPTION_BYTES
from modules.media.reading import Frame, pick_frames, read_image, resize_stretched
from modules.options import Options, option
from modules.text_files import bad_character

MAX_FRAMES = 1024
MAX_TOKENS = 32_768
DEFAULT_MAX_TOKENS, DEFAULT_MAX_JSON_TOKENS = 256, 2048  # defaults of --max_new_tokens
Pairs = tuple[tuple[str, str], ...]
KEY = "the key of this name in the dataset's TOML does the same without touching files"

Frames = tuple[Frame, ...]  # of one image or clip, each H W 3
ReadFrames = Callable[[CaptionLocation], Frames]  # reads the frames that a model sees
# pairs of a location, and its caption or the reason why there is none; other errors end the run
CaptionResults = Generator[tuple[CaptionLocation, str | Exception], None, None]
Captioner = Callable[[Sequence[CaptionLocation], ReadFrames], CaptionResults]  # captions by a model or server
AHEAD_BYTES = 1 << 30  # limit on the memory of frames that wait for the model
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


class AskOptions(Options, title="what is asked"):
    """Prompt, frames and sampling settings for captioning."""

    prompt: str | None = option(
        "what the model is asked about each image or clip; default: to describe it in one paragraph"
    )
    system_prompt: str | None = option("system message before the prompt")
    num_frames: int = option(
        "frames of a clip to show, evenly spaced over all of it", default=8, minimum=1, maximum=MAX_FRAMES
    )
    max_pixels: int = option(
        "most pixels of a frame; larger ones are scaled down; default: 262144, as 512 x 512",
        default=262_144,
        minimum=1024,
    )
    max_new_tokens: int | None = option(
        f"most tokens of a caption; default: {DEFAULT_MAX_TOKENS}, with --caption_format "
        f"{DEFAULT_MAX_JSON_TOKENS}",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    temperature: float = option(
        "0 always selects the most probable token; above 0, tokens are sampled",
        default=0.0,
        minimum=0,
        maximum=10,
        hint="1 samples from the probabilities of the model",
    )
    seed: int = option(
        "seed of drawn words, with --temperature above 0",
        default=0,
        minimum=-(2**63),
        below=2**64,
        ignored_without="temperature",
    )

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise OptionError("--prompt is empty: say what to describe, or omit it for the usual one")


class WordingOptions(Options, title="the text that is written"):
    """Options for text that is added to captions or replaced in them."""

    trigger_word: str = option(f"put before each caption that does not hold it; {KEY}", default="")
    caption_prefix: str = option(f"put before each caption that does not begin with it; {KEY}", default="")
    caption_suffix: str = option(f"put behind each caption that does not end with it; {KEY}", default="")
    replace: Pairs = option(
        "replace a text in each caption, before anything is put around it; may be given several times",
        default=(),
        nargs=2,
        action="append",
        metavar=("OLD", "NEW"),
    )
    replace_regex: Pairs = option(
        "the same with a regular expression of Python, after all of --replace",
        default=(),
        nargs=2,
        action="append",
        metavar=("PATTERN", "NEW"),
    )

    def __post_init__(self) -> None:
        """Check the texts to add and the replacements; raise OptionError for an invalid one."""
        for name in ("trigger_word", "caption_prefix", "caption_suffix"):
            text = getattr(self, name)
            if len(text) > MAX_WORDS or len(text.splitlines()) > 1:
                raise OptionError(f"--{name}: pass one line of at most {MAX_WORDS} characters")
        for name in ("replace", "replace_regex"):
            for old, new in getattr(self, name):
                character = bad_character(old + new)
                if character is not None:
                    raise OptionError(f"--{name} contains {character}: set the terminal to UTF-8")
                if not old:
                    raise OptionError(f'--{name} "" {new!r}: say what to replace')
        for pattern, new in self.replace_regex:
            try:
                re.compile(pattern).sub(new, "")  # called only to raise errors in the pattern or in `new`
            except (re.error, IndexError, OverflowError, RecursionError) as error:
                raise OptionError(
                    f"--replace_regex {pattern!r} {new!r}: {error}. Use the syntax of re.sub in Python"
                ) from None

    @property
    def changes_something(self) -> bool:
        """Whether any of the wording options is set."""
        return any(
            (self.trigger_word, self.caption_prefix, self.caption_suffix, self.replace, self.replace_regex)
        )


class CaptionInput(NamedTuple):
    """The frames of an image or clip that a model captions."""

    location: CaptionLocation
    frames: Frames


class NoCaptionError(Exception):
    """Raised if an image or clip gets no caption, with the reason; the run continues with the next one."""

    def __init__(self, reason: str, server_failed: bool = False) -> None:
        """Store the reason; `server_failed`: the server answered none of several requests."""
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


def read_sampled_frames(path: Path, is_image: bool, num_frames: int, max_pixels: int) -> Frames:
    """Read an image, or `num_frames` evenly spaced frames of a clip: H W 3 each, of at most `max_pixels`.

    Raises:
        MediaError: If the file cannot be read.
    """
    shrink = partial(_shrink, max_pixels=max_pixels)
    if is_image:
        return (shrink(read_image(path)),)
    select_indices = partial(select_frames, maximum=num_frames)
    return tuple(pick_frames(path, select_indices, shrink))


def _shrink(frame: Frame, max_pixels: int) -> Frame:
    """Shrink a frame to at most `max_pixels` pixels, keeping its aspect ratio; never enlarge it."""
    height, width = frame.shape[:2]
    if height * width <= max_pixels:
        return frame
    scale = math.sqrt(max_pixels / (height * width))
    new_size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return resize_stretched(frame, new_size)


def caption_in_batches(
    locations: Sequence[CaptionLocation],
    read_frames: ReadFrames,
    *,
    batch_size: int,
    item_bytes: int,
    caption_batch: Callable[[Sequence[CaptionInput]], Iterable[tuple[CaptionLocation, str | Exception]]],
) -> CaptionResults:
    """Yield (location, caption or error) for each image or clip; files are read ahead by threads.

    Args:
        locations: What is captioned.
        read_frames: Reads the frames of a location, which take `item_bytes` of memory.
        batch_size: Number of locations per batch.
        item_bytes: Memory for the frames of one location.
        caption_batch: Yields (location, caption or error) for each input of a batch.
    """
    read_ahead = run_ahead(
        locations,
        read_frames,
        workers=min(WORKERS, os.cpu_count() or 1),
        size_bytes=lambda _: item_bytes,
        limit_bytes=AHEAD_BYTES,
    )
    batch: list[CaptionInput] = []
    for location, frames in read_ahead:
        if isinstance(frames, Exception):  # the file cannot be read
            yield location, frames
            continue
        batch.append(CaptionInput(location, frames))
        if len(batch) == batch_size:
            yield from caption_batch(batch)
            batch = []
    if batch:
        yield from caption_batch(batch)


def select_prompt(location: CaptionLocation, ask_options: AskOptions) -> str:
    """Return the prompt for a media file: its own, else --prompt, else the default for images or clips."""
    if location.prompt is not None:
        return location.prompt
    return ask_options.prompt if ask_options.prompt is not None else PROMPTS[location.source.table.kind]


def parse_caption(answer: str, was_cut: bool) -> str:
    """Extract the caption from a model's answer: one line without reasoning, quotes and special tokens.

    `was_cut` says that --max_new_tokens ended the answer.

    Raises:
        NoCaptionError: If no caption is left.
    """
    caption = extract_caption(_TOKENS.sub(" ", answer), _MAX_CHARACTERS)
    if not caption:
        why = ", and --max_new_tokens ended it: raise that" if was_cut else ""
        raise NoCaptionError(f"the model's answer contains no text{why}")
    return caption


def reword(caption: str, wording: WordingOptions) -> str:
    """Apply the wording options: replacements, then trigger word, prefix and suffix.

    The result is "prefix trigger, caption suffix", as with the keys of a dataset table. Parts that the
    caption already contains are not added again.
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
