"""Update a checkout to a newer version, from git or from a zip file, and go back to the one before.

Only files of Reelsmith change. What the user has next to them (models, runs, `.venv`) is not in any version's
list of files. A file of Reelsmith that the user changed is kept under another name. What a killed update
left is repaired at the next start: `modules/interpreter.py` finds it, and runs the copy of this code that
was made before anything changed. Standard library only.
"""

import filecmp
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from modules.control_codes import escape_control_codes
from modules.errors import UserError
from modules.file_locks import only_one
from modules.installation import DISTRIBUTION
from modules.open_files import replace_file
from modules.output_files import find_error_on_windows, fold_name
from modules.text_files import parse_json, parse_toml, read_text
from modules.zip_files import BoundedFile

PROJECT = "pyproject.toml"
STATE_FOLDER = ".reelsmith"  # folder of all files that this module writes for itself
COMMITS_FILE = "before_update.txt"  # in it: the commits before and after the last update from git, one a line
FILE_LIST = "files.txt"  # in it: the files of the version that the last zip file brought
DIGESTS_FILE = "digests.txt"  # in it: a line "digest  name" for each file of the installed version
UNPACKED = "new"  # in it: files that have not been moved into place yet
BACKUP = "back"  # in it: the files that the last zip file replaced
PLAN_FILE = "update.json"  # in BACKUP: what the last zip file changed
# in BACKUP, while files change; for a clone with the commits before and after. modules/interpreter.py knows
# its name
UNFINISHED = "unfinished"
UPDATER_ZIP = "program.zip"  # in it: set_up.py and this file, of one version, whatever happens to the folder
VERSION_FILES = (FILE_LIST, DIGESTS_FILE)
LOCK = "update.lock"
GIT_SECONDS = 60.0  # an older lock of git belongs to a process that was killed
# names that belong to the user or the machine, wherever a zip file has them
USER_FOLDERS = frozenset({".git", ".reelsmith", ".venv", ".venv-second", "models", "quickstart"})
MAX_FILES, MAX_BYTES = 50_000, 2 << 30
MAX_PYPROJECT_BYTES = 1 << 17  # bytes of pyproject.toml; a TOML reader takes quadratic time for some inputs
MAX_PATH_BYTES = 1000  # bytes of a file's path
MAX_NOTE_BYTES = 1 << 26  # bytes of a note about an update
MAX_FILE_BYTES = 1 << 23  # bytes of a file that a version may have; the user's models and clips are larger
MAX_LISTED = 20  # lines about the user's files
OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # how git names a commit
SHORT_NAME = re.compile(r"~\d")  # Windows' second name of a file: GIT~1 is .git
OFFLINE = re.compile(
    r"could not resolve|unable to access|could not read from remote|connection|timed out", re.I
)


@dataclass(frozen=True)
class FileChange:
    """Changes that an update from a zip file makes in a folder, as relative paths with /."""

    replaced: list[str]  # also those that the new version lacks
    added: list[str]
    digests: dict[str, str] = field(default_factory=dict)  # digests of the files that the update writes
    # a file of `replaced` that the user had edited -> name of the copy that is kept of it
    edited_copies: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRecord:
    """The commits before and after the last update of a git clone; `after` is None in older records."""

    before: str
    after: str | None


@dataclass(frozen=True)
class CloneMove:
    """A move of a git clone to another commit, by `update` or, if `is_return`, by `back`."""

    before: str
    after: str
    is_return: bool


def update(root: Path, file: Path | None) -> None:
    """Update the checkout in `root` from the zip file `file` or, if it is None, with git.

    Raises:
        UserError: If the update fails. Then nothing has changed, or `go_back` can undo the change.
    """
    is_clone = (root / ".git").exists()
    if is_clone and file is not None:
        raise UserError(f"{root} is a clone of git. Type update without a file")
    if not is_clone and file is None:
        raise UserError(
            f"{root} is not a clone of git. Download the zip file of the newer version, and type update with "
            "its path (on Windows you can drop it on Reelsmith.bat)"
        )
    if file is not None and not file.is_file():
        raise UserError(f"{file}: no such file")
    with _exclusive_access(root):
        _repair(root)
        if file is None:
            _update_clone(root)
        else:
            _update_from_zip(root, file)


