"""Update a checkout to a newer version, from git or from a zip file.

A clone of git is fast-forwarded, or refused with what to do. A zip file is unpacked into a new folder beside
the old one, in which nothing changes. Standard library only.
"""

import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from modules.control_codes import escape_control_codes
from modules.errors import UserError
from modules.file_locks import only_one
from modules.installation import DISTRIBUTION
from modules.open_files import replace_file
from modules.output_files import find_error_on_windows, fold_name
from modules.text_files import parse_toml
from modules.zip_files import BoundedFile

PROJECT = "pyproject.toml"
STATE_FOLDER = ".reelsmith"  # folder of all files that this module writes for itself
UNPACKED = "new"  # in it: the files of a zip file, until all are there
LOCK = "update.lock"
# what a start makes anew in each folder, so that nobody needs to take it along
MADE_ANEW = frozenset({".venv", STATE_FOLDER, "__pycache__"})
MAX_FILES, MAX_BYTES = 50_000, 2 << 30
MAX_PYPROJECT_BYTES = 1 << 17  # bytes of pyproject.toml; a TOML reader takes quadratic time for some inputs
MAX_PATH_BYTES = 1000  # bytes of a file's path
MAX_LISTED = 8  # names of the user's files in a line
OFFLINE = re.compile(
    r"could not resolve|unable to access|could not read from remote|connection|timed out", re.I
)


def update(root: Path, file: Path | None) -> None:
    """Update the checkout in `root` with git or, if `file` is given, unpack that zip file beside it.

    Raises:
        UserError: If the update fails. Then nothing has changed.
    """
    is_clone = (root / ".git").exists()
    if is_clone and file is not None:
        raise UserError(f"{root} is a clone of git. Type update without a file")
    if is_clone:
        _update_clone(root)
        return
    if file is None:
        raise UserError(
            f"{root} is not a clone of git. Download the zip file of the newer version, and type update with "
            "its path (on Windows you can drop it on Reelsmith.bat)"
        )
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    _unpack_beside(root, file)


def _update_clone(root: Path) -> None:
    """Move the clone's branch to the newest commit that it follows, if that drops nothing."""
    changed = [line[3:] for line in _git(root, "status", "--porcelain", "-uno").splitlines()]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{', '.join(changed[:3])}{more} changed here, by you or by an interrupted update. "
            "Commit or stash the changes with git (git restore . drops them), and run again"
        )
    before = _git(root, "rev-parse", "HEAD")
    _git(root, "fetch", "--quiet")
    after = _git(root, "rev-parse", "@{upstream}")
    count = _git(root, "rev-list", "--count", f"{before}..{after}")
    if count == "0":
        _say("This is the newest version.")
        return
    own_count = _git(root, "rev-list", "--count", f"{after}..{before}")
    if own_count != "0":
        raise UserError(
            f"This branch has commits of its own ({own_count}), so it cannot be moved forward, and nothing "
            "was changed. Type git rebase @{upstream} to put them on the newest version, or git switch to a "
            "branch without them, and run again"
        )
    # by default, git overwrites files that it ignores, such as models
    _git(root, "merge", "--quiet", "--ff-only", "--no-overwrite-ignore", after)
    changes = f"{count} change{'s' if count != '1' else ''}"
    _say(f"Updated by {changes}, from {before[:9]} to {after[:9]}. Start Reelsmith again.")
    _say(f"git reset --keep {before[:9]} returns to the previous version.")


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


def _unpack_beside(root: Path, file: Path) -> None:
    """Unpack a zip file into a new folder beside `root`, and say what to take along."""
    unpacked = root / STATE_FOLDER / UNPACKED
    try:
        (root / STATE_FOLDER).mkdir(exist_ok=True)
        with only_one(root / STATE_FOLDER / LOCK, waits=False):
            shutil.rmtree(unpacked, ignore_errors=True)  # an update before this one was killed
            unpacked.mkdir()
            try:
                files = _unpack(file, unpacked)
                folder = _find_free_folder(root.parent / file.stem)
                replace_file(unpacked, folder)
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)
    except BlockingIOError:
        raise UserError(f"An update of {root} is running. Wait until it has ended, and start again") from None
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be unpacked beside {root} ({error}), and nothing was changed. Free some "
            "space, or unpack it into a new folder yourself"
        ) from None
    _say(f"The new version is in {folder}. Nothing in {root} has changed.")
    theirs = {fold_name(PurePosixPath(name).parts[0]) for name in files} | MADE_ANEW
    own = sorted(escape_control_codes(name) for name in os.listdir(root) if fold_name(name) not in theirs)
    more = f" and {len(own) - MAX_LISTED} more" if len(own) > MAX_LISTED else ""
    listed = f". The new version lacks: {', '.join(own[:MAX_LISTED])}{more}" if own else ""
    _say(f"Move what is yours there, such as models, runs and settings, and start it{listed}")


def _find_free_folder(wanted: Path) -> Path:
    """Return the path, with a number appended if something has its name."""
    names = [wanted.name, *(f"{wanted.name}-{count}" for count in range(2, MAX_FILES))]
    return next(path for path in map(wanted.with_name, names) if not os.path.lexists(path))


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
    return next(filter(None, map(find_error_on_windows, parts)), "")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
