"""What is remembered of described folders: outside of them, for this user alone, and of no other folder."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from modules.user_files import read_user_file, user_folder, write_user_file
from project.known_folders import KnownFolder, recall_folder, remember_folder


@pytest.fixture(autouse=True)
def _own_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("user")))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path_factory.mktemp("user")))


def record_of(folder: Path) -> Path:
    remember_folder(folder, folder / "models")
    (path,) = (user_folder() / "folders").iterdir()
    return path


def test_a_folder_is_known_once_it_was_described_or_read(tmp_path: Path) -> None:
    folder = tmp_path / "clips ü"
    folder.mkdir()
    assert recall_folder(folder) is None
    remember_folder(folder)
    assert recall_folder(folder) == KnownFolder(None)
    remember_folder(folder, tmp_path / "models")
    assert recall_folder(folder / ".." / "clips ü") == KnownFolder(tmp_path / "models")
    assert list(folder.iterdir()) == []


def test_another_folder_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    remember_folder(tmp_path / "clips")
    (tmp_path / "clips").rename(tmp_path / "moved")
    assert recall_folder(tmp_path / "clips") is None
    assert recall_folder(tmp_path / "moved") is None
    (tmp_path / "clips").mkdir()
    assert recall_folder(tmp_path / "clips") is None
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    assert recall_folder(tmp_path / "copied") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{", '{"folder": "x"}', "[" * 2000])
def test_a_damaged_record_is_none(text: str, tmp_path: Path) -> None:
    path = record_of(tmp_path)
    path.write_text(text, encoding="utf-8")
    assert recall_folder(tmp_path) is None


@pytest.mark.skipif(os.name == "nt", reason="of modes of POSIX")
def test_what_others_may_write_or_link_is_not_read(tmp_path: Path) -> None:
    path = record_of(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o620)
    assert recall_folder(tmp_path) is None
    path.chmod(0o600)
    assert recall_folder(tmp_path) is not None
    path.rename(tmp_path / "record")
    path.symlink_to(tmp_path / "record")
    assert recall_folder(tmp_path) is None


def test_a_user_without_a_place_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    remember_folder(tmp_path)
    assert recall_folder(tmp_path) is None
    with pytest.raises(OSError, match="file"):
        write_user_file("x", "y")
    assert read_user_file("x") is None


def test_each_system_has_its_place() -> None:
    home = Path.home()
    assert user_folder({}, "linux") == home / ".local" / "state" / "reelsmith"
    assert user_folder({"XDG_STATE_HOME": "relative"}, "linux") == home / ".local" / "state" / "reelsmith"
    assert user_folder({}, "darwin") == home / "Library" / "Application Support" / "reelsmith"
    assert user_folder({}, "win32") == home / "AppData" / "Local" / "reelsmith"