def go_back(root: Path) -> None:
    """Return to the version before the last update.

    Raises:
        UserError: If there was no update, if the user's own changes would be lost, or if git fails. Then no
            file has changed.
    """
    with _exclusive_access(root):
        was_unfinished = (root / STATE_FOLDER / BACKUP / UNFINISHED).exists()
        _repair(root)
        if not (root / ".git").exists():
            if not was_unfinished:  # an unfinished update has just been undone by `_repair`
                _restore_backup(root)
            return
        commits = _read_commits(root)
        _reject_changes(root, "back")
        _reject_own_commits(root, commits)
        _move_clone(root, CloneMove(_git(root, "rev-parse", "HEAD"), commits.before, is_return=True))
    _say(f"This folder is at {commits.before[:9]} again, as before the update. update installs it again.")


def repair(root: Path) -> None:
    """Repair the folder after a killed update or `go_back`; otherwise do nothing.

    An update from a zip file is undone; an update of a git clone is completed.

    Raises:
        UserError: If the repair fails, or if an update is running.
    """
    if any(
        (root / STATE_FOLDER / name).exists()
        for name in (BACKUP, f"{BACKUP}.part", f"{BACKUP}.old", UNPACKED)
    ):
        with _exclusive_access(root):
            _repair(root)


def note_version(root: Path) -> None:
    """Record digests of the installed files, so that an update can detect files that the user has edited."""
    digests_file = root / STATE_FOLDER / DIGESTS_FILE
    # they are recorded already, or not needed because git detects changes
    if digests_file.exists() or (root / ".git").exists():
        return
    digests = {}
    for folder, folders, files in os.walk(root):
        subfolder = Path(folder).relative_to(root)
        # skip folders that no version of the program contains
        folders[:] = [name for name in folders if not _find_name_error((subfolder / name).as_posix())]
        names = [(subfolder / name).as_posix() for name in files]
        for name in names:
            path = root / name
            if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES and not _find_name_error(name):
                digests[name] = _digest(path)
        if len(digests) > MAX_FILES:  # more files than any version has
            break
    _write_digests(root, digests)


@contextmanager
def _exclusive_access(root: Path) -> Iterator[None]:
    """Let only one process at a time change the folder."""
    try:
        (root / STATE_FOLDER).mkdir(exist_ok=True)
        with only_one(root / STATE_FOLDER / LOCK, waits=False):
            yield
    except BlockingIOError:
        raise UserError(f"An update of {root} is running. Wait until it has ended, and start again") from None
    except OSError as error:
        raise UserError(f"{root} cannot be changed: {error}") from None


def _repair(root: Path) -> None:
    """Undo an interrupted update from a zip file, or complete one in a git clone, and remove leftovers."""
    state_folder = root / STATE_FOLDER
    backup = state_folder / BACKUP
    partial_backup = state_folder / f"{BACKUP}.part"
    old_backup = state_folder / f"{BACKUP}.old"
    # `_make_backup` was killed after it had renamed the old backup, before it renamed the new one
    was_killed_between_renames = partial_backup.exists() and old_backup.exists() and not backup.exists()
    if was_killed_between_renames:
        replace_file(old_backup, backup)
    for leftover in (partial_backup, old_backup, state_folder / UNPACKED):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = backup / UNFINISHED
    if not unfinished.exists():
        return
    # the commits of an update of a clone; empty for an update from a zip file
    lines = unfinished.read_bytes().decode("ascii", "replace").split()
    if lines and (root / ".git").exists():
        _resume_clone_move(root, lines)
    else:
        _say("An update of this folder was interrupted. It is being undone; run it again afterwards.")
        _restore_backup(root, is_repair=True)


