"""Which files a table means, their captions and their control media."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.config import DatasetConfig, load_dataset_config
from dataset.forms.cogvideox_lists import list_cogvideox
from dataset.listing import find_all_sources, find_sources, missing_captions, require_captions
from dataset.sources.media_source import Fault
from modules.errors import DatasetError
from modules.media.writing import write_png
from tests.data_tools.cogvideox.making import NAMES, read_table, save, write_data, write_lists
from tests.dataset.making import make_animation, make_table
from tests.tiny.project import CAPTIONS, moving_square


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_list(folder: Path, *records: dict) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "list.jsonl").write_text(text, encoding="utf-8")


IMAGES = ["a.jpg", "b.PNG", "c d é漢.webp", "e.bmp", "f.jpeg"]
VIDEOS = ["a.mp4", "b.webm", "c.avi", "d.mkv", "e.mov", "f.flv", "g.wmv", "h.m4v", "i.mpg", "j.MPEG"]


@pytest.mark.parametrize(("key", "names"), [("image_directory", IMAGES), ("video_directory", VIDEOS)])
def test_a_folder_gives_its_files_sorted_by_path(tmp_path: Path, key: str, names: list[str]) -> None:
    others = ("z.mp4",) if names is IMAGES else ("z.png",)
    touch(tmp_path, *names[::-1], *others, "notes.txt", ".hidden.png", ".hidden.mp4", "inner/g.png")

    sources = find_sources(make_table(tmp_path, key))

    assert [source.path.name for source in sources] == names
    assert [source.stem for source in sources] == [name.rpartition(".")[0] for name in names]


def test_an_animation_belongs_to_one_table_of_its_folder(tmp_path: Path) -> None:
    for name in ("a.gif", "b.webp"):
        make_animation(tmp_path / name, [100, 100])
    for name in ("c.gif", "d.webp", "e.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "f.gif").write_bytes(b"GIF89a")  # damaged
    images, clips = (
        f'[[datasets]]\n{kind}_directory = "{tmp_path.as_posix()}"\n'
        f'cache_directory = "{tmp_path.as_posix()}/cache_{kind}"\n'
        for kind in ("image", "video")
    )

    def list_names(text: str) -> list[list[str]]:
        (tmp_path / "data.toml").write_text(text, encoding="utf-8")
        tables = load_dataset_config(tmp_path / "data.toml").datasets
        return [[source.path.name for source in find_sources(table)] for table in tables]

    moving, still = ["a.gif", "b.webp", "f.gif"], ["c.gif", "d.webp", "e.png"]
    assert list_names(images + clips) == [still, moving]
    assert list_names(images) == [sorted(moving + still)]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_captions_of_windows_are_read_with_a_remark(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes("ein größerer Bär\r\n".encode(encoding))
    (tmp_path / "b.txt").write_text("ein kleiner Bär", encoding="utf-8")
    table = make_table(tmp_path, "image_directory", caption_extension=".txt")

    sources = find_all_sources(DatasetConfig(table.config_path, (table,)))

    assert [source.caption for source in sources] == ["ein größerer Bär", "ein kleiner Bär"]
    (remark,) = [one.getMessage() for one in caplog.records if "not UTF-8" in one.getMessage()]
    name = "Windows-1252 (Western European)" if encoding == "cp1252" else "UTF-16"
    assert f"{tmp_path / 'a.txt'}: read as {name}: 'ein größerer Bär'" in remark
    assert "b.txt" not in remark


@pytest.mark.parametrize(("text", "encoding"), [("девушка", "cp1251"), ("gęślą jaźń", "cp1250")])
def test_captions_of_other_places_are_not_taken_for_western_ones(
    text: str, encoding: str, tmp_path: Path
) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(DatasetError, match="not UTF-8 text"):
        find_sources(make_table(tmp_path, "image_directory", caption_extension=".txt"))


def test_captions_lie_beside_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.v2.png", "c.png")
    (tmp_path / "a.txt").write_text("\n  a cat, 猫 \n", encoding="utf-8")
    (tmp_path / "b.v2.txt").write_text("with a mark", encoding="utf-8-sig")

    sources = find_sources(make_table(tmp_path, "image_directory", caption_extension=".txt"))

    assert [source.caption for source in sources] == ["a cat, 猫", "with a mark", None]
    assert missing_captions(sources) == [f"{tmp_path / 'c.png'}: no c.txt next to it"]
    others = make_table(tmp_path, "image_directory", caption_extension=".txt", class_tokens="ohwx")
    assert [source.caption for source in find_sources(others)] == ["a cat, 猫", "with a mark", "ohwx"]
    with pytest.raises(DatasetError, match="1 of 3 captions is missing"):
        require_captions(sources)
    touch(tmp_path, "a.jpg")
    with pytest.raises(DatasetError, match="a.jpg and .*a.png"):
        find_sources(make_table(tmp_path, "image_directory"))


def test_control_images_go_by_stem_and_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    control = tmp_path / "control"
    touch(tmp_path, "a.png", "a_1.png", "a_10.png")
    touch(control, "a_2.png", "a.webp", "a_1_0002.png", "a_1_01.png", "a_10_0.png", "a_10_1.png")
    touch(control, "a.txt", "unrelated.png")
    table = make_table(tmp_path, "image_directory", control_directory=control, fp_1f_clean_indices=(0, 1))

    other = make_table(tmp_path, "image_directory", control_directory=control)
    touch(tmp_path / "more", "c.png")
    touch(control, "c.png")
    more = other.with_values(index=1, directory=tmp_path / "more")
    sources = find_all_sources(DatasetConfig(tmp_path / "data.toml", (table, more)))

    found = {one.stem: [path.name for path in one.control] for one in sources if one.table is table}
    assert found == {
        "a": ["a.webp", "a_2.png"],
        "a_1": ["a_1_01.png", "a_1_0002.png"],
        "a_10": ["a_10_0.png", "a_10_1.png"],
    }
    lone = control / "unrelated.png"
    assert f"1 control image without an image of that name, such as {lone}: not read" in caplog.text
    assert caplog.text.count("without an image of that name") == 1


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
        ('{"video_path": "a.png", "caption": ""}', "line 1: image_path is missing"),
        ('{"image_path": " "}', "line 1: image_path is missing"),
        ('{"image_path": "a.png", "control_path": ""}', "line 1: control_path is empty"),
        ('{"image_path": "a.png", "mask_path": " "}', "line 1: mask_path is empty"),
        ('{"image_path": "a.png"', "line 1: invalid JSON"),
        ('["a.png"]', "line 1: it is not an object"),
        ('{"image_path": "a.png", "caption": 3}', "line 1: caption = 3 is not text"),
        (
            '{"image_path": "a.png", "control_path": "x", "control_path_0": "y"}',
            "line 1: control_path_0 repeats the number",
        ),
        (
            '{"image_path": "a.png", "control_path_0": "x", "control_path_1": "y"}\n'
            '{"image_path": "b.png", "control_path_0": "x"}',
            "(?s)1 line of .* has no control_path_0 to control_path_1, while others have.*b.png",
        ),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")

    with pytest.raises(DatasetError, match=reason):
        find_sources(make_table(tmp_path, "image_jsonl_file", fp_1f_clean_indices=(0, 5)))


POSIX = pytest.mark.skipif(os.name == "nt", reason="links need rights there, and there are no such pipes")


@POSIX
def test_dead_links_pipes_and_folders_among_pictures_are_told(tmp_path: Path) -> None:
    for name in ("a.png", "target.txt"):
        (tmp_path / name).touch()
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "good.png").symlink_to(tmp_path / "target.txt")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    errors: list[Fault] = []

    sources = find_sources(make_table(tmp_path, "image_directory"), faults=errors)

    assert [source.path.name for source in sources] == ["a.png", "good.png"]
    told = [error.text for error in errors if not error.is_fatal]
    assert [line.partition(": ")[2] for line in told] == [
        f"the link leads to {tmp_path / 'gone.png'}, which is not there",
        "it is a folder",
        "it is a named pipe, not a regular file",
    ]


def test_folders_of_media_inside_a_folder_are_told_unless_a_table_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "more/b.png", "used/c.png", "cache/d.png", "notes/e.txt")
    table = make_table(tmp_path, "image_directory")
    other = table.with_values(directory=tmp_path / "used", index=1, cache_directory=tmp_path / "c")
    config = dataclasses.replace(load_dataset_config(tmp_path / "data.toml"), datasets=(table, other))

    find_all_sources(config, captions=False)

    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'more'}: its images are not used")


def test_files_that_nothing_reads_are_counted_once_by_their_suffixes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    (folder / "a" / "deep").mkdir(parents=True)
    touch(folder, "a.png", "a.txt", "b.tif", "c.jp2", "d.JP2", "e.HEIC", "f.mts", "g.mp4", "nobody.txt", "h")
    default = ("a.json", "a.npz", "x.safetensors", "Thumbs.db", ".DS_Store", "prompts.txt")
    touch(folder, *default)
    touch(folder / "a" / "deep", "z.tiff")
    Image.new("RGB", (8, 8)).save(folder / "b.tif")
    Image.new("RGB", (8, 8)).save(
        folder / "moving.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    )
    Image.new("RGB", (8, 8)).save(folder / "still.gif")
    path = tmp_path / "data.toml"
    table = "[[datasets]]\n{}_directory = '{}'\ncache_directory = '{}'\ncaption_extension = '.txt'\n"
    path.write_text(table.format("image", folder, tmp_path / "c1"), encoding="utf-8")

    one = load_dataset_config(path)
    names = [source.path.name for source in find_all_sources(one)]

    assert names == ["a.png", "b.tif", "moving.gif", "still.gif"]
    told = [line for line in caplog.messages if " not " in line]
    assert told == [
        f"{folder}: 7 files are not read: .jp2 (2): convert them to PNG; .heic (1): convert them to PNG, or "
        "`pip install pillow-heif`; .mts (1): convert them to .mp4; .mp4 (1): videos, for which a table with "
        "video_directory is needed; no suffix (1); .txt (1): captions of no image",
        f"{folder / 'a'}: its images are not used: folders inside a folder are not searched. Give it a table",
    ]
    # both tables together read more, and a folder of clips says that pictures stay out
    caplog.clear()
    path.write_text(path.read_text() + table.format("video", folder, tmp_path / "c2"), encoding="utf-8")
    find_all_sources(load_dataset_config(path))
    (line,) = (line for line in caplog.messages if "not read" in line)
    assert f"{folder}: 6 files are not read: .jp2 (2)" in line
    caplog.clear()
    path.write_text(table.format("video", folder, tmp_path / "c2"), encoding="utf-8")
    assert [one.path.name for one in find_all_sources(load_dataset_config(path))] == ["g.mp4", "moving.gif"]
    assert ".gif (1), .png (1), .tif (1): images, for which" in " ".join(caplog.messages)
    caplog.clear()
    touch(folder, "s.wav", "s.txt")
    path.write_text(table.format("audio", folder, tmp_path / "c3"), encoding="utf-8")
    assert [one.path.name for one in find_all_sources(load_dataset_config(path))] == ["s.wav"]
    told = " ".join(caplog.messages)
    assert ".txt (2): captions of no sound" in told
    assert ".mp4 (1): videos, for which" in told
    assert ".gif (2), .png (1), .tif (1): images, for which" in told


def test_a_tiff_gives_way_to_another_picture_and_its_pages_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, page = make_table(tmp_path, "image_directory"), Image.new("RGB", (8, 8))
    for name in ("a.png", "a.tif", "b.tiff"):
        page.save(tmp_path / name)
    page.save(tmp_path / "c.TIF", "TIFF", save_all=True, append_images=[page])
    assert [one.path.name for one in find_sources(table)] == ["a.png", "b.tiff", "c.TIF"]
    told = " ".join(caplog.messages)
    assert "a.tif, are ignored, because another file" in told
    assert "c.TIF, are of several pages: only the first of each is used" in told


def test_what_a_tool_made_of_another_file_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = moving_square(1, 16, 16, 1)[0]
    tags = {"post_1": "upscaler"}
    for name, said in {"a": {}, "a_SWIN": tags, "a_b_SWIN_": tags, "b_SWIN": tags, "a_2": {}}.items():
        write_png(tmp_path / f"{name}.png", frame, said)

    with caplog.at_level(logging.WARNING):
        sources = find_sources(make_table(tmp_path, "image_directory"))

    assert [source.stem for source in sources] == ["a", "a_2", "b_SWIN"]  # that has no source here
    assert "2 files, such as" in caplog.text


FORMS = {
    "lists": (),
    "csv": ('dataset_file = "data.csv"',),
    "jsonl": ('dataset_file = "data.jsonl"',),
    "csv by columns": ('dataset_file = "data.csv"', 'caption_column = "caption"', 'video_column = "video"'),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("cog") / "data set")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_items_of_our_own_list(form: str, data: Path, tmp_path: Path) -> None:
    own = [
        json.dumps({"video_path": str(data / "videos" / f"{name}.mp4"), "caption": caption})
        for name, caption in zip(NAMES, CAPTIONS, strict=False)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(own), encoding="utf-8")

    found = find_sources(read_table(tmp_path, data, *FORMS[form]))
    expected = find_sources(make_table(tmp_path, "video_jsonl_file"))

    assert len(found) == 3
    assert [(one.path, one.stem, one.caption, one.control, one.precomputed) for one in found] == [
        (one.path, one.stem, one.caption, one.control, one.precomputed) for one in expected
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("t.jsonl", '{{"caption": "{0}", "video_path": "{1}"}}\n'),
        ("t.jsonl", '{{"caption": "kept", "prompt": "{0}", "video_path": "no", "video": "{1}"}}\n'),
        ("t.csv", 'prompt,video\n"{0}",{1}\n'),
    ],
)
def test_a_table_may_have_the_other_usual_columns(name: str, line: str, data: Path, tmp_path: Path) -> None:
    table = tmp_path / name
    table.write_text(line.format("a red fox", "videos/00000.mp4"), encoding="utf-8")

    (found,) = find_sources(read_table(tmp_path, data, f'dataset_file = "{table.as_posix()}"'))

    assert (found.caption, found.path) == ("a red fox", data / "videos" / "00000.mp4")


def test_tensors_are_beside_the_folder_of_clips_which_may_be_absent(tmp_path: Path) -> None:
    write_lists(tmp_path, ("one", "two"), ["part/videos/a.mp4", "part/videos/b.mp4"])
    table = read_table(tmp_path, tmp_path, "load_tensors = true")
    part = tmp_path / "part"

    with pytest.raises(DatasetError, match=r"1 folder is missing, .*\n .*part.video_latents"):
        find_sources(table)
    save(torch.zeros(32, 1, 4, 4), part / "video_latents" / "a.pt")
    with pytest.raises(DatasetError, match=r"1 file is missing, .*\n .*video_latents.b\.pt"):
        find_sources(table)
    save(torch.zeros(32, 1, 4, 4), part / "video_latents" / "b.pt")
    save(torch.zeros(226, 4096), part / "prompt_embeds" / "a.pt")
    with pytest.raises(DatasetError, match=r"1 file is missing, .*\n .*prompt_embeds.b\.pt"):
        find_sources(table)
    (part / "prompt_embeds" / "a.pt").unlink()
    (part / "prompt_embeds").rmdir()

    errors: list[Fault] = []
    sources = list_cogvideox(table, errors)

    assert not errors
    assert [one.precomputed.moments for one in sources if one.precomputed] == [
        part / "video_latents" / f"{name}.pt" for name in "ab"
    ]
    assert all(one.precomputed and one.precomputed.embeds is None for one in sources)
