"""Tables, images and clips for the tests of this folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.config import DatasetConfig, DatasetTable, load_dataset_config
from dataset.forms import FORMS
from dataset.subset_options import DATASET, SUBSET_KEYS, SubsetOptions
from modules.media.writing import write_video
from modules.script_options import parse_options

GRAY_STEP = 4  # frame i of a clip made here is gray 4 * i + 4


def make_table(folder: Path, source: str = "video_directory", **changes: Any) -> DatasetTable:
    """A table over `folder` (or over `folder / list.jsonl`) with some fields changed."""
    target = folder if source.endswith("directory") else folder / "list.jsonl"
    path = folder / "data.toml"
    path.write_text(
        f"[[datasets]]\n{source} = {str(target)!r}\ncache_directory = {str(folder / 'cache')!r}\n",
        encoding="utf-8",
    )
    table = load_dataset_config(path).datasets[0]
    own = {name: changes.pop(name) for name in {*changes} & OWN_NAMES}
    if own:
        changes["format_keys"] = make_format_keys(**own)
    return table.with_values(**changes)


def make_format_keys(**keys: Any) -> Any:
    """The record of the form of data that has these keys, with a source if none is among them."""
    form = next(form for form in FORMS if form.keys and keys.keys() <= declared(form.keys))
    assert form.keys is not None
    default = {form.source: Path("source")} if form.source else {}
    return form.keys(**{**default, **keys})


def declared(record: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


OWN_NAMES = {name for form in FORMS if form.keys is not None for name in declared(form.keys)}


def subset_table(folder: Path, **keys: Any) -> DatasetTable:
    """A table of the image guides' form with a subset `pics` and these keys, each where it belongs."""
    outer = {name: value for name, value in keys.items() if SUBSET_KEYS[name].level == DATASET}
    subset = {"image_dir": str(folder / "pics")} | {
        name: value for name, value in keys.items() if name not in outer
    }
    path = folder / "subsets.json"
    content = {"datasets": [{"resolution": 64, **outer, "subsets": [subset]}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_dataset_config(path).datasets[0]


def make_image(path: Path, size: tuple[int, int] = (32, 32), colour: tuple[int, ...] = (40, 80, 120)) -> Path:
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    return path


def make_clip(path: Path, num_frames: int, size: tuple[int, int] = (32, 32)) -> Path:
    frames = (
        np.full((size[1], size[0], 3), GRAY_STEP * (index + 1), np.uint8) for index in range(num_frames)
    )
    write_video(path, frames, 24, crf=1, preset="ultrafast")
    return path


def make_frames(folder: Path, num_frames: int, size: tuple[int, int] = (32, 32)) -> Path:
    """A clip as a folder of images."""
    folder.mkdir()
    for index in range(num_frames):
        make_image(folder / f"{index:04d}.png", size, (GRAY_STEP * (index + 1),) * 3)
    return folder


def make_animation(path: Path, milliseconds: list[int]) -> Path:
    colors = [(GRAY_STEP * (index + 1),) * 3 for index in range(len(milliseconds))]
    frames = [Image.new("RGB", (32, 32), color) for color in colors]
    more = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, **more)
    return path


def frame_numbers(frames: Any) -> list[int]:
    """Which frames of a made clip these are (F H W C)."""
    return [round(float(frame.mean()) / GRAY_STEP) - 1 for frame in frames]


def given(*words: str | Path) -> SubsetOptions:
    """What a command line with these words says."""
    return parse_options("", [str(word) for word in words], SubsetOptions)[0]


def load(folder: Path, text: str, *words: str | Path) -> DatasetConfig:
    path = folder / "data.toml"
    path.write_text(text.replace("FOLDER", folder.as_posix()), encoding="utf-8")
    return load_dataset_config(path, given(*words))