def _save_updater(root: Path) -> None:
    """Copy the code that undoes an update, so that it runs while the folder mixes two versions."""
    source, part = Path(__file__).parent.parent, root / STATE_FOLDER / "program.part"
    with zipfile.ZipFile(part, "w") as archive:
        archive.write(source / "set_up.py", "__main__.py")
        for path in (*source.glob("modules/*.py"), *source.glob("package/*.py")):
            archive.write(path, path.relative_to(source))
    replace_file(part, root / STATE_FOLDER / UPDATER_ZIP)


def _update_clone(root: Path) -> None:
    _reject_changes(root, "an update")
    before = _git(root, "rev-parse", "HEAD")
    _git(root, "fetch", "--quiet")
    after = _git(root, "rev-parse", "@{upstream}")
    count = _git(root, "rev-list", "--count", f"{before}..{after}")
    if count == "0":
        _say("This is the newest version.")
        return
    _move_clone(root, CloneMove(before, after, is_return=False))
    changes = f"{count} change{'s' if count != '1' else ''}"
    _say(f"Updated by {changes}, from {before[:9]} to {after[:9]}. Start Reelsmith again.")
    _say("back returns to the previous version.")


def _move_clone(root: Path, move: CloneMove) -> None:
    """Let git move a clone to another commit, for an update or for `back`."""
    # If the process is killed meanwhile, the next start reads both commits from UNFINISHED and completes it.
    backup = root / STATE_FOLDER / BACKUP
    _save_updater(root)
    shutil.rmtree(backup, ignore_errors=True)
    backup.mkdir()
    lines = [move.before, move.after]
    if move.is_return:
        lines.append("back")
    (backup / UNFINISHED).write_text("\n".join(lines), encoding="ascii")
    try:
        if move.is_return:
            _git(root, "reset", "--quiet", "--keep", move.after)
        else:
            _git(root, "merge", "--quiet", "--ff-only", move.after)
    except UserError:
        if not _list_changes(root):  # git changed nothing, so there is nothing to finish
            shutil.rmtree(backup)
        raise
    _complete_move(root, move)


def _complete_move(root: Path, move: CloneMove) -> None:
    """Record the commits for `back`, or delete the record after a return; then mark the move as complete."""
    note = root / STATE_FOLDER / COMMITS_FILE
    if move.is_return:
        note.unlink(missing_ok=True)
    else:
        note.write_text(f"{move.before}\n{move.after}\n", encoding="ascii")
    shutil.rmtree(root / STATE_FOLDER / BACKUP)


def _resume_clone_move(root: Path, lines: Sequence[str]) -> None:
    """Complete an update or a `back` of a git clone that was killed while git changed files."""
    # `lines` are the lines of UNFINISHED: the commits before and after, then "back" if it was a `back`.
    if len(lines) < 2 or not all(map(OBJECT.fullmatch, lines[:2])):  # killed before it began
        shutil.rmtree(root / STATE_FOLDER / BACKUP)
        return
    move = CloneMove(lines[0], lines[1], is_return=len(lines) > 2)
    lock = root / _git(root, "rev-parse", "--git-path", "index.lock")
    if lock.exists() and time.time() - lock.stat().st_mtime < GIT_SECONDS:
        raise UserError(f"git may be at work in {root} ({lock}). Wait a minute, and start again")
    lock.unlink(missing_ok=True)
    _say("An update of this folder, or a return with back, was interrupted. It is being completed.")
    # files that equal neither commit are the user's own: they are copied before git overwrites them
    user_edits = _list_differing(root, move.before) & _list_differing(root, move.after)
    copies = {name: _find_copy_name(root, name) for name in user_edits if (root / name).is_file()}
    for name, copy_name in copies.items():
        shutil.copy2(root / name, root / copy_name)
    _git(root, "reset", "--quiet", "--hard", move.after)
    _report_saved_copies(copies)
    _complete_move(root, move)


def _list_differing(root: Path, commit: str) -> set[str]:
    """Return the paths of files in the working tree that differ from a commit."""
    return set(_git(root, "diff", "--name-only", "--no-renames", "-z", commit).split("\0")) - {""}


