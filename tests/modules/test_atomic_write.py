"""Files and folders that are complete or not there, and the names they are written under."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.atomic_write import (
    atomic_folder,
    atomic_path,
    claim_name,
    make_folder,
    recover_folder,
    remove_leftovers,
    write_bytes,
    write_text,
)
from modules.checkpoints.writing import save_tensors
from modules.errors import OptionError, OutputError
from modules.option_values import read_literals
from modules.output_files import check_output_file, check_output_name, refuse_replacing


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a b" / "ä.txt", "text")

    assert (tmp_path / "a b" / "ä.txt").read_text(encoding="utf-8") == "text"
    assert _names(tmp_path / "a b") == ["ä.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()

    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["a.bin"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    # the young one may still be written
    old, young = tmp_path / ".a.bin.1234abcd.tmp", tmp_path / ".b.bin.1234abcd.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))

    write_bytes(tmp_path / "a.bin", b"new")

    assert _names(tmp_path) == [young.name, "a.bin"]


def test_tensors_come_back_and_others_may_read_them(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.arange(6).view(2, 3).T}, {"key": "value"})

    assert torch.equal(load_file(path)["x"], torch.arange(6).view(2, 3).T)
    if os.name != "nt":
        (tmp_path / "plain").touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_that_does_not_fit_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="MB free"), atomic_path(tmp_path / "big", size_bytes=1 << 60):
        pass

    assert _names(tmp_path) == []


@pytest.mark.skipif(
    os.name == "nt" or not Path("/dev/full").exists(), reason="needs a device that is always full"
)
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"x" * 100_000)

    with pytest.raises(OutputError, match="disk is full"):
        fill()

    assert _names(tmp_path) == []


def test_a_name_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "video"
    with claim_name(path) as first, claim_name(path) as second, claim_name(tmp_path / "other") as other:
        assert (first, second, other) == (True, False, True)
        assert not path.exists()
    with claim_name(path) as again:
        assert again
        (claim,) = tmp_path.iterdir()
        with atomic_folder(path):  # sweeps what it finds of its own name
            pass
        path.rmdir()
        assert claim.exists()
        os.utime(claim, (0, 0))
        remove_leftovers(tmp_path)  # of a killed run
        assert not claim.exists()
    with (
        pytest.raises(OutputError, match="video cannot be written"),
        claim_name(tmp_path / "no folder" / "video"),
    ):
        pass


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "state") as temporary:
            (temporary / "a").write_text(content)
            assert (tmp_path / "state").exists() == (content == "second")

    assert (tmp_path / "state" / "a").read_text() == "second"
    assert _names(tmp_path) == ["state"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "state") as temporary:
        (temporary / "a").write_text("first")

    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "state"):
        raise RuntimeError

    assert (tmp_path / "state" / "a").read_text() == "first"
    assert _names(tmp_path) == ["state"]


def test_a_kill_between_the_renames_of_a_folder_is_undone(tmp_path: Path) -> None:
    (tmp_path / ".state.old").mkdir()
    (tmp_path / ".state.1234abcd.tmp").mkdir()

    recover_folder(tmp_path / "state")

    assert _names(tmp_path) == ["state"]


def test_what_another_run_is_building_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".other-state.1234abcd.tmp").mkdir()
    (tmp_path / ".state.safetensors.1234abcd.tmp").touch()

    write_bytes(tmp_path / "a.bin", b"new")
    recover_folder(tmp_path / "state")

    assert _names(tmp_path) == [".other-state.1234abcd.tmp", ".state.safetensors.1234abcd.tmp", "a.bin"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_folder_in_which_nothing_can_be_written_is_found_out_before_the_work() -> None:
    with pytest.raises(
        OutputError, match="--save_path /proc/self: nothing can be written there: .*Choose another folder"
    ):
        make_folder(Path("/proc/self"), "--save_path")


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", " . ", "...", "a/b", "/", "../x", "a\\b", "x" * 161, "\u00fc" * 81),
        *("a\nb", "a\tb", "\x1b[31mx", "x\u202ey", "x.safetensors", "x.Safetensors"),
    ],
)
def test_a_name_that_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"^--output_name '.*': .*\. Give a name") as refused:
        check_output_name("--output_name", name)

    assert len(str(refused.value)) < 250
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["x", "it's \u00fc", ".hidden", "a.b", "v1.0", "con", "x" * 160, "\u732b"])
def test_other_names_are_taken(name: str) -> None:
    check_output_name("--output_name", name, is_windows=False)


@pytest.mark.parametrize("name", ["con", "NUL", "aux.old", "com1", "a:b", "what?", "a*"])
def test_what_windows_reserves_is_refused_there(name: str) -> None:
    with pytest.raises(OptionError, match="Windows takes no file of that name"):
        check_output_name("--output_name", name, is_windows=True)


@pytest.mark.parametrize("sign", ["x", "(", "-", "[", "9", "1+", "{1:"])
def test_an_argument_of_any_length_is_text_or_one_short_message(sign: str) -> None:
    with pytest.raises(OptionError, match="10,000 characters are the most") as refused:
        read_literals("--optimizer_args", ["a=" + sign * 100_000])
    assert len(str(refused.value)) < 250

    assert read_literals("--optimizer_args", ["a=" + (sign * 9_000)[:9_000]]).keys() == {"a"}


def test_a_file_is_not_replaced_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.safetensors"
    check_output_file("--output", file)
    assert not caplog.text
    file.touch()

    check_output_file("--output", file)

    assert f"--output {file} is there already: it will be replaced" in caplog.text


@pytest.mark.parametrize("kind", ["its name", "a relative path", "a link", "a hard link", "a linked folder"])
def test_a_file_that_is_read_is_not_replaced_by_any_way_to_it(kind: str, tmp_path: Path) -> None:
    original, other = tmp_path / "folder" / "x.safetensors", tmp_path / "other"
    original.parent.mkdir()
    original.touch()
    if kind == "a link":
        other.symlink_to(original)
    elif kind == "a hard link":
        os.link(original, other)
    elif kind == "a linked folder":
        other.symlink_to(original.parent, target_is_directory=True)
        other = other / original.name
    else:
        other = original if kind == "its name" else original.parent / ".." / "folder" / original.name

    with pytest.raises(OptionError, match="would be lost. Give a new name"):
        refuse_replacing("--output", other, [original])
