"""Captions in a JSONL list: all else stays, also what somebody writes meanwhile."""

import json
from pathlib import Path

import pytest

from data_tools.captions import places
from data_tools.captions.places import CaptionList
from modules.errors import OutputError
from tests.dataset.making import make_table


def open_list(folder: Path, text: str) -> CaptionList:
    path = folder / "list.jsonl"
    path.write_bytes(text.encode("utf-8"))
    return CaptionList(make_table(folder, "video_jsonl_file"))


def put(
    captions: CaptionList, entry: str, text: str, old: str | None = None, is_foreign: bool = False
) -> bool:
    return captions.write({entry: ({"caption": old}, {"caption": text})}, is_foreign) > 0


def texts_in(path: Path) -> list[str]:
    return [json.loads(line).get("caption") for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        '{"video_path": "a", "n": [1.0, {"b": "}"}], "c": 123456789012345678901234567890}',
        '{ "caption" : null , "video_path": "a", "half": "\\ud800" }',
        '{"caption": "first", "video_path": "a", "caption": null}',
    ],
)
def test_a_changed_line_keeps_its_other_values(line: str, tmp_path: Path) -> None:
    captions = open_list(tmp_path, line)

    assert put(captions, "a", 'é "x"', None, False)

    assert json.loads(captions.path.read_text(encoding="utf-8")) == {**json.loads(line), "caption": 'é "x"'}


def test_a_list_keeps_its_other_lines_its_ends_its_mark_and_its_first_state(tmp_path: Path) -> None:
    text = '\ufeff{"video_path": "a", "z": 1.0}\r\n{"video_path":"b","caption":"hand"}\r\n{"video_path": "c"}'
    captions = open_list(tmp_path, text)

    put(captions, "a", "new a", None, False)
    put(captions, "c", "new c", None, False)

    assert captions.path.read_bytes().decode("utf-8") == (
        '\ufeff{"video_path": "a", "z": 1.0, "caption": "new a"}\r\n'
        '{"video_path":"b","caption":"hand"}\r\n{"video_path": "c", "caption": "new c"}'
    )
    assert (tmp_path / "list.jsonl.bak").read_bytes().decode("utf-8") == text
    assert sorted(one.name for one in tmp_path.glob("*list*")) == ["list.jsonl", "list.jsonl.bak"]


def test_what_is_written_into_a_list_meanwhile_stays(tmp_path: Path) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n{"video_path": "b"}\n')
    more = '{"video_path": "new"}\n{"video_path": "b", "n": 1}\n{"video_path": "a", "caption": "hand"}\n{"vid'
    captions.path.write_text(more, encoding="utf-8")

    assert put(captions, "b", "x", None, False)
    assert not put(captions, "a", "x", None, False)

    assert captions.path.read_text(encoding="utf-8") == more.replace('"n": 1', '"n": 1, "caption": "x"')


def test_what_is_saved_while_a_caption_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n{"video_path": "b"}\n')
    copy, saved = places.shutil.copymode, []

    def save_then_copy(path: Path, temporary: Path) -> None:
        if not saved:
            saved.append(path.write_text('{"video_path": "a"}\n{"video_path": "b", "caption": "hand"}\n'))
        copy(path, temporary)

    monkeypatch.setattr(places.shutil, "copymode", save_then_copy)

    assert put(captions, "a", "x", None, False)
    assert texts_in(captions.path) == ["x", "hand"]


def test_a_list_that_is_gone_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n')
    captions.path.unlink()
    monkeypatch.setattr(places, "PAUSE", 0)

    with pytest.raises(OutputError, match="the list is gone"):
        put(captions, "a", "x", None, False)


def test_captions_that_a_killed_earlier_version_left_are_put_in(tmp_path: Path) -> None:
    captions = open_list(tmp_path, '{"video_path": "a"}\n{"video_path": "b", "caption": "hand"}\n')
    waiting = tmp_path / ".list.jsonl.captions"
    waiting.write_bytes(
        b'\n{"path": "a", "old": null, "caption": "made"}\n'
        b'{"path": "b", "old": null, "caption": "no"}\n{"p\xc3'
    )

    captions.take_waiting(waiting)

    assert texts_in(captions.path) == ["made", "hand"]
    assert not waiting.exists()
