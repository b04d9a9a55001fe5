"""Captions in JSONL lists: nothing else of a line changes, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.captions.lists import CaptionList, rewrite_lines, set_value


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ('{"video_path": "a.mp4"}', '{"video_path": "a.mp4", "caption": "é \\"x\\""}'),
        (
            '{ "n": 1.50e2 , "video_path":"a" }  ',
            '{ "n": 1.50e2 , "video_path":"a", "caption": "é \\"x\\"" }  ',
        ),
        ('{"caption": null, "video_path": "a"}', '{"caption": "é \\"x\\"", "video_path": "a"}'),
        (
            '{"caption":"old \\u00e9 }","l":[{"caption":1}],"b":"\\u00e9"}',
            '{"caption":"é \\"x\\"","l":[{"caption":1}],"b":"\\u00e9"}',
        ),
        ('{"caption": "a", "x": 1, "caption" : "b"}', '{"caption": "a", "x": 1, "caption" : "é \\"x\\""}'),
        ('{"a": [1, {"b": "}"}], "c": 123456789012345678901234567890}',) * 2,
    ],
)
def test_only_the_caption_of_a_line_changes(line: str, changed: str) -> None:
    if line == changed:
        changed = f'{line[:-1]}, "caption": "é \\"x\\""}}'

    assert set_value(line, "caption", 'é "x"') == changed
    assert json.loads(changed)["caption"] == 'é "x"'


def write_list(folder: Path, text: str) -> Path:
    path = folder / "list.jsonl"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_a_list_keeps_its_line_ends_its_mark_and_its_first_state(tmp_path: Path) -> None:
    text = (
        '\ufeff{"video_path": "a", "z": 1.0}\r\n{"video_path": "b", "caption": "hand"}\r\n{"video_path": "c"}'
    )
    path = write_list(tmp_path, text)

    captions = CaptionList(path, "video_path")
    captions.put("a", "new a", None)
    captions.put("c", "new c", None)
    captions.merge()

    assert path.read_bytes().decode("utf-8") == (
        '\ufeff{"video_path": "a", "z": 1.0, "caption": "new a"}\r\n'
        '{"video_path": "b", "caption": "hand"}\r\n{"video_path": "c", "caption": "new c"}'
    )
    assert (tmp_path / "list.jsonl.bak").read_bytes().decode("utf-8") == text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["list.jsonl", "list.jsonl.bak"]


def test_what_waits_after_a_kill_is_put_in_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = write_list(tmp_path, '{"video_path": "a"}\n{"video_path": "b"}\n{"video_path": "c"}\n')
    killed = CaptionList(path, "video_path", now=lambda: 0.0)
    killed._took = 1.0  # so that nothing is merged
    killed.put("a", "new a", None)
    killed.put("b", "new b", None)
    journal = tmp_path / ".list.jsonl.captions"
    journal.write_bytes(journal.read_bytes() + b'{"path": "c", "caption": "to')
    # meanwhile a person writes one
    path.write_text(path.read_text().replace('"b"}', '"b", "caption": "hand"}'))

    after = CaptionList(path, "video_path")
    after.put("c", "new c", None)
    after.merge()

    assert [json.loads(line)["caption"] for line in path.read_text().splitlines()] == [
        "new a",
        "hand",
        "new c",
    ]
    assert after.kept == ["b"]
    assert not journal.exists()


def test_each_replaced_hand_written_caption_is_in_a_backup(tmp_path: Path) -> None:
    path = write_list(tmp_path, '{"video_path": "a", "caption": "first"}\n')
    for old, new in (("first", "second"), ("second", "third")):
        captions = CaptionList(path, "video_path")
        captions.put("a", new, old, is_foreign=True)
        captions.merge()

    assert "third" in path.read_text()
    assert "first" in (tmp_path / "list.jsonl.bak").read_text()
    assert "second" in (tmp_path / "list.jsonl.2.bak").read_text()


def test_what_is_written_into_a_list_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"image_path": "a"}\n', encoding="utf-8")
    more = ['{"image_path": "a", "n": 1}\n{"image_path": "b"}\n']

    def change(_: Any) -> dict[str, Any]:
        if more:
            path.write_text(more.pop(), encoding="utf-8")
        return {"caption": "x"}

    rewrite_lines(path, change)

    lines = ['{"image_path": "a", "n": 1, "caption": "x"}\n', '{"image_path": "b", "caption": "x"}\n']
    assert path.read_text(encoding="utf-8") == "".join(lines)
