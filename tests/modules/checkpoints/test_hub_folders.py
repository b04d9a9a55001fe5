from pathlib import Path

import pytest

from modules.checkpoints.model_files import find_model_folder
from modules.errors import CheckpointError, DownloadError, UserError


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_model_folder("--model", str(tmp_path), ("*.json",)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./a", "C:\\models/a", "~nobody-here/model", "x" * 300])
def test_what_is_neither_a_folder_nor_a_repository_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="--model .*(no such|no file|of Windows)"):
        find_model_folder("--model", name, ())


def test_a_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").touch()

    with pytest.raises(CheckpointError, match="no such folder"):
        find_model_folder("--model", "owner/name", ())


def test_a_repository_is_not_fetched_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(DownloadError, match="--model nobody/no-such-model: .*HF_HUB_OFFLINE"):
        find_model_folder("--model", "nobody/no-such-model", ("*.json",))
