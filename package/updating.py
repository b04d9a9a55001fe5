"""Update a checkout to a newer version, from git or from a zip file, and go back to the one before.

Only files of Reelsmith change. What the user has beside them (models, runs, `.venv`) is in no version's
list of files. Standard library only.
"""

import filecmp
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from modules.errors import UserError
from modules.installation import DISTRIBUTION

NOTES = ".reelsmith"  # folder of what is noted here
COMMIT = "before_update.txt"  # in it: the commit before the last update from git
FILES = "files.txt"  # in it: the files of the version that the last zip file brought
BACK = "back"  # in it: the files that the last zip file replaced
PLAN = "update.json"  # in BACK: what the last zip file changed
UNFINISHED = "unfinished"  # in BACK, until all files of that zip file are in their places
# of the user or of this machine, wherever a zip file has them
KEPT = frozenset({".git", ".reelsmith", ".venv", ".venv-second", "models", "quickstart"})
MOST_FILES, MOST_BYTES = 50_000, 2 << 30
MOST_OF_PROJECT = 1 << 20  # bytes of pyproject.toml
OFFLINE = re.compile(
    r"could not resolve|unable to access|could not read from remote|connection|timed out", re.I
)


@dataclass(frozen=True)
class FileChange:
    """What an update from a zip file does to a folder: paths relative to it, with /."""

    replaced: list[str]  # also those that the new version lacks
    added: list[str]


def update(root: Path, file: Path | None) -> None:
    """Update the checkout in `root`, from a zip file or, without one, from where git cloned it.

    Raises UserError if that cannot be done; then nothing has changed, or `go_back` undoes it.
    """
    is_clone = (root / ".git").exists()
    if is_clone and file is not None:
        raise UserError(f"{root} is a clone of git. Type update without a file")
    if is_clone:
        _update_clone(root)
    elif file is None:
        raise UserError(
            f"{root} is no clone of git. Download the zip file of the newer version, and type update with "
            "its path (on Windows you can drop it on Reelsmith.bat)"
        )
    else:
        _update_from_zip(root, file)


def go_back(root: Path) -> None:
    """Return to the version before the last update. Raises UserError if there was none, or if git refuses."""
    note = root / NOTES / COMMIT
    if (root / ".git").exists():
        if not note.is_file():
            raise UserError("There is no version to go back to: nothing was updated here")
        before = note.read_text(encoding="ascii").strip()
        _refuse_changes(root)
        _git(root, "reset", "--keep", before)
        note.unlink()
        _say(f"This folder is at {before[:9]} again, as before the update. update goes forward.")
    else:
        _undo_zip(root)


def _update_clone(root: Path) -> None:
    _refuse_changes(root)
    before = _git(root, "rev-parse", "HEAD")
    _git(root, "pull", "--quiet", "--ff-only")
    after = _git(root, "rev-parse", "HEAD")
    if after == before:
        _say("This is the newest version.")
        return
    note = root / NOTES / COMMIT
    note.parent.mkdir(exist_ok=True)
    note.write_text(before, encoding="ascii")
    count = _git(root, "rev-list", "--count", f"{before}..{after}")
    _say(f"Updated by {count} changes, from {before[:9]} to {after[:9]}. Start Reelsmith again.")
    _say("back returns to the version before.")


def _refuse_changes(root: Path) -> None:
    changed = [line[3:] for line in _git(root, "status", "--porcelain", "-uno").splitlines()]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"You changed {', '.join(changed[:3])}{more}, which an update would overwrite. Commit that, or "
            "put it aside with git stash, and run again"
        )


def _git(root: Path, *words: str) -> str:
    """Return the output of git. Raises UserError if there is no git, or with its last words if it fails."""
    program = shutil.which("git")
    if program is None:
        raise UserError(
            f"{root} is a clone of git, and git is not installed here. Install it (git-scm.com), or download "
            "the zip file of the newer version into a folder of its own"
        )
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [program, *words], cwd=root, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        said = " ".join(done.stderr.split())[:300]
        network = " Check the connection and run again." if OFFLINE.search(said) else ""
        raise UserError(f"git {words[0]} failed, and nothing was changed: {said}{network}")
    return done.stdout.rstrip()


