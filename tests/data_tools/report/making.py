"""Datasets for the report, and the report as a user runs it."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from modules.media.writing import write_video
from tests.pictures import picture
from tools import dataset_report

GENERAL = (
    '[general]\nresolution = [64, 48]\ncaption_extension = ".txt"\nenable_bucket = true\nbatch_size = 2\n'
)


def save_image(
    path: Path, seed: int, size: tuple[int, int] = (96, 72), caption: str | None = "a cat"
) -> Path:
    Image.fromarray(picture(seed, size)).save(path, quality=95)
    return write_caption(path, caption)


def save_clip(
    path: Path, seed: int, frames: int, size: tuple[int, int] = (96, 72), caption: str | None = "a dog"
) -> Path:
    """A clip in which the picture slides, 2 pixels a frame."""
    wide = picture(seed, (size[0] + 2 * frames, size[1]))
    slides = (np.ascontiguousarray(wide[:, 2 * i : 2 * i + size[0]]) for i in range(frames))
    write_video(path, slides, 16, crf=10, preset="ultrafast")
    return write_caption(path, caption)


def save_still_clip(path: Path, colour: int | Any, frames: int, caption: str | None = "a dog") -> Path:
    """A clip that shows a gray, or a picture, all the time."""
    frame = np.full((72, 96, 3), colour, np.uint8)
    write_video(path, (frame for _ in range(frames)), 16, crf=10, preset="ultrafast")
    return write_caption(path, caption)


def save_copy(source: Path, target: Path, size: tuple[int, int], caption: str | None = "a copy") -> Path:
    """A picture again, of another size and compression."""
    frame = np.asarray(Image.open(source).convert("RGB"))
    Image.fromarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA)).save(target, quality=60)
    return write_caption(target, caption)


def write_caption(path: Path, caption: str | None) -> Path:
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_config(folder: Path, *tables: str, general: str = GENERAL) -> Path:
    """tables: the lines of each, but for its cache_directory; {folder} stands for `folder`."""
    parts = [
        f"[[datasets]]\ncache_directory = '{folder / f'cache {number}'}'\n{table}\n"
        for number, table in enumerate(tables)
    ]
    path = folder / "data.toml"
    path.write_text(general + "".join(parts).replace("{folder}", str(folder)), encoding="utf-8")
    return path


def report(config: Path, *options: str) -> dict[str, Any]:
    """The JSON that the script writes."""
    target = config.parent / "report.json"
    dataset_report.main(["--dataset_config", str(config), "--json", str(target), *options])
    return json.loads(target.read_text(encoding="utf-8"))


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]
