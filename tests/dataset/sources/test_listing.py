"""Which files a table means, their captions and their control media."""

import json
from pathlib import Path

import pytest

from dataset.sources.listing import find_sources, missing_captions, require_captions
from modules.errors import DatasetError
from tests.dataset.making import make_table


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_list(folder: Path, *records: dict) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "list.jsonl").write_text(text, encoding="utf-8")


def test_a_folder_gives_its_images_sorted_by_path(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.PNG",
        "a.jpg",
        "c d é漢.webp",
        "e.bmp",
        "f.jpeg",
        "notes.txt",
        "clip.mp4",
        ".hidden.png",
        "inner/g.png",
    )

    sources = find_sources(make_table(tmp_path, "image_directory"))

    assert [source.path.name for source in sources] == ["a.jpg", "b.PNG", "c d é漢.webp", "e.bmp", "f.jpeg"]
    assert sources[2].stem == "c d é漢"


def test_a_folder_gives_its_videos(tmp_path: Path) -> None:
    names = ["a.mp4", "b.webm", "c.avi", "d.mkv", "e.mov", "f.flv", "g.wmv", "h.m4v", "i.mpg", "j.MPEG"]
    touch(tmp_path, *names, "pic.png")

    assert [source.path.name for source in find_sources(make_table(tmp_path))] == names


def test_captions_lie_beside_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.v2.png", "c.png")
    (tmp_path / "a.txt").write_text("\n  a cat, 猫 \n", encoding="utf-8")
    (tmp_path / "b.v2.txt").write_text("with a mark", encoding="utf-8-sig")

    sources = find_sources(make_table(tmp_path, "image_directory", caption_extension=".txt"))

    assert [source.caption for source in sources] == ["a cat, 猫", "with a mark", None]
    assert missing_captions(sources) == [f"{tmp_path / 'c.png'}: no c.txt beside it"]
    with pytest.raises(DatasetError, match="1 of 3 captions are missing"):
        require_captions(sources)


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg", "b.png")

    with pytest.raises(DatasetError, match="a.jpg and .*a.png"):
        find_sources(make_table(tmp_path, "image_directory"))


def test_control_images_go_by_stem_and_number(tmp_path: Path) -> None:
    control = tmp_path / "control"
    touch(tmp_path, "a.png", "a_1.png", "a_10.png")
    touch(
        control,
        "a_2.png",
        "a.webp",
        "a_1_0002.png",
        "a_1_01.png",
        "a_10_0.png",
        "a_10_1.png",
        "a.txt",
        "unrelated.png",
    )
    table = make_table(tmp_path, "image_directory", control_directory=control, fp_1f_clean_indices=(0, 1))

    found = {source.stem: [path.name for path in source.control] for source in find_sources(table)}

    assert found == {
        "a": ["a.webp", "a_2.png"],
        "a_1": ["a_1_01.png", "a_1_0002.png"],
        "a_10": ["a_10_0.png", "a_10_1.png"],
    }


def test_a_control_clip_is_the_same_name_or_a_folder_or_another_type(tmp_path: Path) -> None:
    control = tmp_path / "control"
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    touch(control, "a.mp4", "a.mkv", "b/0.png", "b.mkv", "c.avi")

    found = [
        source.control[0].name for source in find_sources(make_table(tmp_path, control_directory=control))
    ]

    assert found == ["a.mp4", "b", "c.avi"]
    touch(tmp_path, "d.mp4")
    with pytest.raises(DatasetError, match="no control clip for d.mp4"):
        find_sources(make_table(tmp_path, control_directory=control))


def test_a_list_names_files_captions_and_control(tmp_path: Path) -> None:
    write_list(
        tmp_path,
        {"image_path": "/x/b.png", "caption": "zwei ü", "control_path": "/c/b.png"},
        {
            "image_path": "/x/a.png",
            "caption": "one",
            "control_path_10": "/c/a10.png",
            "control_path_2": "/c/a2.png",
            "source": "web",
        },
    )

    first, second = find_sources(make_table(tmp_path, "image_jsonl_file"))

    assert (first.path, first.caption, first.control) == (Path("/x/a.png"), "one", (Path("/c/a2.png"),))
    assert (second.stem, second.caption, second.control) == ("b", "zwei ü", (Path("/c/b.png"),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"image_path": "a.png"', "line 1: invalid JSON"),
        ('{"video_path": "a.png", "caption": ""}', "line 1: image_path is missing"),
        ('["a.png"]', "line 1: it is not an object"),
        ('{"image_path": "a.png", "caption": 3}', "line 1: caption = 3 is not a text"),
        (
            '{"image_path": "a.png", "control_path": "x", "control_path_0": "y"}',
            "line 1: control_path_0 repeats the number",
        ),
        (
            '{"image_path": "a.png", "control_path": "x"}\n{"image_path": "b.png"}',
            "1 lines of .* have no control_path, while others have",
        ),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")

    with pytest.raises(DatasetError, match=reason):
        find_sources(make_table(tmp_path, "image_jsonl_file"))


def test_every_line_needs_all_control_images_where_one_has(tmp_path: Path) -> None:
    write_list(
        tmp_path,
        {"image_path": "a.png", "control_path_0": "x", "control_path_1": "y", "control_path_2": "z"},
        {"image_path": "b.png", "control_path_0": "x"},
    )

    with pytest.raises(DatasetError, match="have no control_path_0 to control_path_1") as caught:
        find_sources(make_table(tmp_path, "image_jsonl_file", fp_1f_clean_indices=(0, 5)))

    assert "b.png" in str(caught.value)
