"""Captions in other encodings become UTF-8, and nothing is lost."""

from pathlib import Path

import pytest

from data_tools.report.repair import repair_captions
from dataset.config import DatasetConfig
from dataset.options import GUESS
from tests.dataset.making import make_image, make_table

GERMAN = "ein roter Käfer fährt über die Straße"


def make_config(folder: Path, captions: dict[str, bytes]) -> DatasetConfig:
    for name, content in captions.items():
        make_image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(content)
    table = make_table(folder, "image_directory", caption_extension=".txt")
    return DatasetConfig(table.config_path, (table,))


def test_captions_are_converted_and_the_old_files_kept(tmp_path: Path) -> None:
    old = {"a": GERMAN.encode("cp1252"), "b": GERMAN.encode("utf-16"), "c": GERMAN.encode()}
    lines, left = repair_captions(make_config(tmp_path, old), GUESS)

    assert left == 0
    assert lines[0].startswith("2 captions converted")
    for name in old:
        assert (tmp_path / f"{name}.txt").read_text(encoding="utf-8") == GERMAN
    assert (tmp_path / "a.txt.bak").read_bytes() == old["a"]
    assert (tmp_path / "b.txt.bak").read_bytes() == old["b"]
    assert not (tmp_path / "c.txt.bak").exists()


def test_an_unsure_guess_is_left_and_named_and_can_be_given(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"a": "naïve".encode("cp1252")})

    lines, left = repair_captions(config, GUESS)

    assert left == 1
    assert "--repair_captions cp1252" in lines[1]
    assert (tmp_path / "a.txt").read_bytes() == "naïve".encode("cp1252")
    assert repair_captions(config, "cp1252")[1] == 0
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\xd8", b"\x89PNG\r\n\x1a\n\x00\x00\xff"])
def test_what_is_no_text_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    lines, left = repair_captions(make_config(tmp_path, {"a": content}), GUESS)

    assert left == 1
    assert (tmp_path / "a.txt").read_bytes() == content


def test_an_older_backup_is_never_replaced(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"a": GERMAN.encode("cp1252")})
    (tmp_path / "a.txt.bak").write_bytes(b"older")

    lines, left = repair_captions(config, GUESS)

    assert "a.txt.bak is there already" in lines[1]
    assert (tmp_path / "a.txt").read_bytes() == GERMAN.encode("cp1252")
    assert (tmp_path / "a.txt.bak").read_bytes() == b"older"
