"""What lies in a table's folder and is not used is told."""

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from dataset.config import load_dataset_config
from dataset.sources.listing import find_all_sources, find_sources
from dataset.sources.media_source import Fault
from modules.media.writing import write_png
from tests.dataset.making import make_table
from tests.tiny.project import moving_square

POSIX = pytest.mark.skipif(os.name == "nt", reason="links need rights there, and there are no such pipes")


@POSIX
def test_dead_links_pipes_and_folders_among_pictures_are_told(tmp_path: Path) -> None:
    for name in ("a.png", "target.txt"):
        (tmp_path / name).touch()
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "good.png").symlink_to(tmp_path / "target.txt")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    faults: list[Fault] = []

    sources = find_sources(make_table(tmp_path, "image_directory"), faults=faults)

    assert [source.path.name for source in sources] == ["a.png", "good.png"]
    told = [fault.text for fault in faults if not fault.ends_run]
    assert [line.partition(": ")[2] for line in told] == [
        f"the link leads to {tmp_path / 'gone.png'}, which is not there",
        "it is a folder",
        "it is a named pipe, not a regular file",
    ]


def test_folders_of_media_inside_a_folder_are_told_unless_a_table_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "more/b.png", "used/c.png", "cache/d.png", "notes/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    table = make_table(tmp_path, "image_directory")
    other = dataclasses.replace(table, directory=tmp_path / "used", index=1, cache_directory=tmp_path / "c")
    config = dataclasses.replace(load_dataset_config(tmp_path / "data.toml"), datasets=(table, other))

    find_all_sources(config, captions=False)

    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'more'}: its images are not used")


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