def _read_commits(root: Path) -> UpdateRecord:
    """Return the commits that the last update recorded."""
    path = root / STATE_FOLDER / COMMITS_FILE
    if not path.is_file():
        raise UserError("There is no version to go back to: nothing was updated here")
    commits = path.read_bytes().decode("ascii", "replace").split()
    if len(commits) not in (1, 2) or not all(map(OBJECT.fullmatch, commits)):
        raise UserError(
            f"{path} no longer names the version before the update. To return to one, look for it in git "
            "reflog, and type git reset --keep with its name"
        )
    return UpdateRecord(before=commits[0], after=commits[1] if commits[1:] else None)


def _reject_own_commits(root: Path, record: UpdateRecord) -> None:
    """Raise UserError if the branch has commits that exist only there, or is not the updated branch."""
    if _git(root, "rev-parse", "HEAD") == record.after:  # nothing was committed since the update
        return
    branch = _git(root, "branch", "--show-current")
    location = f"the branch {branch}" if branch else "this folder"
    own_commits = _list_own_commits(root, record, branch)
    if own_commits:
        more = f" and {len(own_commits) - 3} more" if len(own_commits) > 3 else ""
        shown_commits = ", ".join(escape_control_codes(line)[:80] for line in own_commits[:3])
        raise UserError(
            f"back would throw away commits of your own, which only {location} has: {shown_commits}{more}. "
            "Nothing was changed. Type git branch my-work, which keeps them under that name, and run back "
            "again; or leave this branch with git switch for the one that was updated"
        )
    if record.before not in _git(root, "rev-list", "HEAD").splitlines():
        raise UserError(
            f"{location} is not based on the version before the update ({record.before[:9]}). Nothing was "
            "changed. Type git switch with the name of the branch that was updated, and run back again"
        )


def _list_own_commits(root: Path, record: UpdateRecord, branch: str) -> list[str]:
    """Return "HASH SUBJECT" of HEAD's commits that are not in the update, another branch or a tag."""
    excluded = [record.before]
    if record.after is not None:
        excluded.append(record.after)
    if branch:
        excluded.append(f"--exclude={branch}")  # applies to --branches
    excluded += ["--branches", "--remotes", "--tags"]
    return _git(root, "log", "--no-show-signature", "--format=%h %s", "HEAD", "--not", *excluded).splitlines()


def _list_changes(root: Path) -> list[str]:
    return [line[3:] for line in _git(root, "status", "--porcelain", "-uno").splitlines()]


def _reject_changes(root: Path, command: str) -> None:
    changed = _list_changes(root)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"You changed {', '.join(changed[:3])}{more}, which {command} would overwrite. Commit or stash "
            "your changes with git, and run again"
        )


