"""What is read once of a model file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modules.checkpoints.model_files import find_model_folder, read_once
from modules.checkpoints.opening import Checkpoint
from modules.errors import CheckpointError, DownloadError, UserError

READS: list[Path] = []


def names(checkpoint: Checkpoint) -> list[str]:
    READS.append(checkpoint.path)
    return list(checkpoint.tensors)


def written(path: Path, *tensors: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: torch.zeros(1) for name in tensors}, path)
    return path


def test_a_file_is_opened_once_and_again_where_it_has_changed(tmp_path: Path) -> None:
    READS.clear()
    path = written(tmp_path / "a.safetensors", "one")
    assert read_once(path, names) == read_once(path, names) == ["one"]
    assert [path] == READS
    written(path, "one", "two")
    assert read_once(path, names) == ["one", "two"]


def test_a_relative_path_means_the_file_in_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        written(tmp_path / folder / "model.safetensors", folder)
        monkeypatch.chdir(tmp_path / folder)
        assert read_once(Path("model.safetensors"), names) == [folder]


def test_a_damaged_file_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"^model\.safetensors"):
        read_once(Path("model.safetensors"), names)


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
