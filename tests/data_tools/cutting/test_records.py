"""Records of earlier cuts, and the list of clips: nothing of a user's is lost or touched."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.cutting.clips import PlannedClip
from data_tools.cutting.records import MARK, ClipList, CutRecord, WrittenClip, read_records, write_record
from modules.errors import DatasetError

CLIP = PlannedClip(1, 0, 24, 0.0, 1.0, 0.5, 0.1, 0.01)
RECORD = CutRecord(
    *("film", "/footage/film.mp4", 1000, 1, 64, 48, {"min_seconds": 1.0}),
    clips=(WrittenClip("film_00001.mp4", CLIP, 10),),
    lists=("/clips/clips.jsonl",),
)


@pytest.mark.parametrize("name", ["../film.mp4", "/etc/passwd", ".."])
@pytest.mark.parametrize("place", ["stem", "name"])
def test_a_record_that_names_files_in_other_folders_is_refused(place: str, name: str, tmp_path: Path) -> None:
    """Clips of a record are removed when a source is cut anew."""
    clip = {**change(tmp_path, {})["clips"][0], place: name}
    change(tmp_path, {"clips": [clip]} if place == "name" else {"stem": name})

    with pytest.raises(DatasetError, match="names files in other folders"):
        read_records(tmp_path)


@pytest.mark.parametrize("changes", [{"version": 2}, {"clips": [{}]}, {"more": 1}])
def test_a_damaged_record_is_an_error_that_names_it(changes: dict[str, Any], tmp_path: Path) -> None:
    change(tmp_path, changes)

    with pytest.raises(DatasetError, match=r"film\.json, which says what was cut before, cannot be read"):
        read_records(tmp_path)


def change(output: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Write RECORD with other values, and return all of them."""
    write_record(output, RECORD)
    path = output / MARK / "film.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return content


def record_of(name: str) -> CutRecord:
    return replace(RECORD, stem=name, source=name, clips=(WrittenClip(f"{name}.mp4", CLIP),), lists=())


def write_list(folder: Path, **captions: str) -> Path:
    """Write a list of clips with these captions, by name; "": none."""
    path = folder / "clips.jsonl"
    facts = [{"video_path": str(folder / f"{name}.mp4"), "caption": text} for name, text in captions.items()]
    lines = [json.dumps({key: value for key, value in one.items() if value}) for one in facts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_list(folder: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines())
    return [(Path(line["video_path"]).stem, line.get("caption", "")) for line in lines]


def test_captions_written_during_a_run_stay(tmp_path: Path) -> None:
    clips = ClipList(write_list(tmp_path, a=""), tmp_path)
    clips.add(record_of("b"), is_new=True)
    assert read_list(tmp_path) == [("a", ""), ("b", "")]

    write_list(tmp_path, b="this too")
    clips.add(record_of("b"), is_new=True)
    clips.add(record_of("c"), is_new=True)
    assert read_list(tmp_path) == [("b", "this too"), ("c", "")]


def test_lines_of_clips_that_are_cut_anew_are_not_read_again(tmp_path: Path) -> None:
    clips = ClipList(write_list(tmp_path, a="", b=""), tmp_path)

    write_list(tmp_path, a="", b="by hand")
    clips.write(removed=[tmp_path / "a.mp4"])
    assert read_list(tmp_path) == [("b", "by hand")]

    clips.add(record_of("a"), is_new=True)
    clips.write()
    assert read_list(tmp_path) == [("b", "by hand"), ("a", "")]
