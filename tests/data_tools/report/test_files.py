"""What --files tells of each file: its crop, its caption, and whether its caches are still valid."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.report.files import MISSING, STALE, UNKNOWN, VALID
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import load_dataset_config
from modules.errors import DatasetError, OptionError
from tests.data_tools.report.making import report, save_clip, save_image, write_config
from tests.dataset.toy_family import ToyFamily, options

TABLES = (
    "image_directory = '{folder}/set'",
    "video_directory = '{folder}/set'\ntarget_frames = [5]\nmulti_caption = true",
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two pictures and a clip, cached."""
    folder = tmp_path / "set"
    folder.mkdir()
    save_image(folder / "a.png", 1, (100, 40), caption=" a cat\n")
    save_image(folder / "b.png", 2)
    save_clip(folder / "c.mp4", 3, 9, caption="a dog\nan animal")
    return write_config(tmp_path, *TABLES)


def cache(path: Path, sections: int = 0) -> None:
    config = load_dataset_config(path)
    cache_media(ToyFamily(sections=sections), config, options())
    cache_texts(ToyFamily(), config, options())


def list_states(config: Path) -> dict[str, list[str]]:
    """The states of media and text by stem; each has a reason if it is stale."""
    found = {}
    for file in report(config, "--files", "--no_decode")["files"]:
        states = file["caches"].get(ToyFamily().cache_tag, {})
        assert all(why for state, why in states.values() if state == STALE)
        found[file["stem"]] = [state for state, _ in states.values()]
    return found


def test_a_file_tells_its_crop_its_caption_and_its_lengths(config: Path) -> None:
    a, _, c = report(config, "--files")["files"]

    assert [Path(part["path"]).name for part in a["parts"]] == ["a.png"]
    assert a["fit"] == {"resized": [96, 38], "crop": [0, 3], "bucket": [96, 32]}
    assert (a["size"], a["text"], a["captions"]) == ([100, 40], "a cat", [])
    assert (c["captions"], c["lengths"], c["kind"]) == (["a dog", "an animal"], [[5, 1]], "video")
    assert Path(c["caption_file"]).name == "c.txt"


@pytest.mark.parametrize(
    ("change", "stem", "expected"),
    [
        (lambda folder: (folder / "set/c.txt").write_text("a dog\na pet"), "c", [VALID, STALE]),
        (lambda folder: save_image(folder / "set/b.png", 9, caption=None), "b", [STALE, VALID]),
        (lambda folder: [one.unlink() for one in folder.glob("cache 0/b_*")], "b", [MISSING, MISSING]),
        (lambda folder: (folder / "set/b.png").write_bytes(b"x"), "b", [UNKNOWN, VALID]),
    ],
)
def test_what_no_longer_fits_its_caches_is_told(
    config: Path, change: Callable[[Path], Any], stem: str, expected: list[str]
) -> None:
    assert list_states(config)[stem] == []
    cache(config)
    change(config.parent)

    states = list_states(config)

    assert states.pop(stem) == expected
    assert all(state == [VALID, VALID] for state in states.values())


def test_other_settings_make_caches_outdated(config: Path) -> None:
    cache(config)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("[64, 48]", "[32, 32]\ntrigger_word = 'ohwx'"), encoding="utf-8")

    assert list_states(config) == dict.fromkeys("abc", [STALE, STALE])


def test_sections_of_a_clip_belong_together(config: Path) -> None:
    cache(config, sections=3)
    assert list_states(config)["c"] == [VALID, VALID]
    next(config.parent.glob("cache 1/c_*-0001_*")).unlink()
    assert list_states(config)["c"] == [STALE, VALID]


def test_a_file_in_a_tar_tells_where_it_begins(config: Path) -> None:
    folder = config.parent
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(folder / "set" / name, name)

    [file] = report(write_config(folder, "image_tars = '{folder}/x.tar'"), "--files")["files"]

    [part] = file["parts"]
    with Path(part["in"]).open("rb") as tar:
        tar.seek(part["offset"])
        assert tar.read(part["bytes"]) == (folder / "set/a.png").read_bytes()
    assert (file["caption_file"], file["caption_list"]) == (None, str(folder / "x.tar"))
    assert file["captions"] == ["a cat"]


def test_nothing_is_downloaded_if_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"image_path": "http://127.0.0.1:9/a.png", "caption": "a"}\n')
    table = "image_jsonl_file = '{folder}/list.jsonl'\nallow_urls = true"
    [file] = report(write_config(tmp_path, table), "--files", "--no_download")["files"]
    assert "not downloaded yet" in file["dropped"]
    tars = write_config(tmp_path, "image_tars = 'http://127.0.0.1:9/a.tar'\nallow_urls = true")
    with pytest.raises(DatasetError, match="omit --no_download"):
        report(tars, "--files", "--no_download")


def test_files_without_json_are_refused(config: Path) -> None:
    from tools import dataset_report

    with pytest.raises(OptionError, match="pass --json too"):
        dataset_report.main(["--dataset_config", str(config), "--output", "x.html", "--files"])
