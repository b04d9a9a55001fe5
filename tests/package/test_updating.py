"""Updates of a checkout change its files only, are refused whole, and can be undone."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from modules.errors import UserError
from modules.installation import DISTRIBUTION
from package import updating
from package.updating import go_back, note_version, repair, update
from tests.commands import ROOT
from tests.folding_disk import FoldingDisk

PROJECT = f'[project]\nname = "{DISTRIBUTION}"\n'
OLD = {
    "pyproject.toml": PROJECT,
    "set_up.py": "old",
    "wan/__init__.py": "",
    "wan/gone.py": "old",
    "a.md": "same",
}
NEW = {
    "pyproject.toml": PROJECT,
    "set_up.py": "new",
    "wan/__init__.py": "",
    "wan/model.py": "new",
    "a.md": "same",
}
MINE = {".venv/x": "x", "models/m.safetensors": "m", "clips/output/lora.safetensors": "l", "wan/my.txt": "t"}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def pack(path: Path, files: Mapping[str, str], top: str = "reelsmith-main/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(top + name, text)
    return path


def read(folder: Path) -> dict[str, str]:
    """Return the texts of a checkout's files, without those that Python and updates put beside them."""
    kept = {".reelsmith", "__pycache__"}
    paths = [path for path in folder.rglob("*") if path.is_file() and not kept & {*path.parts}]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_a_zip_file_changes_files_of_reelsmith_only_and_back_undoes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "a b ü", {**OLD, **MINE})
    update(root, pack(tmp_path / "new.zip", NEW))
    said = capsys.readouterr().err
    assert "files replaced: 1, added: 1" in said
    assert "Not part of this version, and not removed: wan/gone.py." in said
    assert read(root) == {**OLD, **NEW, **MINE}
    update(root, pack(tmp_path / "newer.zip", {**OLD, "set_up.py": "newer"}, top=""))
    assert read(root) == {**OLD, "set_up.py": "newer", **MINE}  # wan/model.py was of the version before
    go_back(root)
    assert read(root) == {**OLD, **NEW, **MINE}
    with pytest.raises(UserError, match="nothing was updated"):
        go_back(root)
    update(root, tmp_path / "new.zip")
    assert "has the version that is already installed" in capsys.readouterr().err


def test_an_update_that_stops_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "root", {**OLD, **MINE})
    full, left = os.replace, iter([True, True, True, True, False])

    def replace(source: Path, target: Path) -> None:
        if not next(left):
            raise OSError(28, "No space left on device")
        full(source, target)

    monkeypatch.setattr(updating.os, "replace", replace)
    with pytest.raises(
        UserError, match="No space left on device.*free some space, and run it again; back returns"
    ):
        update(root, pack(tmp_path / "new.zip", NEW))
    monkeypatch.setattr(updating.os, "replace", full)
    shutil.copytree(root, tmp_path / "twin")
    go_back(root)
    assert read(root) == {**OLD, **MINE}

    update(tmp_path / "twin", tmp_path / "new.zip")
    assert read(tmp_path / "twin") == {**OLD, **NEW, **MINE}
    go_back(tmp_path / "twin")
    assert read(tmp_path / "twin") == {**OLD, **MINE}


def test_an_update_without_room_to_unpack_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "root", OLD)

    def copy(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(updating.shutil, "copyfileobj", copy)
    with pytest.raises(UserError, match="No space left on device.*nothing was changed"):
        update(root, pack(tmp_path / "new.zip", NEW))
    assert read(root) == OLD


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pyproject.toml": '[project]\nname = "other"\n'}, "does not contain Reelsmith"),
        ({"readme.md": ""}, "does not contain Reelsmith"),
        ({**NEW, "../outside.py": ""}, "which no version of Reelsmith has"),
        ({**NEW, "C:/outside.py": ""}, "which no version of Reelsmith has"),
        ({**NEW, "models/m.safetensors": "theirs"}, "which no version of Reelsmith has"),
    ],
)
def test_another_zip_file_changes_nothing(tmp_path: Path, files: dict[str, str], message: str) -> None:
    root = write(tmp_path / "root", {**OLD, **MINE})
    with pytest.raises(UserError, match=message):
        update(root, pack(tmp_path / "other.zip", files, top=""))
    assert read(root) == {**OLD, **MINE}
    assert not (tmp_path / "outside.py").exists()


