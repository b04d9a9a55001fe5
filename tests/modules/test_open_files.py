"""Files that another program has open, which Windows neither replaces nor removes meanwhile."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modules import atomic_write, open_files
from modules.atomic_write import remove_leftovers, write_text
from modules.errors import OutputError

IN_USE = "The process cannot access the file because it is being used by another process"


class OpenError(PermissionError):
    """What Windows answers: it has a number there that other systems have not."""

    def __init__(self, winerror: int | None) -> None:
        super().__init__(errno.EACCES, IN_USE)
        if winerror is not None:
            self.winerror = winerror


def refusing(times: int, winerror: int | None = 32) -> Callable[[Path, Path], None]:
    """An `os.replace` that fails so many times."""
    replace, left = os.replace, [None] * times

    def act(file: Path, path: Path) -> None:
        if left:
            left.pop()
            raise OpenError(winerror)
        replace(file, path)

    return act


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there, on a system that refuses to replace it while it is open."""
    monkeypatch.setattr(atomic_write, "replace_file", open_files.replace_file)
    monkeypatch.setattr(open_files, "WAIT_SECONDS", 30.0)
    (tmp_path / "a.json").write_text("old", encoding="utf-8")
    return tmp_path / "a.json"


def test_a_file_is_replaced_once_nobody_reads_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refusing(2))
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_who_keeps_it_open_is_to_close_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", refusing(999, winerror=5))
    with pytest.raises(OutputError, match=f"{IN_USE}.*Close the programs that have it open"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_other_refusals_are_told_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refusing(1, winerror=None))
    with pytest.raises(OutputError, match="make .* one that you may write in"):
        write_text(path, "new")


def test_a_leftover_that_cannot_be_removed_ends_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [path.with_name(f".{name}.01234567.tmp") for name in ("b", "c")]
    for file in left:
        file.touch()

    unlink = Path.unlink

    def refuse_first(file: Path, missing_ok: bool = False) -> None:
        if file == left[0]:
            raise OpenError(32)
        unlink(file, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_first)
    remove_leftovers(path.parent, older_seconds=-1.0)
    assert [file.exists() for file in left] == [True, False]