def _update_from_zip(root: Path, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    unfinished = root / NOTES / BACK / UNFINISHED
    if unfinished.exists():  # else only half of the version before could come back later
        _undo_zip(root)
    new = root / NOTES / "new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        files = _unpack(file, new)
        change = _compare(root, new, files)
        if not change.replaced and not change.added:
            _say(f"{file.name} has the version that is here.")
            return
        _keep_for_return(root, change)
        for name in files:
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target)
        for name in set(change.replaced) - set(files):
            (root / name).unlink()
        (root / NOTES / FILES).write_text("\n".join(files), encoding="utf-8")
        unfinished.unlink()
    except OSError as error:
        state = "back returns to the version before" if unfinished.exists() else "nothing was changed"
        raise UserError(
            f"{file.name}: the update stopped ({error}). Close the programs that use files of {root}, or "
            f"free some space, and run it again; {state}"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    replaced, added = len(change.replaced), len(change.added)
    _say(f"Updated (files replaced: {replaced}, added: {added}). Start Reelsmith again.")
    _say("back returns to the version before.")
    _tell_left_over(root, files)


def _unpack(file: Path, folder: Path) -> list[str]:
    """Unpack a version into a folder, and return its files. Raises UserError if it is none, or is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            top = _find_top(archive, members)
            ours = {name.removeprefix(top): entry for name, entry in members.items() if name.startswith(top)}
            _refuse_names(file, ours.values(), ours)
            for name, entry in ours.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                if entry.external_attr >> 16 & stat.S_IXUSR:
                    target.chmod(0o755)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file.name} is no whole zip file ({error}). Download it again") from None
    return sorted(ours)


def _find_top(archive: zipfile.ZipFile, members: Iterable[str]) -> str:
    """Return the folder of a zip file with a version in it, with / at its end; "" for none."""
    tops = [name.removesuffix("pyproject.toml") for name in members if name.endswith("pyproject.toml")]
    top = min(tops, key=len, default="")
    try:
        with archive.open(f"{top}pyproject.toml") as file:
            text = file.read(MOST_OF_PROJECT).decode("utf-8")
        name = tomllib.loads(text)["project"]["name"]
    except (KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        name = None
    if name != DISTRIBUTION:
        raise UserError(f"{Path(archive.filename or '').name} has no Reelsmith in it")
    return top


def _refuse_names(file: Path, entries: Iterable[zipfile.ZipInfo], names: Iterable[str]) -> None:
    """Raise UserError for a zip file that is too large, or that names places which are not of a version."""
    entries, names = list(entries), list(names)
    if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise UserError(f"{file.name} is larger than any version of Reelsmith. Nothing was changed")
    for entry, name in zip(entries, names, strict=True):
        parts = PurePosixPath(name).parts
        is_outside = not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name
        if is_outside or parts[0] in KEPT or stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"{file.name} has {name}, which no version of Reelsmith has. Nothing was changed")


def _compare(root: Path, new: Path, files: list[str]) -> FileChange:
    """Return what the files of the new version change."""
    note = root / NOTES / FILES
    before = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    there = [name for name in files if (root / name).exists()]
    replaced = [name for name in there if not filecmp.cmp(root / name, new / name, shallow=False)]
    gone = [name for name in set(before) - set(files) if (root / name).is_file()]
    return FileChange(replaced=sorted([*replaced, *gone]), added=sorted(set(files) - set(there)))


def _keep_for_return(root: Path, change: FileChange) -> None:
    """Copy the files that an update replaces. Nothing has changed before all of them are there."""
    whole, part = root / NOTES / BACK, root / NOTES / f"{BACK}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in change.replaced:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, part / name)
    note = root / NOTES / FILES
    if note.is_file():
        shutil.copy2(note, part / FILES)
    (part / UNFINISHED).touch()
    (part / PLAN).write_text(json.dumps(asdict(change)), encoding="utf-8")
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(part, whole)


def _undo_zip(root: Path) -> None:
    """Undo the last update from a zip file, also one that stopped half way; run again if this one stops."""
    kept = root / NOTES / BACK
    if not (kept / PLAN).is_file():
        raise UserError("There is no version to go back to: nothing was updated here")
    change = FileChange(**json.loads((kept / PLAN).read_text(encoding="utf-8")))
    try:
        for name in change.replaced:
            shutil.copy2(kept / name, root / name)
        for name in change.added:
            (root / name).unlink(missing_ok=True)
        note = root / NOTES / FILES
        note.unlink(missing_ok=True)
        if (kept / FILES).is_file():
            shutil.copy2(kept / FILES, note)
        shutil.rmtree(kept)
    except OSError as error:
        raise UserError(f"Not all of the version before is back ({error}). Run back again") from None
    _say(f"The version before is back (files: {len(change.replaced)}, removed: {len(change.added)}).")


def _tell_left_over(root: Path, files: Iterable[str]) -> None:
    """Name the files of Python in this version's folders that are not of it: older ones, or the user's."""
    files = set(files)
    rooms = {PurePosixPath(name).parts[0] for name in files if name.endswith("/__init__.py")}
    found = sorted(
        path.relative_to(root).as_posix() for room in rooms for path in (root / room).rglob("*.py")
    )
    others = [name for name in found if name not in files]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        _say(f"Not of this version, and left there: {', '.join(others[:5])}{more}.")
        _say("Delete them if they are not yours.")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
