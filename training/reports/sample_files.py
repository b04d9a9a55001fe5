"""Find the samples of a run and read them in reduced size; draw sheets and the grid of the page."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from modules.control_codes import escape_control_codes
from modules.errors import UserError
from modules.integers import ceil_div
from modules.media.layers import COMPOSITE
from modules.media.reading import Frame, read_image, video_frames, video_info
from modules.media.writing import write_png
from modules.pages.language import say
from modules.pages.page import embed_clip, link, reduce_frame
from training.reports.history import RunHistory, SampleRow

SIDE = 256  # pixels of the longer side
MAX_FRAMES = 96  # frames of a clip; longer clips keep every 2nd, 4th, ... frame, at the same speed
AUDIO_RATE = 8000  # sample rate at which audio is read for its image
LIGHT, DARK = np.array([250, 250, 250]), np.array([24, 24, 27])
STRIP_GAP = 4  # pixels between the frames of a strip
GAP = 8  # pixels between the parts of a sheet
TITLE_SIZE, TEXT_SIZE = 18, 14
MAX_ROWS = 40  # rows of a sheet; with more it would be too tall
MIN_WIDTH = 480  # minimum width in pixels, so that prompts are readable
# loads the clip of a sample from its file name, prompt and step; returns the reason if that fails
LoadClip = Callable[[str, str, int], Markup | str]


@dataclass(frozen=True, order=True)
class GridPrompt:
    """A row of the grid of samples: a prompt, its number, and the strength of the LoRA in its samples."""

    index: int
    prompt: str
    strength: float


@dataclass(frozen=True)
class DownscaledClip:
    """Frames of a sample, reduced in size and number for the page."""

    frames: list[Frame]  # each H W 3
    fps: float


def find_samples(folder: Path, name: str, step_label: str) -> dict[int, Path]:
    """Return the newest sample file of each prompt at a step, by the prompt's number.

    For an image with layers, it is the file of the composed image.
    """
    # the seed, if the prompt has one; then `_000` for a single image of a video model
    end = rf"(_\d+)?(_000|{COMPOSITE})?\.(png|mp4|wav)"
    pattern = re.compile(rf"{re.escape(name)}_{step_label}_(\d{{2,9}})_(\d{{14}}){end}")
    newest: dict[int, tuple[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None:
            index = int(match[1])
            time_text = match[2]  # YYYYMMDDhhmmss
            newest[index] = max(newest.get(index, ("", path)), (time_text, path))
    return {index: path for index, (_, path) in sorted(newest.items())}


def read_downscaled(path: Path) -> DownscaledClip:
    """Read a generated image, video or audio file as small frames, with their frame rate.

    Raises:
        MediaError: If the file cannot be read.
    """
    if path.suffix == ".png":
        return DownscaledClip([reduce_frame(read_image(path), SIDE)], 1.0)
    if path.suffix == ".wav":
        # An image of a WAV file's amplitude over time
        from modules.media.samples import read_track, track_info  # of runs with sound alone

        info = track_info(path)
        seconds = Fraction(1) if info is None or info.end is None else info.end
        num_samples = max(SIDE, int(seconds * AUDIO_RATE))
        audio = read_track(path, Fraction(0), num_samples, rate=AUDIO_RATE, channels=2)
        peaks = np.zeros(SIDE)  # largest amplitude in each column of the image
        if audio is not None:
            peaks = np.array([abs(chunk).max() for chunk in np.array_split(audio, SIDE, axis=1)])
        heights = abs(np.linspace(-1, 1, SIDE // 4))[:, None]
        is_waveform = heights <= np.maximum(peaks, 0.02)
        return DownscaledClip([np.where(is_waveform[..., None], LIGHT, DARK).astype(np.uint8)], 1.0)
    frames: list[Frame] = []
    stride = 1
    # the length is not known in advance: whenever there are too many frames, every second one is dropped
    for index, frame in enumerate(video_frames(path)):
        if index % stride:
            continue
        frames.append(reduce_frame(frame, SIDE))
        if len(frames) > MAX_FRAMES:
            frames = frames[::2]
            stride = 2 * stride
    return DownscaledClip(frames, (video_info(path).fps or 16.0) / stride)  # 16: if the file has no rate


def join_strip(clip: DownscaledClip) -> Frame:
    """Return the first, middle and last frame side by side (H W 3), or the only frame."""
    last = len(clip.frames) - 1
    frames = [clip.frames[index] for index in dict.fromkeys((0, last // 2, last))]
    gap = np.full((frames[0].shape[0], STRIP_GAP, 3), 24, np.uint8)
    joined = [frames[0]]
    for frame in frames[1:]:
        joined += [gap, frame]
    return np.concatenate(joined, axis=1)


def write_sheet(path: Path, title: str, strips: Mapping[int, Frame], prompts: Mapping[int, str]) -> None:
    """Write a PNG contact sheet: each sample's strip of frames below its prompt. Does nothing without strips.

    Raises:
        OutputError: If the file cannot be written.
    """
    rows = [(prompts.get(index, ""), strips[index]) for index in sorted(strips)[:MAX_ROWS]]
    if not rows:
        return
    sheet = _draw_sheet(title, rows)

    write_png(path, np.asarray(sheet))


def _draw_sheet(title: str, rows: Sequence[tuple[str, Frame]]) -> Image.Image:
    """Return a contact sheet with a row for each prompt and strip of frames, one below the other."""
    text_height = TEXT_SIZE + GAP
    title_height = TITLE_SIZE + 3 * GAP
    row_heights = [text_height + strip.shape[0] + 2 * GAP for _, strip in rows]
    width = max(MIN_WIDTH, *(strip.shape[1] for _, strip in rows)) + 2 * GAP
    sheet = Image.new("RGB", (width, title_height + sum(row_heights)), (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    title = _cut_to_width(title, width, TITLE_SIZE)
    draw.text((GAP, GAP), title, font=_load_font(TITLE_SIZE), fill=(250, 250, 250))
    y = title_height
    for (prompt, strip), row_height in zip(rows, row_heights, strict=True):
        text = _cut_to_width(prompt, width, TEXT_SIZE)
        draw.text((GAP, y), text, font=_load_font(TEXT_SIZE), fill=(210, 210, 215))
        sheet.paste(Image.fromarray(strip), (GAP, y + text_height))
        y += row_height
    return sheet


def _cut_to_width(text: str, width: int, size: int) -> str:
    """Shorten a text so that it fits on one line of the contact sheet."""
    text = escape_control_codes(" ".join(text[:1000].split()))
    font = _load_font(size)
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(text + "\u2026") > width - 2 * GAP:
        text = text[: -max(1, len(text) // 20)]
    return text + "\u2026"


@lru_cache(maxsize=4)
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # slow to import

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


MAX_CLIP_BYTES = 300_000  # in base64; a larger clip is mostly noise, and is reduced to SMALL_SIDE
SMALL_SIDE = 128


@dataclass
class ClipStore:
    """A cache of the downscaled clips in the page's grid of samples; each clip is encoded once."""

    folder: Path
    clips: dict[str, Markup] = field(default_factory=dict)

    def for_page(self) -> LoadClip:
        """Return a function that loads clips for a page; its cache keeps only clips of the previous page."""
        previous_clips = self.clips
        self.clips = {}
        return partial(self._load, previous_clips)

    def _load(self, previous_clips: Mapping[str, Markup], name: str, prompt: str, step: int) -> Markup | str:
        """Return the encoded clip of a sample, reused from the previous page if possible, else read again."""
        if name in previous_clips:
            self.clips[name] = previous_clips[name]
        if name not in self.clips:
            try:
                self.add(name, prompt, step, read_downscaled(self.folder / name))
            except (OSError, UserError):
                return "the file is gone, or cannot be read"
        return self.clips[name]

    def add(self, name: str, prompt: str, step: int, clip: DownscaledClip) -> None:
        """Encode the downscaled clip of a sample and add it to the page.

        Raises:
            UserError: If the clip cannot be encoded.
        """
        text = f"{prompt}, step {step}"  # alternative text of the image
        for side in (SIDE, SMALL_SIDE):
            self.clips[name] = embed_clip(clip.frames, clip.fps, text, side)
            if len(self.clips[name]) <= MAX_CLIP_BYTES:
                break