def _git(root: Path, *arguments: str) -> str:
    """Run git in `root`, and return its output without trailing white space."""
    program = shutil.which("git")
    if program is None:
        raise UserError(
            f"{root} is a clone of git, and git is not installed here. Install it (git-scm.com), or download "
            "the zip file of the newer version into a folder of its own"
        )
    # fail instead of asking for a password; messages in English, as OFFLINE expects
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    process = subprocess.run(
        [program, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if process.returncode:
        output = " ".join(process.stderr.split())[:300]
        advice = " Check the connection and run again." if OFFLINE.search(output) else ""
        raise UserError(f"git {arguments[0]} failed, and nothing was changed: {output}{advice}")
    return process.stdout.rstrip()


def _update_from_zip(root: Path, file: Path) -> None:
    """Replace the program's files in `root` with the files in a zip file, after a backup for `back`."""
    unfinished = root / STATE_FOLDER / BACKUP / UNFINISHED
    unpacked = root / STATE_FOLDER / UNPACKED
    had_digests = (root / STATE_FOLDER / DIGESTS_FILE).is_file()
    try:
        unpacked.mkdir(parents=True)
        files = _unpack(file, unpacked)
        change = _plan_update(root, unpacked, files)
        if not change.replaced and not change.added:
            _say(f"{file.name} has the version that is already installed.")
            return
        digests = {name: _digest(unpacked / name) for name in files}
        _save_updater(root)
        _make_backup(root, change)
        _install_files(root, unpacked, digests, change)
        unfinished.unlink()
    except OSError as error:
        state = "back returns to the previous version" if unfinished.exists() else "nothing was changed"
        raise UserError(
            f"{file.name}: the update stopped ({error}). Close the programs that use files of {root}, or "
            f"free some space, and run it again; {state}"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    _report_update(change, had_digests)
    _report_unknown_files(root, files)


def _install_files(root: Path, unpacked: Path, digests: Mapping[str, str], change: FileChange) -> None:
    """Move a new version's files from `unpacked` into `root`, after copying files that the user has edited.

    `digests` contains the digest of each file of the new version, by relative path.
    """
    for name, copy_name in change.edited_copies.items():
        _copy_atomically(root, root / name, copy_name)
    for name in digests:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(unpacked / name, target)
    # remove the old version's files that the new version does not have
    for name in _list_obsolete(root, set(change.replaced) - set(digests), digests):
        (root / name).unlink(missing_ok=True)
    (root / STATE_FOLDER / FILE_LIST).write_text("\n".join(digests), encoding="utf-8")
    _write_digests(root, digests)


def _report_update(change: FileChange, had_digests: bool) -> None:
    """Print what an update has changed. Without digests of the old version, it cannot name edited files."""
    replaced, added = len(change.replaced), len(change.added)
    _say(f"Updated (files replaced: {replaced}, added: {added}). Start Reelsmith again.")
    _report_saved_copies(change.edited_copies)
    if change.replaced and not had_digests:
        _say(
            "It is not known whether you had changed any of these files, because set_up.py never started "
            f"Reelsmith here. Their old versions are in {STATE_FOLDER}/{BACKUP} until the next update."
        )
    _say("back returns to the previous version.")


def _copy_atomically(root: Path, source: Path, name: str) -> None:
    """Copy a file to a path relative to `root`, completely or not at all."""
    part = root / STATE_FOLDER / UNPACKED / "file.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, part)
    replace_file(part, root / name)


def _find_copy_name(root: Path, name: str) -> str:
    """Return an unused name for the copy of a file that the user has edited."""
    names = [f"{name}.yours", *(f"{name}.yours{count}" for count in range(2, MAX_FILES))]
    return next(free for free in names if not os.path.lexists(root / free))


def _report_saved_copies(edited_copies: Mapping[str, str]) -> None:
    for name, copy_name in sorted(edited_copies.items())[:MAX_LISTED]:
        _say(f"You had changed {name}: your version is now {copy_name}.")
    if len(edited_copies) > MAX_LISTED:
        _say(f"You had changed {len(edited_copies) - MAX_LISTED} more: your versions end in .yours.")


def _list_obsolete(root: Path, gone: Iterable[str], files: Iterable[str]) -> Iterator[str]:
    """Yield the files that the new version does not contain, not even in another spelling."""
    # On Windows and macOS, `Docs/a.md` and `docs/a.md` are one file, and so are names with either Unicode
    # form of an accent: removing the old name would remove the new file. If the disk distinguishes such
    # names, the old one is yielded.
    new_names = {fold_name(name): name for name in files}
    for name in gone:
        new_name = new_names.get(fold_name(name))
        if new_name is None or (_is_listed(root, name) and _is_listed(root, new_name)):
            yield name


def _is_listed(root: Path, name: str) -> bool:
    """Return whether each part of a path exists with exactly this spelling."""
    folder = root
    for part in PurePosixPath(name).parts:
        if not folder.is_dir() or part not in os.listdir(folder):
            return False
        folder = folder / part
    return True


# what `zipfile` and its decompressors raise for damaged files
DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    MemoryError,
)


def _unpack(file: Path, folder: Path) -> list[str]:
    """Unpack a zip file with a version of the program into a folder, and return its files' relative paths."""
    try:
        with BoundedFile(file, "rb") as content, zipfile.ZipFile(content) as archive:
            all_entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            by_name = {entry.filename: entry for entry in all_entries}
            if len(by_name) < len(all_entries):
                raise ValueError("it has two files of one name")
            top_folder = _find_program_folder(file, archive, by_name)
            entries = {
                name.removeprefix(top_folder): entry
                for name, entry in by_name.items()
                if name.startswith(top_folder)
            }
            _reject_names(file, entries)
            for name, entry in entries.items():
                _extract(archive, entry, folder / name)
    except DAMAGE_ERRORS as error:
        reason = escape_control_codes(str(error))[:200]
        raise UserError(f"{file.name} is not a complete zip file ({reason}). Download it again") from None
    return sorted(entries)


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write an entry of a zip file to `target`, executable if the entry is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    if entry.external_attr >> 16 & stat.S_IXUSR:  # the upper 16 bits are the Unix mode of the file
        target.chmod(0o755)


def _find_program_folder(path: Path, archive: zipfile.ZipFile, members: Iterable[str]) -> str:
    """Return the path, ending with /, of the version's folder inside a zip file; "" for the top level."""
    tops = [name.removesuffix(PROJECT) for name in members if PurePosixPath(name).name == PROJECT]
    top = min(tops, key=len, default="")
    try:
        with archive.open(f"{top}{PROJECT}") as file:
            text = file.read(MAX_PYPROJECT_BYTES).decode("utf-8")
        project = parse_toml(text).get("project")
    except (KeyError, ValueError):
        project = None
    if not isinstance(project, dict) or project.get("name") != DISTRIBUTION:
        raise UserError(f"{path.name} does not contain Reelsmith")
    return top


def _reject_names(file: Path, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise UserError for a zip file that is too large, or contains paths that no version can have."""
    # `entries` are keyed by their paths below the program's folder.
    if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries.values()) > MAX_BYTES:
        raise UserError(f"{file.name} is larger than any version of Reelsmith. Nothing was changed")
    seen_names: set[str] = set()
    folders: set[str] = set()
    for name, entry in entries.items():
        reason = _find_entry_error(name, entry, seen_names)
        if reason:
            printable_name = escape_control_codes(name).replace("\n", "\\n")[:200]
            raise _make_name_error(file, printable_name, reason)
        seen_names.add(fold_name(name))
        folders.update(parent.as_posix() for parent in PurePosixPath(fold_name(name)).parents)
    clashes = sorted(seen_names & folders)
    if clashes:
        raise _make_name_error(file, clashes[0], "a file and a folder")


def _find_entry_error(name: str, entry: zipfile.ZipInfo, seen_names: Collection[str]) -> str:
    """Return why no version can have this entry; "" if one can. `seen_names` are folded earlier names."""
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link"
    error = _find_name_error(name)
    if not error and fold_name(name) in seen_names:
        return "in two spellings that are the same file on Windows and macOS"
    return error


def _make_name_error(file: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{file.name} has {name} ({reason}), which no version of Reelsmith has. Nothing was changed"
    )


def _find_name_error(name: str) -> str:
    """Return why no file of a version can have this relative path; "" if one can."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or name.startswith("/") or ".." in parts or "\\" in name:
        return "it leads out of the folder"
    if escape_control_codes(name) != name or len(name.splitlines()) != 1 or "\t" in name:
        return "control codes"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        return f"more than {MAX_PATH_BYTES} bytes"
    if fold_name(parts[0]) in USER_FOLDERS or ".git" in map(fold_name, parts) or SHORT_NAME.search(parts[0]):
        return "a folder of yours"
    return next(filter(None, map(find_error_on_windows, parts)), "")


def _plan_update(root: Path, unpacked: Path, files: list[str]) -> FileChange:
    """Return the changes that the new version in `unpacked` would make to the files of `root`."""
    # `files` are the paths of the new version's files, relative to its folder.
    blocked = next((name for name in files if _is_blocked(root, name)), None)
    if blocked is not None:
        raise UserError(
            f"The new version has a file {blocked}, but a folder has its path, or a file has the path of its "
            "folder. Nothing was changed. Rename the existing one, and run the update again"
        )
    existing_files = [name for name in files if (root / name).exists()]
    differing_files = [
        name for name in existing_files if not filecmp.cmp(root / name, unpacked / name, shallow=False)
    ]
    removed_files = [name for name in set(_read_files(root)) - set(files) if (root / name).is_file()]
    replaced = sorted([*differing_files, *removed_files])  # removed files are restored like replaced ones
    added = sorted(set(files) - set(existing_files))
    written = set(replaced) | set(added)
    return FileChange(
        replaced=replaced,
        added=added,
        digests={name: _digest(unpacked / name) for name in files if name in written},
        edited_copies={name: _find_copy_name(root, name) for name in _list_edited(root, replaced)},
    )


def _list_edited(root: Path, names: Iterable[str]) -> list[str]:
    """Return the files that the user has edited; [] if this version's digests are not known."""
    digests = _read_digests(root)
    if not digests:
        return []
    return [name for name in names if digests.get(fold_name(name)) != _digest(root / name)]


def _is_blocked(root: Path, name: str) -> bool:
    """Return whether a file cannot be written: a folder has its path, or a file has its folder's path."""
    folders = [parent for parent in PurePosixPath(name).parents if parent.parts]
    return (root / name).is_dir() or any((root / parent).is_file() for parent in folders)


def _read_files(root: Path) -> list[str]:
    """Return the relative paths of the files that the last update installed; [] if there is no record."""
    note = root / STATE_FOLDER / FILE_LIST
    if not note.is_file():
        return []
    try:
        names = read_text(note, MAX_NOTE_BYTES).split("\n")
    except (OSError, ValueError):
        raise UserError(
            f"{note}, a record of the last update, cannot be read. Delete it, and run the update again: "
            "files that the new version lacks stay"
        ) from None
    return [name for name in names if not _find_name_error(name)]


def _read_digests(root: Path) -> dict[str, str]:
    """Return the digests of the current version's files by case-folded name; {} if they are not known."""
    note = root / STATE_FOLDER / DIGESTS_FILE
    lines = read_text(note, MAX_NOTE_BYTES).split("\n") if note.is_file() else []
    return {fold_name(name): digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_digests(root: Path, digests: Mapping[str, str]) -> None:
    note = root / STATE_FOLDER / DIGESTS_FILE
    note.parent.mkdir(exist_ok=True)
    part = note.with_suffix(".part")
    part.write_text("\n".join(f"{digest}  {name}" for name, digest in digests.items()), encoding="utf-8")
    replace_file(part, note)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2s").hexdigest()


def _make_backup(root: Path, change: FileChange) -> None:
    """Copy the files that an update will replace into a backup, with a list of the update's changes."""
    # The new backup is complete before it replaces the old one.
    state_folder = root / STATE_FOLDER
    backup = state_folder / BACKUP
    partial_backup = state_folder / f"{BACKUP}.part"
    old_backup = state_folder / f"{BACKUP}.old"
    partial_backup.mkdir()
    for name in change.replaced:
        (partial_backup / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, partial_backup / name)
    for name in VERSION_FILES:
        if (state_folder / name).is_file():
            shutil.copy2(state_folder / name, partial_backup / name)
    (partial_backup / UNFINISHED).touch()  # removed after the update has replaced all files
    plan = asdict(change)
    edited_copies = plan.pop("edited_copies")
    if edited_copies:  # older code cannot read a plan that has this key
        plan["beside"] = edited_copies
    (partial_backup / PLAN_FILE).write_text(json.dumps(plan), encoding="utf-8")
    if backup.exists():
        replace_file(backup, old_backup)
    replace_file(partial_backup, backup)
    shutil.rmtree(old_backup, ignore_errors=True)


def _restore_backup(root: Path, is_repair: bool = False) -> None:
    """Undo the last update from a zip file, even an incomplete one. If interrupted, it can be repeated."""
    # With `is_repair`, files that the user has edited since are kept under another name. Otherwise, such
    # files are an error.
    backup = root / STATE_FOLDER / BACKUP
    if not (backup / PLAN_FILE).is_file():
        raise UserError("There is no version to go back to: nothing was updated here")
    change = _read_plan(backup / PLAN_FILE)
    user_edits = _list_user_edits(root, backup, change)
    if not is_repair:
        _reject_user_edits(user_edits)
    try:
        _save_user_edits(root, user_edits)
        (backup / UNFINISHED).touch()
        _restore_files(root, backup, change)
        # renamed first: if the deletion is interrupted, no half backup looks like a whole one
        old = backup.with_name(f"{BACKUP}.old")
        replace_file(backup, old)
        shutil.rmtree(old)
        shutil.rmtree(root / STATE_FOLDER / UNPACKED, ignore_errors=True)
    except OSError as error:
        raise UserError(f"The previous version is not fully restored ({error}). Run back again") from None
    _say(f"The previous version was restored (files: {len(change.replaced)}, removed: {len(change.added)}).")


def _save_user_edits(root: Path, names: Iterable[str]) -> None:
    """Copy files that the user has edited to unused names, and print these names."""
    copies = {name: _find_copy_name(root, name) for name in names if (root / name).is_file()}
    for name, copy_name in copies.items():
        _copy_atomically(root, root / name, copy_name)
    _report_saved_copies(copies)


def _restore_files(root: Path, backup: Path, change: FileChange) -> None:
    """Remove the files that an update added, and restore the files that it replaced from the backup."""
    # added files first: on a case-insensitive disk, one may have the name of a replaced file
    for name in change.added:
        (root / name).unlink(missing_ok=True)
    for name in change.replaced:
        _copy_atomically(root, backup / name, name)
    # the update copied files that the user had edited; now that they are restored, equal copies are needless
    for name, copy_name in change.edited_copies.items():
        copy = root / copy_name
        if copy.is_file() and filecmp.cmp(copy, backup / name, shallow=False):
            copy.unlink()
    for name in VERSION_FILES:
        (root / STATE_FOLDER / name).unlink(missing_ok=True)
        if (backup / name).is_file():
            _copy_atomically(root, backup / name, f"{STATE_FOLDER}/{name}")


def _read_plan(path: Path) -> FileChange:
    """Return the recorded changes of the last update."""
    try:
        plan = parse_json(read_text(path, MAX_NOTE_BYTES))
        edited_copies = plan.pop("beside", {})  # `_make_backup` omits the key if there are none
        change = FileChange(**plan, edited_copies=edited_copies)
        names = [
            *change.replaced,
            *change.added,
            *change.digests,
            *change.edited_copies,
            *change.edited_copies.values(),
        ]
        if any(map(_find_name_error, names)):
            raise ValueError("a name that no version has")
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path}, the record of the last update, cannot be read, and nothing was changed. The files of "
            f"the previous version are in {path.parent}: copy them back by hand"
        ) from None
    return change


def _list_user_edits(root: Path, backup: Path, change: FileChange) -> list[str]:
    """Return the files that the user has edited since the update wrote them."""
    # A file that equals its backup copy is not listed: it is restored already, or the update was stopped
    # before it. Without digests (earlier versions did not record them), the result is empty.
    digests = {fold_name(name): digest for name, digest in change.digests.items()}
    if not digests:
        return []
    edited = []
    for name in [*change.replaced, *change.added]:
        path = root / name
        if not path.is_file() or _digest(path) == digests.get(fold_name(name)):
            continue
        backup_copy = backup / name
        if not backup_copy.is_file() or _digest(backup_copy) != _digest(path):
            edited.append(name)
    return edited


def _reject_user_edits(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"You changed {', '.join(names[:3])}{more} since the update, and the previous version would "
            "replace that. Nothing was changed. Move what you changed to another folder, and run it again"
        )


def _report_unknown_files(root: Path, files: Iterable[str]) -> None:
    """Print the Python files in this version's folders that do not belong to this version."""
    rooms = {PurePosixPath(name).parts[0] for name in files if name.endswith("/__init__.py")}
    ours = set(map(fold_name, files))
    found = sorted(
        path.relative_to(root).as_posix() for room in rooms for path in (root / room).rglob("*.py")
    )
    others = [name for name in found if fold_name(name) not in ours]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        _say(f"Not part of this version, and not removed: {', '.join(others[:5])}{more}.")
        _say("Delete them if they are not yours.")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
