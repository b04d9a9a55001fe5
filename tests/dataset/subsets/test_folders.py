"""Datasets without a file: folders of repeats and class, and pictures that a JSON names."""

import json
from pathlib import Path

import pytest

from dataset.sources.listing import find_sources
from dataset.subsets import folders_config
from tests.dataset.making import make_image
from tests.dataset.subsets.making import given, load


def make_pictures(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(path)
    return folder


def test_folders_say_repeats_and_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = make_pictures(tmp_path / "train", "10_shs cat/a.png", "2_dog/b.png", "notes/c.png", "0_off/d.png")
    reg = make_pictures(tmp_path / "reg", "1_cat/r.png")
    (train / "2_dog" / "b.txt").write_text("a dog", encoding="utf-8")
    words = ("--train_data_dir", train, "--reg_data_dir", reg, "--resolution", "512,768")

    config = folders_config(given(*words, "--caption_extension", ".txt", "--train_batch_size", "3"))

    found = [(table.num_repeats, table.class_tokens, table.is_reg, table.group) for table in config.datasets]
    assert found == [(10, "shs cat", False, 0), (2, "dog", False, 0), (1, "cat", True, 0)]
    assert {(table.resolution, table.batch_size) for table in config.datasets} == {((512, 768), 3)}
    assert [find_sources(table)[0].caption for table in config.datasets] == ["shs cat", "a dog", "cat"]
    assert sorted(record.args[1].name for record in caplog.records) == ["0_off", "notes"]


def test_a_json_names_pictures_and_their_captions(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pics", "a.png", "b.jpg", "sub/a.png", "c.webp")
    elsewhere = make_pictures(tmp_path / "other", "d.png") / "d.png"
    entries = {
        "a": {"caption": "one", "tags": "x, y", "train_resolution": [64, 64]},
        "b.jpg": {"tags": "tag"},
        "sub/a": {"caption": "first\nsecond"},
        str(elsewhere): {"caption": "far"},
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    words = ("--train_data_dir", pictures, "--in_json", path, "--dataset_repeats", "4", "--resolution", "64")

    (table,) = folders_config(given(*words)).datasets
    sources = find_sources(table)

    assert {source.path: source.caption for source in sources} == {
        pictures / "a.png": "one, x, y",
        pictures / "b.jpg": "tag",
        pictures / "sub" / "a.png": "first",
        elsewhere: "far",
    }
    assert len({source.stem for source in sources}) == 4
    assert table.num_repeats == 4
    assert table.cache_directory == pictures / "64x64"


def test_tags_end_every_line_of_a_caption_with_wildcards(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pics", "a.png")
    (tmp_path / "m.json").write_text('{"a": {"caption": "one\\ntwo", "tags": "x\\ny"}}', encoding="utf-8")
    text = (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'FOLDER/pics'\n"
        "metadata_file = 'FOLDER/m.json'\nenable_wildcard = true"
    )

    (source,) = find_sources(load(tmp_path, text).datasets[0])

    assert source.caption == "one, x,y\ntwo, x,y"
