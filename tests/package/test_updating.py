"""An update forwards a clone or unpacks a zip file beside the old folder, and loses nothing of the user's."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from modules.errors import UserError
from modules.installation import DISTRIBUTION
from package.updating import update

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


def test_a_zip_file_is_unpacked_beside_the_folder_and_changes_nothing_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "a b ü", {**OLD, **MINE})
    (root / ".reelsmith" / "new").mkdir(parents=True)
    (root / ".reelsmith" / "new" / "half.py").touch()  # of an update that was killed
    for name in ("reelsmith-main", "reelsmith-main-2"):
        update(root, pack(tmp_path / "reelsmith-main.zip", NEW))
        assert capsys.readouterr().err == (
            f"The new version is in {tmp_path / name}. Nothing in {root} has changed.\n"
            "Move what is yours there, such as models, runs and settings, and start it. "
            "The new version lacks: clips, models\n"
        )
        assert read(tmp_path / name) == NEW
    assert read(root) == {**OLD, **MINE}
    assert os.listdir(root / ".reelsmith") == []


def test_a_file_that_may_be_run_may_be_run_in_the_new_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "root", OLD)
    file = pack(tmp_path / "new.zip", NEW)
    with zipfile.ZipFile(file, "a") as archive:
        entry = zipfile.ZipInfo("reelsmith-main/Reelsmith.command")
        entry.external_attr = 0o100755 << 16
        archive.writestr(entry, "")
    update(root, file)
    assert os.access(tmp_path / "new" / "Reelsmith.command", os.X_OK)
    assert not os.access(tmp_path / "new" / "set_up.py", os.X_OK) or os.name == "nt"


def test_an_update_without_room_to_unpack_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "root", OLD)

    def copy(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", copy)
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
def test_a_clone_goes_forward(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = git(clone, "rev-parse", "HEAD")
    update(clone, None)
    said = capsys.readouterr().err
    assert "Updated by 1 change, from" in said
    update(clone, None)
    assert capsys.readouterr().err == "This is the newest version.\n"
    assert (clone / "set_up.py").read_text(encoding="utf-8") == "new"
    kept = {name: (clone / name).read_text(encoding="utf-8") for name in MINE}
    assert kept == MINE
    git(clone, *said.split("\n")[1].split(" returns")[0].split()[1:])  # the command that it prints
    assert git(clone, "rev-parse", "HEAD") == before


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_file_of_the_user_that_the_new_version_has_too_is_not_overwritten(
    clone: Path, is_ignored: bool
) -> None:
    origin = clone.parent / "origin"
    write(origin, {"notes.py": "theirs"})
    git(origin, "add", "notes.py")
    git(origin, "commit", "--quiet", "-m", "notes")
    write(clone, {"notes.py": "mine"})
    if is_ignored:
        (clone / ".git" / "info" / "exclude").write_text("notes.py\n", encoding="utf-8")
    before = git(clone, "rev-parse", "HEAD")
    with pytest.raises(UserError, match=r"nothing was changed: .*would be overwritten by merge: notes\.py"):
        update(clone, None)
    assert (clone / "notes.py").read_text(encoding="utf-8") == "mine"
    assert git(clone, "rev-parse", "HEAD") == before
    assert (clone / "set_up.py").read_text(encoding="utf-8") == "old"


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_a_clone_with_commits_of_its_own_is_refused(clone: Path) -> None:
    write(clone, {"a.md": "mine"})
    git(clone, "commit", "--quiet", "-am", "mine")
    before = git(clone, "rev-parse", "HEAD")
    with pytest.raises(UserError, match=r"has commits of its own \(1\).*Type git rebase @\{upstream\}"):
        update(clone, None)
    assert git(clone, "rev-parse", "HEAD") == before
    git(clone, "rebase", "--quiet", "@{upstream}")
    assert read_two(clone) == ("new", "mine")


def read_two(root: Path) -> tuple[str, str]:
    return (root / "set_up.py").read_text(encoding="utf-8"), (root / "a.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_a_clone_that_cannot_be_updated_says_why(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is a clone of git. Type update without a file"):
        update(clone, clone.parent / "new.zip")
    (clone / "a.md").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.md changed here, by you or by an interrupted update"):
        update(clone, None)
    git(clone, "checkout", "--quiet", "a.md")
    git(clone, "remote", "set-url", "origin", "https://127.0.0.1:9/x.git")
    with pytest.raises(UserError, match="git fetch failed, and nothing was changed: .* Check the connection"):
        update(clone, None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="git is not installed here. Install it"):
        update(clone, None)


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