def select_columns(rows: Sequence[SampleRow], best_step: int | None, maximum: int) -> list[SampleRow]:
    """Return at most `maximum` rows: every nth, the last, and the nearest to the best step.

    n is a power of two, so that most of the selected rows remain when the list grows.
    """
    if len(rows) <= maximum:
        return list(rows)
    stride = 1
    while ceil_div(len(rows), stride) > maximum - 2:
        stride *= 2
    chosen = {*range(0, len(rows), stride), len(rows) - 1}
    if best_step is not None:
        chosen.add(min(range(len(rows)), key=lambda index: abs(rows[index].step - best_step)))
    return [rows[index] for index in sorted(chosen)]


def select_first_shown(num_columns: int, best: int | None, maximum: int = 4) -> set[int]:
    """Return the indices of columns shown before a row is expanded: first, last, best and some between.

    Args:
        num_columns: Number of columns.
        best: Index of the column nearest to the lowest validation loss.
        maximum: Largest number of columns to show.
    """
    chosen = {0, num_columns - 1} | ({best} if best is not None else set())
    while len(chosen) < min(maximum, num_columns):
        in_order = sorted(chosen)
        start, end = max(itertools.pairwise(in_order), key=lambda pair: pair[1] - pair[0])
        chosen.add((start + end) // 2)
    return chosen


def make_grid(run_history: RunHistory, load: LoadClip, max_columns: int, max_prompts: int) -> dict[str, Any]:
    """Return the content of the page's sample grid: steps as columns, prompts as rows."""
    sampled_steps = [run_history.samples[key] for key in sorted(run_history.samples)]
    best_step = None if run_history.lowest_validation is None else run_history.lowest_validation.step
    columns = select_columns(sampled_steps, best_step, max_columns)
    best_index: int | None = None  # column nearest to the lowest validation loss
    if best_step and columns:
        best_index = min(range(len(columns)), key=lambda index: abs(columns[index].step - best_step))
    first_shown = select_first_shown(len(columns), best_index)
    titles = []
    for index, samples in enumerate(columns):
        title = _format_column_title(samples)
        titles.append(
            {"title": title, "is_best": index == best_index, "is_further": index not in first_shown}
        )
    prompts = _list_prompts(sampled_steps)
    grid_rows: list[dict[str, Any]] = []
    for row in prompts[:max_prompts]:
        cells = [_load_cell(samples, row, load) for samples in columns]
        title = add_strength(row.prompt, row.strength)
        grid_rows.append({"prompt": title, "index": row.index, "cells": cells})
    return {
        "columns": titles,
        "rows": grid_rows,
        "few": len(first_shown),  # columns shown until the reader expands the grid
        "times": len(sampled_steps),
        "prompts": len(prompts),
    }


def add_strength(prompt: str, strength: float) -> str:
    """Return a prompt with the strength of the LoRA in its sample, unless that is 1."""
    if strength == 1:
        return prompt
    return say("%(prompt)s (LoRA at %(strength)s)", prompt=prompt, strength=f"{strength:g}")


def _list_prompts(sampled_steps: Sequence[SampleRow]) -> list[GridPrompt]:
    """Return all prompts; one that was changed during the run has each of its texts."""
    prompts: set[GridPrompt] = set()
    for samples in sampled_steps:
        prompts |= {_find_prompt(samples, index) for index in samples.files}
    return sorted(prompts)


def _find_prompt(samples: SampleRow, index: int) -> GridPrompt:
    return GridPrompt(index, samples.prompts.get(index, ""), samples.strengths.get(index, 1.0))


def _load_cell(samples: SampleRow, row: GridPrompt, load: LoadClip) -> dict[str, Any] | None:
    """Return the table cell of a prompt in the column of a step; None if the step has no sample of it."""
    name = samples.files.get(row.index)
    if name is None or _find_prompt(samples, row.index) != row:
        return None
    return {"clip": load(name, row.prompt, samples.step), "href": link("sample", name)}


def _format_column_title(samples: SampleRow) -> str:
    """Return a column title: the step, and the epoch for samples made at the end of an epoch."""
    if not samples.step:
        return say("before training")
    step = say("step %(step)s", step=f"{samples.step:,}")
    if samples.step_label[1:].isdigit() and samples.step_label[0] == "e":  # as in e000001
        return say("%(step)s, epoch %(epoch)s", step=step, epoch=int(samples.step_label[1:]))
    return step
