"""What pages remove lies in a folder until that is emptied."""

import os
import tempfile
from pathlib import Path

import pytest

from browser.core.bin_folder import FOLDER, BinEntry, BinFolder
from modules.errors import OptionError, OutputError

SHM = Path("/dev/shm")  # of memory: a different disk than that of the tests


def make(root: Path, *names: str) -> list[Path]:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
    return paths


def test_what_is_taken_keeps_its_place_below_the_root(tmp_path: Path) -> None:
    files = make(tmp_path, "clips/output/own.safetensors", "clips/output/own-state/a", "clips/cat.png")
    folder = BinFolder(tmp_path / FOLDER)

    taken = folder.move_in("own <b>", tmp_path, [files[0], files[1].parent])

    assert taken.name.endswith("_own_b_")
    assert sorted(str(path.relative_to(taken)) for path in taken.rglob("*") if path.is_file()) == [
        "clips/output/own-state/a",
        "clips/output/own.safetensors",
    ]
    assert [path.name for path in (tmp_path / "clips").rglob("*") if path.is_file()] == ["cat.png"]
    (entry,) = folder.list_entries()
    assert (entry.path, entry.size_bytes, entry.num_files) == (taken, 20, 2)


def test_nothing_is_replaced_in_the_bin(tmp_path: Path) -> None:
    folder = BinFolder(tmp_path / FOLDER)
    for _ in range(3):
        folder.move_in("own", tmp_path, make(tmp_path, "own.html"))
    assert sum(entry.num_files for entry in folder.list_entries()) == 3


def test_it_is_emptied_only_of_what_was_shown(tmp_path: Path) -> None:
    folder = BinFolder(tmp_path / FOLDER)
    folder.move_in("a", tmp_path, make(tmp_path, "a"))
    mark = folder.compute_checksum()
    folder.move_in("b", tmp_path, make(tmp_path, "b"))
    with pytest.raises(OptionError, match="changed in the meantime"):
        folder.empty(mark)
    assert folder.empty(folder.compute_checksum()) == 20
    assert folder.list_entries() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows makes no links unasked")
def test_links_are_moved_and_deleted_but_not_followed(tmp_path: Path) -> None:
    (outside,) = make(tmp_path, "outside/kept")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside.parent)
    folder = BinFolder(root / FOLDER)
    folder.move_in("x", root, [root / "link"])
    assert folder.empty(folder.compute_checksum()) == 0
    assert outside.exists()

    (root / FOLDER).rmdir()
    (root / FOLDER).symlink_to(outside.parent)
    with pytest.raises(OutputError, match="is a link"):
        folder.move_in("x", root, make(root, "own"))
    assert (root / "own").exists()
    assert folder.list_entries() == []


@pytest.mark.skipif(not SHM.is_dir(), reason="no second disk to try it on")
def test_files_of_another_disk_go_into_the_bin_that_is_there(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        other = Path(name)
        (file,) = make(other, "out/own.safetensors")
        folder = BinFolder(tmp_path / FOLDER, other / FOLDER)
        assert folder.find_folder(file) == other / FOLDER
        taken = folder.move_in("own", other, [file])
        assert (taken.parent, (taken / "out/own.safetensors").is_file()) == (other / FOLDER, True)
        assert not (tmp_path / FOLDER).exists()

        (file,) = make(other, "own.html")
        with pytest.raises(OutputError, match=r"own.html is on a different disk than .*Delete it by hand"):
            BinFolder(tmp_path / FOLDER).move_in("own", other, [file])
        assert file.is_file()
        assert not (tmp_path / FOLDER).exists()


def test_what_is_put_into_the_bin_while_it_is_emptied_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not shown to the one who agreed to delete what was."""
    bin_folder = BinFolder(tmp_path / FOLDER)
    bin_folder.move_in("old", tmp_path, make(tmp_path, "old.txt"))
    mark, listed = bin_folder.compute_checksum(), BinFolder.list_entries

    def list_then_put(self: BinFolder) -> list[BinEntry]:
        entries = listed(self)
        monkeypatch.setattr(BinFolder, "list_entries", listed)
        self.move_in("new", tmp_path, make(tmp_path, "new.txt"))
        return entries

    monkeypatch.setattr(BinFolder, "list_entries", list_then_put)
    bin_folder.empty(mark)
    (kept,) = bin_folder.list_entries()
    assert kept.path.name.endswith("_new")
