import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.cutting.inputs import MARK
from data_tools.cutting.planning import PlannedClip
from data_tools.cutting.records import CutRecord, WrittenClip, read_records, write_record
from modules.errors import DatasetError

CLIP = PlannedClip(1, 0, 24, 0.0, 1.0, 0.5, 0.1, 0.01)
RECORD = CutRecord(
    *("film", "/footage/film.mp4", 1000, 1, 64, 48, {"min_seconds": 1.0}),
    clips=(WrittenClip("film_00001.mp4", CLIP, 10),),
    lists=("/clips/clips.jsonl",),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)

    assert read_records(tmp_path) == {RECORD.source: RECORD}


@pytest.mark.parametrize("name", ["../film.mp4", "/etc/passwd", "a/b.mp4", "..", "."])
@pytest.mark.parametrize("place", ["stem", "name"])
def test_a_record_that_names_files_in_other_folders_is_refused(place: str, name: str, tmp_path: Path) -> None:
    """Clips of a record are removed when a source is cut anew."""
    content = change(tmp_path, {})
    if place == "stem":
        content["stem"] = name
    else:
        content["clips"][0]["name"] = name
    change(tmp_path, content)

    with pytest.raises(DatasetError, match="names files in other folders"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"clips": 3}, {"clips": [{}]}, {"lists": None}, {"more": 1}]
)
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
