"""Find the samples of a run by their names and read them reduced; draw sheets, tell trackers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modules.control_codes import escape_control_codes
from modules.media.reading import Frame, read_image, video_frames, video_info
from modules.pages.page import reduce_frame

FOLDER = "sample"  # of samples, in the output folder
SIDE = 256  # pixels of the longer side
MOST_FRAMES = 96  # of a clip; longer ones keep every second frame, or fewer, at the same speed
SOUND_RATE = 8000  # at which a sound is read to be drawn
LIGHT, DARK = np.array([250, 250, 250]), np.array([24, 24, 27])
STRIP_GAP = 4  # pixels between the frames of a strip
GAP = 8  # pixels of a sheet
TITLE_SIZE, TEXT_SIZE = 18, 14
MOST_ROWS = 40  # a picture of more would be too tall to look at
LEAST_WIDTH = 480  # so that a prompt can be read


@dataclass(frozen=True)
class ReducedClip:
    """Hold the frames of a sample, small and few."""

    frames: list[Frame]  # each H W 3
    fps: float


def find_samples(folder: Path, name: str, mark: str) -> dict[int, Path]:
    """Return the files of the samples with this mark by the number of their prompt, the newest of each."""
    pattern = re.compile(rf"{re.escape(name)}_{mark}_(\d{{2,9}})_(\d{{14}})(_\d+)?(_000)?\.(png|mp4|wav)")
    newest: dict[int, tuple[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None:
            index, made = int(match[1]), match[2]
            newest[index] = max(newest.get(index, ("", path)), (made, path))
    return {index: path for index, (_, path) in sorted(newest.items())}


def read_reduced(path: Path) -> ReducedClip:
    """Read a sample. Raises MediaError if it cannot be read."""
    if path.suffix == ".png":
        return ReducedClip([reduce_frame(read_image(path), SIDE)], 1.0)
    if path.suffix == ".wav":
        return ReducedClip([_draw_sound(path)], 1.0)
    frames: list[Frame] = []
    stride = 1
    for index, frame in enumerate(video_frames(path)):
        if index % stride:
            continue
        frames.append(reduce_frame(frame, SIDE))
        if len(frames) > MOST_FRAMES:
            frames, stride = frames[::2], 2 * stride
    return ReducedClip(frames, (video_info(path).fps or 16.0) / stride)


def _draw_sound(path: Path) -> Frame:
    """Return a picture of a WAV file's sound: over time, how far it swings."""
    from modules.media.samples import read_track, track_facts  # of runs with sound alone

    facts = track_facts(path)
    seconds = Fraction(1) if facts is None or facts.end is None else facts.end
    sound = read_track(path, Fraction(0), max(SIDE, int(seconds * SOUND_RATE)), SOUND_RATE, 2)
    swing = (
        np.zeros(SIDE) if sound is None else [abs(part).max() for part in np.array_split(sound, SIDE, axis=1)]
    )
    places = abs(np.linspace(-1, 1, SIDE // 4))[:, None]
    return np.where((places <= np.maximum(swing, 0.02))[..., None], LIGHT, DARK).astype(np.uint8)


def join_strip(clip: ReducedClip) -> Frame:
    """Return the first, the middle and the last frame side by side (H W 3), or the only one."""
    last = len(clip.frames) - 1
    frames = [clip.frames[index] for index in dict.fromkeys((0, last // 2, last))]
    gap = np.full((frames[0].shape[0], STRIP_GAP, 3), 24, np.uint8)
    joined = [frames[0]]
    for frame in frames[1:]:
        joined += [gap, frame]
    return np.concatenate(joined, axis=1)


def write_sheet(path: Path, title: str, strips: Mapping[int, Frame], prompts: Mapping[int, str]) -> None:
    """Write the sheet of these samples as PNG: strips from `join_strip`, each below its prompt.

    Raises OutputError if that fails.
    """
    rows = [(prompts.get(index, ""), strips[index]) for index in sorted(strips)[:MOST_ROWS]]
    if not rows:
        return
    width = max(LEAST_WIDTH, *(strip.shape[1] for _, strip in rows)) + 2 * GAP
    text_height = TEXT_SIZE + GAP
    height = TITLE_SIZE + 3 * GAP + sum(text_height + strip.shape[0] + 2 * GAP for _, strip in rows)
    sheet = Image.new("RGB", (width, height), (24, 24, 27))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), _fit(title, width, TITLE_SIZE), font=_font(TITLE_SIZE), fill=(250, 250, 250))
    y = TITLE_SIZE + 3 * GAP
    for prompt, strip in rows:
        draw.text((GAP, y), _fit(prompt, width, TEXT_SIZE), font=_font(TEXT_SIZE), fill=(210, 210, 215))
        sheet.paste(Image.fromarray(strip), (GAP, y + text_height))
        y += text_height + strip.shape[0] + 2 * GAP
    from modules.media.writing import write_png

    write_png(path, np.asarray(sheet))


def _fit(text: str, width: int, size: int) -> str:
    """Return as much of a text, on one line, as the sheet is wide."""
    text = escape_control_codes(" ".join(text[:1000].split()))
    font = _font(size)
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(text + "\u2026") > width - 2 * GAP:
        text = text[: -max(1, len(text) // 20)]
    return text + "\u2026"


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # slow to import

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def log_samples(
    trackers: Sequence[Any],
    step: int,
    files: Mapping[int, Path],
    strips: Mapping[int, Frame],
    prompts: Mapping[int, str],
) -> None:
    """Send the samples of a step to TensorBoard and wandb.

    strips: from `join_strip`. TensorBoard gets these: clips that play would need another package, and a
    megabyte each. wandb gets the files themselves, with their prompts.
    """

    for tracker in trackers:
        if tracker.name == "tensorboard":
            for index, strip in strips.items():
                tracker.writer.add_image(f"samples/{index:02d}", strip, step, dataformats="HWC")
            tracker.writer.flush()
        elif tracker.name == "wandb":
            import wandb  # optional; `check_trackers` has found it

            media: dict[str, Any] = {}
            for index, path in files.items():
                if path.suffix == ".png":
                    shown = wandb.Image(str(path), caption=prompts[index])
                elif path.suffix == ".wav":
                    shown = wandb.Audio(str(path), caption=prompts[index])
                else:
                    shown = wandb.Video(str(path), caption=prompts[index], format="mp4")
                media[f"samples/{index:02d}"] = shown
            if media:
                tracker.log(media, step=step)
