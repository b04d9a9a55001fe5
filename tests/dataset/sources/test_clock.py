"""Controls and masks follow the clock of their clip, whatever files they are."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.report.check import check_caching
from dataset.batches.finding import find_items
from dataset.batches.items import NO_COMMANDS
from dataset.batches.starting import check_caches
from dataset.cache.records import latent_record, record_metadata
from dataset.cache.store import Stores
from dataset.cache_files import read_entry, write_tensors
from dataset.caching.loop import cache_media
from dataset.config import DatasetConfig, DatasetTable
from dataset.listing import find_sources
from dataset.sources.decoding import decode_source
from modules.media.writing import write_video
from tests.dataset.making import frame_numbers, make_animation, make_frames, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options

COUNT = 24  # frames, of which 32 are a second


def make_media(place: Path, kind: str, count: int = COUNT) -> Path:
    """Frames of 32 a second, each as bright as its number says. 24: at 24 a second; 16: every second one."""
    place.mkdir(exist_ok=True)
    if kind == "folder":
        return make_frames(place / "a", count)
    if kind in ("gif", "webp"):
        return make_animation(place / f"a.{kind}", [30 if kind == "gif" else 31] * count)
    path = place / ("a.mp4" if kind == "mp4" else "a.mkv")
    numbers = range(0, count, 2 if kind == "16" else 1)
    frames = (np.full((32, 32, 3), 4 * (number + 1), np.uint8) for number in numbers)
    write_video(path, frames, int(kind) if kind.isdecimal() else 32, crf=1, preset="ultrafast")
    return path


def pair_of(folder: Path, clip: str, beside: str, count: int = COUNT, **keys: Any) -> DatasetTable:
    """A table with a clip, and what is both its control and its mask."""
    other = str(make_media(folder / "beside", beside, count))
    line = {"video_path": str(make_media(folder / "clips", clip)), "caption": "a"}
    (folder / "list.jsonl").write_text(json.dumps(line | {"control_path": other, "mask_path": other}))
    return make_table(folder, "video_jsonl_file", resolution=(32, 32), target_frames=(9,), **keys)


CASES = [
    (clip, source_fps, beside)
    for clip in ("mkv", "mp4", "folder", "webp")
    for source_fps in ("auto", 32.0, None)
    for beside in ("mkv", "mp4", "16", "24", "folder", "gif", "webp")
    # nothing says that the folder is of 32 frames a second
    if (clip, beside) != ("folder", "16") or source_fps == 32.0
]


@pytest.mark.parametrize(("clip", "source_fps", "beside"), CASES)
def test_controls_and_masks_show_what_their_clip_shows(
    tmp_path: Path, clip: str, source_fps: float | str | None, beside: str
) -> None:
    table = pair_of(tmp_path, clip, beside, source_fps=source_fps)

    decoded = decode_source(find_sources(table)[0], 16.0)

    every = 2 if source_fps == 32.0 or clip == "webp" or (source_fps == "auto" and clip != "folder") else 1
    kept = frame_numbers(decoded.cut((0, 9)).frames)
    # 31 ms, not 31.25
    assert kept == pytest.approx([every * index for index in range(9)], abs=clip == "webp")
    expected = [number // 2 * 2 for number in kept] if beside == "16" else kept
    assert frame_numbers(decoded.cut((0, 9)).control[0]) == expected
    mask = decoded.cut((0, 9)).mask
    assert mask is not None
    assert frame_numbers(mask) == expected


@pytest.mark.parametrize(
    ("beside", "count", "keys", "changes", "remarks"),
    [
        ("folder", 24, {"source_fps": "auto"}, True, False),
        ("folder", 24, {"source_fps": 32.0}, False, False),
        ("16", 24, {"source_fps": 32.0}, True, False),
        ("16", 24, {"source_fps": "auto"}, False, False),
        ("mkv", 24, {"source_fps": "auto"}, False, False),
        ("mkv", 30, {"source_fps": 32.0}, False, True),
        ("24", 24, {"source_fps": "auto"}, True, False),
        ("webp", 24, {"source_fps": 32.0}, False, False),
        ("folder", 12, {"source_fps": "auto"}, False, False),  # as many as the model's rate asks for
        ("folder", 18, {"source_fps": "auto"}, False, True),
    ],
)
def test_caches_that_one_clock_changes_are_made_anew_and_other_lengths_are_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    beside: str,
    count: int,
    keys: dict[str, Any],
    changes: bool,
    remarks: bool,
) -> None:
    config = DatasetConfig(tmp_path / "data.toml", (pair_of(tmp_path, "mkv", beside, count, **keys),))
    family = ToyFamily(latent=dataclasses.replace(LATENT, frame_step=4))
    assert cache_media(family, config, options()).written == 1
    told = "control clips or masks differ from their clips in number of frames"
    assert (told in caplog.text) == remarks
    assert (told in "\n".join(check_caching(family, config, 1, False).lines)) == remarks
    assert cache_media(family, config, options()).reused == 1
    (path,) = (tmp_path / "cache").iterdir()
    entry = read_entry(path)
    record = latent_record(entry)
    assert record is not None
    older = {name: value for name, value in record.options.items() if name != "one_clock"}  # before this
    changed = record_metadata(dataclasses.replace(record, options=older))
    texts = path.with_name(f"{find_sources(config.datasets[0])[0].stem}_toy_te.safetensors")
    write_tensors(texts, {"t5_float32": torch.ones(1, 4)}, {})
    items = find_items(config, "toy", family.latent).items
    check = partial(check_caches, family, items, NO_COMMANDS, Stores(), True)
    check()
    assert "is of an earlier version" not in caplog.text
    write_tensors(path, entry.named, {**entry.metadata, **changed})
    check()
    told = "is of an earlier version, which read control clips and masks without"
    assert caplog.text.count(told) == changes

    report = cache_media(family, config, options())

    assert (report.written, report.reused) == ((1, 0) if changes else (0, 1))
