import json
from pathlib import Path
from typing import Any

from data_tools.cutting.clip_list import ClipList


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


A, B, C = ({"video_path": str(Path("clips", f"{name}.mp4"))} for name in "abc")


def test_captions_written_during_a_run_stay(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    write(path, A)
    clips = ClipList(path)
    clips.add(0, [B])

    write(path, A | {"caption": "by hand"})
    clips.write()
    assert read(path) == [A | {"caption": "by hand"}, B]

    write(path, A | {"caption": "by hand"}, B | {"caption": "this too"})
    clips.add(1, [C])
    clips.write()
    assert read(path) == [A | {"caption": "by hand"}, B | {"caption": "this too"}, C]


def test_lines_of_clips_that_are_cut_anew_are_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    write(path, A, B)
    clips = ClipList(path)
    clips.remove([Path(A["video_path"])])

    write(path, A, B | {"caption": "by hand"})
    clips.write()
    assert read(path) == [B | {"caption": "by hand"}]

    clips.add(0, [A | {"scene": 2}])
    clips.write()
    assert read(path) == [B | {"caption": "by hand"}, A | {"scene": 2}]
