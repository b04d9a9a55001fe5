"""The grid of samples on the page of a training: a row for each prompt, a column for each time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modules.errors import UserError
from modules.pages.page import embed_clip
from training.reports.history import SampleRow, Story
from training.reports.page import LoadClip, link
from training.reports.sample_files import SIDE, ReducedClip, read_reduced

MOST_CLIP_BYTES = 300_000  # as base64; a clip beyond that is noise, and is made smaller
SMALL_SIDE = 128
OLD_CLIPS_SECONDS = 5.0  # what a page spends on clips of before a resume; the rest follows on the next one


@dataclass
class ClipStore:
    """Hold the reduced clips of the grid, each encoded once."""

    folder: Path
    now: Callable[[], float] = time.monotonic
    clips: dict[str, Markup] = field(default_factory=dict)

    def for_page(self) -> LoadClip:
        """Return what gives a page its clips; after some seconds only the newest and those that are there.

        Clips that were on no page since the one before are freed.
        """
        deadline = self.now() + OLD_CLIPS_SECONDS
        before, self.clips = self.clips, {}

        def load(name: str, prompt: str, step: int, is_newest: bool) -> Markup | str:
            if name in before:
                self.clips[name] = before[name]
            if name not in self.clips:
                if self.now() > deadline and not is_newest:
                    return "shown when the page is written next"
                try:
                    self.add(name, prompt, step, read_reduced(self.folder / name))
                except (OSError, UserError):
                    return "the file is gone, or cannot be read"
            return self.clips[name]

        return load

    def add(self, name: str, prompt: str, step: int, clip: ReducedClip) -> None:
        """Encode a clip that was read. Raises UserError if that fails."""
        text = f"{prompt}, step {step}"  # for those who cannot see it
        for side in (SIDE, SMALL_SIDE):
            self.clips[name] = embed_clip(clip.frames, clip.fps, text, side)
            if len(self.clips[name]) <= MOST_CLIP_BYTES:
                break


def choose_columns(rows: Sequence[SampleRow], best_step: int | None, most: int) -> list[SampleRow]:
    """Return at most `most` rows: the first, the last, the one nearest to the best step, and others evenly.

    Of a longer list, those chosen before stay unless they were the last or the best.
    """
    if len(rows) <= most:
        return list(rows)
    stride = 1
    while -(-len(rows) // stride) > most - 2:
        stride *= 2
    chosen = {*range(0, len(rows), stride), len(rows) - 1}
    if best_step is not None:
        chosen.add(min(range(len(rows)), key=lambda index: abs(rows[index].step - best_step)))
    return [rows[index] for index in sorted(chosen)]


def make_grid(story: Story, load: LoadClip, most_columns: int, most_prompts: int) -> dict[str, Any]:
    """Return the values of the grid for the template."""
    rows = [story.samples[key] for key in sorted(story.samples)]
    lowest = story.lowest
    best = None if lowest is None else lowest[0]
    columns = choose_columns(rows, best, most_columns)
    prompts = dict.fromkeys((index, row.prompts.get(index, "")) for row in rows for index in row.files)
    shown = sorted(prompts)[:most_prompts]
    best_column = min(columns, key=lambda row: abs(row.step - best), default=None) if best else None
    titles = []
    for row in columns:
        is_of_epoch = row.mark[1:].isdigit() and row.mark[0] == "e"
        title = f"step {row.step:,}" + (f", epoch {int(row.mark[1:])}" if is_of_epoch else "")
        titles.append({"title": title if row.step else "before training", "is_best": row is best_column})
    cells: dict[tuple[int, str, int], dict[str, Any]] = {}
    for place, row in reversed([*enumerate(columns)]):  # the newest first: they are shown in any case
        for index, prompt in shown:
            name = row.files.get(index)
            if name is not None and row.prompts.get(index, "") == prompt:
                tag = load(name, prompt, row.step, row is columns[-1])
                cells[index, prompt, place] = {"clip": tag, "href": link("sample", name)}
    return {
        "columns": titles,
        "rows": [
            {
                "prompt": prompt,
                "index": index,
                "cells": [cells.get((index, prompt, place)) for place in range(len(columns))],
            }
            for index, prompt in shown
        ],
        "times": len(rows),
        "prompts": len(prompts),
    }