def test_half_a_zip_file_changes_nothing(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    file = pack(tmp_path / "new.zip", NEW)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"new\.zip is not a complete zip file .* Download it again"):
        update(root, file)
    for missing in (tmp_path / "none.zip", root):
        with pytest.raises(UserError, match="no such file"):
            update(root, missing)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", PROJECT)
        archive.writestr("set_up.py", bytes(1000))
        place = archive.getinfo("set_up.py").header_offset + 30 + len("set_up.py")
    content = bytearray(file.read_bytes())
    content[place : place + 4] = b"\xff" * 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"new\.zip is not a complete zip file .* Download it again"):
        update(root, file)
    with pytest.raises(UserError, match="is not a clone of git. Download the zip file"):
        update(root, None)
    assert read(root) == OLD


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "core.autocrlf=false"]
    done = subprocess.run(["git", *names, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a repository in tmp_path/origin that has one change more."""
    origin = write(tmp_path / "origin", OLD)
    git(origin, "init", "--quiet", "--initial-branch=main")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "old")
    git(tmp_path, "clone", "--quiet", "origin", "a b ü")
    (origin / "set_up.py").write_text("new", encoding="utf-8")
    git(origin, "commit", "--quiet", "-am", "new")
    root = write(tmp_path / "a b ü", MINE)
    (root / ".git" / "info" / "exclude").write_text(".reelsmith/\n", encoding="utf-8")
    return root


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_a_clone_goes_forward_and_back(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = git(clone, "rev-parse", "HEAD")
    update(clone, None)
    assert "Updated by 1 change, from" in capsys.readouterr().err
    update(clone, None)
    assert capsys.readouterr().err == "This is the newest version.\n"
    assert (clone / "set_up.py").read_text(encoding="utf-8") == "new"
    (clone / "set_up.py").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"You changed set_up\.py, which back would overwrite"):
        go_back(clone)
    git(clone, "checkout", "--quiet", "set_up.py")
    go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == before
    assert git(clone, "branch", "--show-current") == "main"
    go_forward = capsys.readouterr().err
    assert "as before the update. update installs it again" in go_forward
    update(clone, None)
    kept = {name: (clone / name).read_text(encoding="utf-8") for name in MINE}
    assert kept == MINE


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_a_clone_that_cannot_be_updated_says_why(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is a clone of git. Type update without a file"):
        update(clone, clone.parent / "new.zip")
    with pytest.raises(UserError, match="nothing was updated"):
        go_back(clone)
    (clone / "a.md").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"You changed a\.md, which an update would overwrite"):
        update(clone, None)
    git(clone, "checkout", "--quiet", "a.md")
    git(clone, "remote", "set-url", "origin", "https://127.0.0.1:9/x.git")
    with pytest.raises(UserError, match="git fetch failed, and nothing was changed: .* Check the connection"):
        update(clone, None)
    monkeypatch.setattr(updating.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="git is not installed here. Install it"):
        update(clone, None)


def test_no_version_has_a_file_in_a_folder_of_the_user() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("it needs the list of git")
    tops = {name.partition("/")[0] for name in git(ROOT, "ls-files").splitlines()}
    assert not tops & updating.USER_FOLDERS


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
@pytest.mark.parametrize("is_branch", [False, True])
def test_back_keeps_commits_that_the_user_made_after_the_update(clone: Path, is_branch: bool) -> None:
    before = git(clone, "rev-parse", "HEAD")
    update(clone, None)
    if is_branch:
        git(clone, "checkout", "--quiet", "-b", "mine")
    (clone / "mine.py").write_text("mine", encoding="utf-8")
    git(clone, "add", "mine.py")
    git(clone, "commit", "--quiet", "-m", "my own work")
    own = git(clone, "rev-parse", "HEAD")
    with pytest.raises(
        UserError, match=r"commits of your own, which only the branch .* my own work\. .*git branch"
    ):
        go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == own
    git(clone, "branch", "my-work")  # as the sentence says
    go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == before
    assert git(clone, "rev-parse", "my-work") == own


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_back_on_a_branch_that_was_not_updated_changes_nothing(clone: Path) -> None:
    git(clone, "checkout", "--quiet", "--orphan", "other")
    git(clone, "commit", "--quiet", "-m", "another beginning")
    other = git(clone, "rev-parse", "HEAD")
    git(clone, "checkout", "--quiet", "main")
    update(clone, None)
    git(clone, "checkout", "--quiet", "other")
    git(clone, "branch", "kept")
    with pytest.raises(UserError, match="is not based on the version before the update"):
        go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == other


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_the_note_of_an_earlier_version_protects_commits_too(clone: Path) -> None:
    before = git(clone, "rev-parse", "HEAD")
    update(clone, None)
    note = clone / ".reelsmith" / updating.COMMITS_FILE
    note.write_text(before, encoding="ascii")
    git(clone, "commit", "--quiet", "--allow-empty", "-m", "mine")
    with pytest.raises(UserError, match="commits of your own"):
        go_back(clone)
    git(clone, "reset", "--quiet", "--hard", "HEAD~1")
    go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == before
    note.write_bytes(b"\xff\n--hard")
    with pytest.raises(UserError, match="no longer names the version before the update"):
        go_back(clone)


def test_back_keeps_files_that_the_user_changed_after_the_update(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    update(root, pack(tmp_path / "new.zip", NEW))
    for name in ("set_up.py", "wan/model.py"):  # replaced, added
        (root / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"You changed set_up\.py, wan/model\.py since the update"):
        go_back(root)
    assert (root / "set_up.py").read_text(encoding="utf-8") == "mine"
    (root / "set_up.py").rename(tmp_path / "kept.py")
    (root / "wan/model.py").unlink()
    go_back(root)
    assert read(root) == OLD


@pytest.mark.parametrize("is_folding", [False, True])
def test_an_update_that_renames_by_case_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folding: bool
) -> None:
    root = write(tmp_path / "root", {"pyproject.toml": PROJECT})
    old = {"pyproject.toml": PROJECT, "Docs.md": "old", "Wan/__init__.py": "1", "gone.md": "x"}
    new = {"pyproject.toml": PROJECT, "docs.md": "new", "wan/__init__.py": "2"}
    first, second = pack(tmp_path / "old.zip", old), pack(tmp_path / "new.zip", new)
    if is_folding:
        FoldingDisk(monkeypatch)
    update(root, first)
    update(root, second)
    monkeypatch.undo()
    there = {name.casefold(): text for name, text in read(root).items()}
    assert there == {name.casefold(): text for name, text in new.items()}
    assert len(read(root)) == 3
    if is_folding:
        FoldingDisk(monkeypatch)
    go_back(root)
    monkeypatch.undo()
    there = {name.casefold(): text for name, text in read(root).items()}
    assert there == {name.casefold(): text for name, text in old.items()}


@pytest.mark.parametrize(
    "project",
    [
        *("project = 1", 'project = "x"', "project = [1]", "[project]\nname = [[]]", f"x = {'9' * 100_000}"),
        *(f"{'a.' * 30_000}a = 1", f"x = {'[' * 20_000}", "[[project]]\nname = 1", "x = 1e99999\n\x00"),
    ],
)
def test_whatever_a_project_file_holds_is_refused_in_a_sentence(tmp_path: Path, project: str) -> None:
    root = write(tmp_path / "root", OLD)
    with pytest.raises(UserError, match="does not contain Reelsmith"):
        update(root, pack(tmp_path / "odd.zip", {**NEW, "pyproject.toml": project}))
    assert read(root) == OLD


@pytest.mark.parametrize(
    "name",
    [
        *(
            "wan/a\nb.py",
            "wan/a\u2028b.py",
            "wan/a\x85b.py",
            "wan/con.py",
            "wan/a.py ",
            "wan/a?.py",
            "wan//a.py",
        ),
        *(
            ".GIT/hooks/post-merge",
            ".Reelsmith/uv",
            "GIT~1/config",
            "wan/.git/config",
            "./a.py",
            "A.MD",
            "wan//a.py",
        ),
        *("a.md/b.py", "wan/" + "a" * 1000),
    ],
)
def test_names_that_no_version_has_change_nothing(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "root", OLD)
    with pytest.raises(UserError, match=r"which no version of Reelsmith has. Nothing was changed") as error:
        update(root, pack(tmp_path / "odd.zip", {**NEW, name: "x"}))
    assert "\n" not in str(error.value)
    assert read(root) == OLD


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    file = pack(tmp_path / "twice.zip", NEW)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("reelsmith-main/set_up.py", "another")
    with pytest.raises(UserError, match="two files of one name"):
        update(root, file)
    assert read(root) == OLD


def test_a_name_that_is_no_text_and_a_list_that_is_too_long_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    file = pack(tmp_path / "odd.zip", {**NEW, "wan/ü.py": ""})
    file.write_bytes(file.read_bytes().replace("ü".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match=r"odd\.zip is not a complete zip file"):
        update(root, file)
    assert read(root) == OLD


def test_notes_that_are_damaged_end_with_a_sentence(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    update(root, pack(tmp_path / "new.zip", NEW))
    plan = root / ".reelsmith" / "back" / updating.PLAN_FILE
    for content in (b"\xff", b"[]", b'{"replaced": ["../x"], "added": []}', b'{"x": 1}'):
        plan.write_bytes(content)
        with pytest.raises(UserError, match="the record of the last update, cannot be read"):
            go_back(root)
    (root / ".reelsmith" / "files.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"files\.txt, a record of the last update, cannot be read"):
        update(root, pack(tmp_path / "newer.zip", OLD))


def test_an_update_puts_no_file_where_a_folder_is(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {**OLD, "tools/mine.py": "m"})
    with pytest.raises(UserError, match="has a file tools, but a folder has its path"):
        update(root, pack(tmp_path / "new.zip", {**NEW, "tools": "x"}))
    assert read(root) == {**OLD, "tools/mine.py": "m"}


def test_a_file_that_the_user_changed_is_kept_beside_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "a b ü", {**OLD, **MINE})
    note_version(root)  # as the first start does
    write(root, {"set_up.py": "mine", "wan/model.py": "my own", "a.md": "mine", "set_up.py.yours": "elder"})
    before = read(root)
    update(root, pack(tmp_path / "new.zip", NEW))
    said = capsys.readouterr().err.splitlines()
    assert "You had changed set_up.py: your version is now set_up.py.yours2." in said
    assert "You had changed wan/model.py: your version is now wan/model.py.yours." in said
    assert "You had changed a.md: your version is now a.md.yours." in said
    kept = {"set_up.py.yours2": "mine", "wan/model.py.yours": "my own", "a.md.yours": "mine"}
    assert read(root) == {**before, **NEW, **kept}
    write(root, {"a.md.yours": "worked on"})
    go_back(root)
    assert read(root) == {**before, "a.md.yours": "worked on"}

    update(root, tmp_path / "new.zip")
    write(root, {"wan/model.py": "again", "wan/__init__.py": "", "set_up.py": "new"})
    capsys.readouterr()
    update(root, pack(tmp_path / "old.zip", OLD))
    told = capsys.readouterr().err
    assert told.count("You had changed") == 1
    assert "You had changed wan/model.py: your version is now wan/model.py.yours2." in told
    assert (root / "wan/model.py.yours2").read_text(encoding="utf-8") == "again"
    assert not (root / "wan/model.py").exists()  # the version of that zip file has none


def test_an_update_says_that_it_does_not_know_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "root", {**OLD, "set_up.py": "mine"})
    update(root, pack(tmp_path / "new.zip", NEW))
    assert "Their old versions are in .reelsmith/back until the next update." in capsys.readouterr().err
    assert (root / ".reelsmith/back/set_up.py").read_text(encoding="utf-8") == "mine"
    write(root, {"set_up.py": "mine again"})
    update(root, pack(tmp_path / "newer.zip", {**NEW, "set_up.py": "newer"}))
    assert "It is not known" not in capsys.readouterr().err
    assert (root / "set_up.py.yours").read_text(encoding="utf-8") == "mine again"


def end_at(step: int, act: Callable[[], None]) -> bool:
    """Run `act` in a process that ends before its file operation of that number; return whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, words: tuple[Any, ...]) -> None:
            nonlocal count
            is_write = event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR)
            if is_write or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "subprocess.Popen"):
                count += 1
                if count == step:
                    os._exit(9)

        sys.addaudithook(watch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")


@pytest.mark.slow
@FORKS
@pytest.mark.parametrize("is_return", [False, True])
def test_an_update_that_is_killed_at_any_step_leaves_one_version_to_the_next_start(
    tmp_path: Path, is_return: bool
) -> None:
    first, second = pack(tmp_path / "first.zip", OLD), pack(tmp_path / "new.zip", NEW)
    start = write(tmp_path / "start", {**OLD, **MINE, "a.md": "older"})
    update(start, first)
    write(start, {"set_up.py": "mine"})
    before = read(start)
    after = {**{name: text for name, text in before.items() if name != "wan/gone.py"}, **NEW}
    after["set_up.py.yours"] = "mine"
    root = tmp_path / "root"

    def try_step(step: int) -> bool:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        if is_return:
            update(root, second)
        if not end_at(step, lambda: go_back(root) if is_return else update(root, second)):
            return False
        repair(root)
        found = read(root)
        assert found in (before, after), step
        assert not {*os.listdir(root / ".reelsmith")} & {"back.part", "back.old", "new"}
        if found == before:
            update(root, second)
            assert read(root) == after, step
        go_back(root)
        assert read(root) == before, step
        return True

    step = 1
    while try_step(step):
        step += 1
    assert step > 15


@FORKS
@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_a_clone_whose_git_is_killed_at_any_file_is_finished(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = tmp_path / "origin"
    write(origin, {"wan/model.py": "new", "a.md": "newer"})
    git(origin, "rm", "--quiet", "wan/gone.py")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "newer")
    before = git(clone, "rev-parse", "HEAD")
    step = 1
    while end_at(step, lambda: update(clone, None)):
        repair(clone)
        assert git(clone, "rev-parse", "HEAD") in (before, git(origin, "rev-parse", "HEAD"))
        assert git(clone, "status", "--porcelain", "-uno") == ""
        git(clone, "reset", "--quiet", "--hard", before)
        step += 1
    git(clone, "reset", "--quiet", "--hard", before)

    # git itself ended while it wrote files: one is new, one added, one gone, one the user changed since
    after = git(origin, "rev-parse", "HEAD")
    marker = clone / ".reelsmith/back/unfinished"
    marker.parent.mkdir()
    marker.write_text(f"{before}\n{after}", encoding="ascii")
    write(clone, {"set_up.py": "new", "wan/model.py": "new", "a.md": "mine"})
    (clone / "wan/gone.py").unlink()
    (clone / ".git/index.lock").touch()
    with pytest.raises(UserError, match="git may be at work"):
        repair(clone)
    os.utime(clone / ".git/index.lock", (0, 0))
    capsys.readouterr()
    repair(clone)
    assert "You had changed a.md: your version is now a.md.yours." in capsys.readouterr().err
    assert git(clone, "rev-parse", "HEAD") == after
    assert git(clone, "status", "--porcelain", "-uno") == ""
    assert (clone / "a.md.yours").read_text(encoding="utf-8") == "mine"
    assert not marker.parent.exists()
    go_back(clone)
    assert git(clone, "rev-parse", "HEAD") == before


def test_the_next_command_in_half_an_update_undoes_it_and_begins_anew(tmp_path: Path) -> None:
    root = tmp_path / "a b ü"
    ours = [*ROOT.glob("modules/*.py"), *ROOT.glob("package/*.py")]
    for path in (*ours, ROOT / "modules/option_tables.txt", ROOT / "set_up.py", ROOT / "pyproject.toml"):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    write(root, {"hello.py": "import modules.interpreter\nprint('old', __import__('sys').argv[1:])\n"})
    texts = read(root)
    hello = texts["hello.py"].replace("old", "new")
    broken = {"modules/parser.py": "import nothing", "modules/errors.py": "half a version"}
    newer = {**texts, "hello.py": hello, **broken}
    update(root, pack(tmp_path / "new.zip", newer))
    (root / ".reelsmith/back/unfinished").touch()  # as it is until the last file is in its place
    done = subprocess.run(
        [sys.executable, root / "hello.py", "a b", "ü"], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "old ['a b', 'ü']\n"
    assert "was interrupted. It is being undone" in done.stderr
    assert read(root) == texts
