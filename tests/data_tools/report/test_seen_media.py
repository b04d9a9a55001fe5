"""The report calls text caches valid whose encoders saw media, until these or their table change."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_tools.report.files import STALE, UNKNOWN, VALID, State
from modules.media.writing import write_video
from tests.data_tools.report.making import report
from tests.faults.messages import succeed_here
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.further_families import FURTHER
from tests.tiny.project import moving_square, write_image

H3 = ("--frame_step", "17", "--pixel_step", "32", "--fps", "24")


def text_states(folder: Path, *options: str) -> dict[str, State]:
    """The states of text caches of the only model, by stem."""
    found: dict[str, State] = {}
    for file in report(folder / "dataset.toml", "--files", "--no_decode", *options)["files"]:
        (states,) = file["caches"].values()
        state, reason = states["text"]
        found[file["stem"]] = (state, reason)
    return found


def change_table(folder: Path, before: str, after: str) -> None:
    path = folder / "dataset.toml"
    text = path.read_text(encoding="utf-8")
    assert re.search(before, text)
    path.write_text(re.sub(before, after, text), encoding="utf-8")


@pytest.fixture
def h3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyFamily:
    """Clips and a tiny MiniMax-H3 in the current folder, where the paths of its dataset file start."""
    monkeypatch.chdir(tmp_path)
    family = next(family for family in FURTHER if family.name == "minimax_h3")
    family.prepare(tmp_path)
    return family


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "step", "resized"),
    [
        ("fibo_2 edit", 16, (STALE, "bucket was [48, 48], is now [64, 64]")),
        ("qwen_image_21 edit", 32, (STALE, "bucket was [32, 32], is now [64, 64]")),
        ("qwen_image edit-2511", 16, (VALID, "")),  # its text encoder sees references at a size of their own
    ],
)
def test_texts_that_saw_reference_images_are_valid_until_these_change(
    tmp_path: Path, name: str, step: int, resized: State
) -> None:
    family = family_called(name)
    family.prepare(tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    options = ("--pixel_step", str(step))

    states = text_states(tmp_path, *options)

    assert set(states.values()) == {(VALID, "")}
    assert text_states(tmp_path, *options, "--references", "2") == states
    first, second, third, last = states
    reference = next((tmp_path / "control").glob(f"{first}*.png"))
    write_image(reference, 48, 32)
    (tmp_path / "clips" / f"{second}.txt").write_text("another caption", encoding="utf-8")
    for path in (tmp_path / "control").glob(f"{third}*.png"):
        path.unlink()
    states = text_states(tmp_path, *options, "--references", "2")
    assert states.pop(first) == (STALE, f"{reference} has changed since")
    changed, reason = states.pop(second)
    assert changed == STALE
    assert reason.startswith("caption was")
    changed, reason = states.pop(third)
    assert changed == STALE
    assert reason.endswith("reference images, but now there are 0")
    assert states == {last: (VALID, "")}
    change_table(tmp_path, "resolution = .*", "resolution = [64, 64]")
    assert text_states(tmp_path, *options, "--references", "2")[last] == resized


def test_texts_that_saw_their_clip_are_valid_until_it_or_its_resolution_changes(
    tmp_path: Path, h3: TinyFamily
) -> None:
    succeed_here(*h3.cache_texts, folder=tmp_path)

    states = text_states(tmp_path, *H3)

    assert len(states) == 4
    assert set(states.values()) == {(VALID, "")}
    clip = Path("clips") / "clip 0.mkv"
    write_video(clip, moving_square(24, 32, 32, seed=9), 24)
    states = text_states(tmp_path, *H3)
    assert states.pop("clip 0") == (STALE, f"{clip} has changed since")
    assert set(states.values()) == {(VALID, "")}
    change_table(tmp_path, r"\[32, 32\]", "[64, 64]")
    for state, reason in text_states(tmp_path, *H3).values():
        assert state == STALE
        assert re.match(r"clip was .*'resolution': \[32, 32\].* is now .*'resolution': \[64, 64\]", reason)


def test_texts_that_saw_media_of_their_row_are_valid_until_these_change(
    tmp_path: Path, h3: TinyFamily
) -> None:
    style = Path("style.png")
    write_image(style, 96, 64)
    image = {"type": "image", "path": "style.png"}
    clip = {"type": "video", "path": "clips/clip 2.mkv", "audio_path": None}
    rows: list[dict[str, Any]] = [
        {"video_path": f"clips/clip {number}.mkv", "caption": "a square", "references": [reference]}
        for number, reference in enumerate((image, clip))
    ]
    write_rows(tmp_path, rows)
    change_table(tmp_path, 'video_directory = "clips"', 'video_jsonl_file = "rows.jsonl"')
    change_table(tmp_path, "caption_extension.*\n", "")
    edges = ("--reference_image_short_edge", "64", "--reference_video_short_edge", "64")
    succeed_here(*h3.cache_texts[:-2], "--task", "ref2va", *edges, folder=tmp_path)

    states = text_states(tmp_path, *H3)

    assert set(states.values()) == {(VALID, "")}
    write_image(style, 64, 96)
    assert text_states(tmp_path, *H3) == states | {"clip 0": (STALE, f"{style} has changed since")}
    del clip["audio_path"]
    write_rows(tmp_path, rows)
    expected = (STALE, "media was [['video', True]], is now [['video', False]]")
    assert text_states(tmp_path, *H3)["clip 1"] == expected
    del clip["path"]
    write_rows(tmp_path, rows)
    assert text_states(tmp_path, *H3)["clip 1"] == (UNKNOWN, "its references cannot be listed")
