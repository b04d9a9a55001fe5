"""A dataset file that is read from elsewhere: the command that the message names leads to its folder."""

import shlex
from pathlib import Path

import pytest

from dataset.config import load_dataset_config
from dataset.listing import find_sources
from modules.errors import DatasetError


def test_the_command_that_leads_to_the_files_folder_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my photos ü"
    (folder / "train").mkdir(parents=True)
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = [64, 64]\n[[datasets]]\nimage_directory = 'train'\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DatasetError) as error:
        find_sources(load_dataset_config(Path("my photos ü/dataset.toml")).datasets[0])

    *_, command, _ = str(error.value).split("`")
    assert shlex.split(command) == ["cd", str(folder)]
