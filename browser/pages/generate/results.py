"""List the results of all days below the roots (images, clips and audio), and remove them."""

import contextlib
import heapq
import operator
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from browser.core.bin_folder import FOLDER as BIN
from browser.core.short_names import short_digest
from browser.runs.recipes import RESULTS
from browser.runs.runs import Runs
from modules.media.layers import COMPOSITE, LAYER
from modules.run_limits import QUEUE_FOLDER

KINDS = {".png": "picture", ".mp4": "clip", ".mkv": "clip", ".wav": "sound"}  # kind of media by suffix
MAX_DEPTH = 8  # folders below a root
MAX_FOLDERS = 50_000  # maximum number of folders searched
MAX_RESULTS = 20_000  # only the newest ones are kept
# folders that are not searched
SKIPPED_FOLDERS = {"sample", "cache", "compare", "node_modules", QUEUE_FOLDER, BIN}
UPSCALED_SUFFIX = "_larger"  # suffix of an upscaled file's name
LAST_FRAME_SUFFIX = "_last"  # suffix used by --save_last_frame
LAYER_NAME = re.compile(rf"(.+){LAYER.format('([0-9]{1,3})')}")
DERIVED_NAME = re.compile(rf"(.+?)(?:{UPSCALED_SUFFIX}|{LAST_FRAME_SUFFIX})(?:-\d+)?")
FRESH_SECONDS = 2.0  # a folder that changed so recently may change again without a new time


@dataclass(frozen=True)
class Result:
    """A generated image, clip or audio file."""

    path: Path
    changed: float  # when, in seconds since 1970
    size_bytes: int
    shown_at: float = 0.0  # time for sorting: the time of the file it was derived from
    layers: tuple[Path, ...] = ()  # the whole image first, then its layers from back to front

    @cached_property
    def id(self) -> str:
        """Short digest of the path; identifies the result in URLs."""
        return short_digest(self.path)

    @property
    def address(self) -> str:
        """URL of the file."""
        return f"/result/{self.id}{self.path.suffix.lower()}"

    @property
    def kind(self) -> str:
        """Kind of media, by the suffix: image, clip or sound."""
        return KINDS[self.path.suffix.lower()]


class _ListedFolder(NamedTuple):
    """Content of a folder when it was last listed."""

    changed: int  # change time in nanoseconds
    subfolders: Sequence[Path]
    results: Sequence[Result]
    entries: "Mapping[str, _ListedFile]"  # files of the folder, by name


class ResultFolders:
    """Finds the results below the roots. A folder that has not changed is not listed again."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._folders: dict[Path, _ListedFolder] = {}
        self._contents: list[Sequence[Result]] = []  # content of each folder when `_newest` was computed
        self._newest: list[Result] = []
        self._by_id: dict[str, Result] = {}

    def list_all(self) -> Sequence[Result]:
        """Return the newest results in folders named `generated`, the newest first."""
        folders: dict[Path, _ListedFolder] = {}
        for top in dict.fromkeys(self.runs.root_folders):
            self._walk(top, MAX_DEPTH, folders)
        contents = [folder.results for folder in folders.values() if folder.results]
        are_equal = len(contents) == len(self._contents) and all(map(operator.is_, contents, self._contents))
        self._folders = folders
        if not are_equal:
            every = (result for results in contents for result in results)
            self._newest = heapq.nsmallest(MAX_RESULTS, every, key=_order_result)
            self._by_id = {result.id: result for result in self._newest}
            self._contents = contents
        return self._newest

    def find(self, id: str) -> Result | None:
        """Return the result with this id in its current state; None if there is none below the roots."""
        if id not in self._by_id:
            self.list_all()
        result = self._by_id.get(id)
        if result is None or result.path.is_symlink() or not self.runs.is_inside(result.path):
            return None
        try:
            status = result.path.stat()
        except OSError:
            return None
        return replace(result, changed=status.st_mtime, size_bytes=status.st_size)

    def _walk(self, folder: Path, depth: int, folders: dict[Path, _ListedFolder]) -> None:
        """Collect a folder and its subfolders into `folders`, without following links."""
        if folder in folders or len(folders) >= MAX_FOLDERS:
            return
        try:
            changed = folder.stat().st_mtime_ns
            content = self._folders.get(folder)
            if content is None or content.changed != changed:
                content = _list_folder(folder, changed, {} if content is None else content.entries)
        except OSError:
            return
        folders[folder] = content
        for subfolders in content.subfolders if depth else ():
            self._walk(subfolders, depth - 1, folders)


def _order_result(result: Result) -> tuple[float, str, str]:
    return -result.shown_at, result.path.name, str(result.path)


class _ListedFile(NamedTuple):
    """A generated image, clip or sound in a folder, as it was last listed."""

    changed: float
    name: str
    size_bytes: int
    number: int  # inode number, which differs after the file has been replaced


def _list_folder(folder: Path, changed: int, previous: Mapping[str, _ListedFile]) -> _ListedFolder:
    """Return the subfolders and generated files of a folder. Raises OSError if it cannot be listed."""
    # `changed` is its modification time (ns) before the listing; `previous` are the last listing's files.
    subfolders = []
    files: dict[str, _ListedFile] = {}
    is_results_folder = folder.name == RESULTS  # files in other folders are not results
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                continue
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(folder / entry.name)
            elif is_results_folder:
                file = _read_entry(entry, previous.get(entry.name))
                if file is not None:
                    files[entry.name] = file
    # a later change within the same clock tick would not change the modification time, so a folder that has
    # just changed is listed again by the next request: its recorded time, -1, equals no time
    has_just_changed = time.time() - changed / 1e9 < FRESH_SECONDS
    results = _make_results(folder, heapq.nlargest(MAX_RESULTS, files.values()))
    return _ListedFolder(-1 if has_just_changed else changed, sorted(subfolders), results, entries=files)


def _read_entry(entry: "os.DirEntry[str]", previous: _ListedFile | None) -> _ListedFile | None:
    """Return the entry as a generated file; None for other files. `previous` is its last listing."""
    stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (a path takes ten times as long)
    if suffix.lower() not in KINDS or stem.startswith("latent_preview") or stem.endswith("_progress"):
        return None
    if os.name != "nt" and previous is not None and previous.number == entry.inode():
        return previous
    with contextlib.suppress(OSError):
        if entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            return _ListedFile(status.st_mtime, entry.name, size_bytes=status.st_size, number=entry.inode())
    return None


def _make_results(folder: Path, files: Sequence[_ListedFile]) -> list[Result]:
    """Return the generated files in a folder."""
    # A file derived from another one gets the time of its source, to be listed next to it. The last frame
    # written next to a clip is omitted, and so are layers next to the image that shows them all.
    times_by_stem = {_split_name(file)[0]: file.changed for file in files}
    layers_by_stem = _group_layers(folder, times_by_stem)
    layer_stems = {layer.stem for layers in layers_by_stem.values() for layer in layers}
    # images that generation may write next to clips
    names = map(_split_name, files)
    last_frame_names = {f"{stem}{LAST_FRAME_SUFFIX}.png" for stem, suffix in names if KINDS[suffix] == "clip"}
    results = []
    for file in files:
        stem, suffix = _split_name(file)
        if stem in layer_stems or f"{stem}{suffix}" in last_frame_names:
            continue
        source_time = _find_source_time(stem, times_by_stem)
        result = Result(
            folder / file.name,
            file.changed,
            file.size_bytes,
            shown_at=file.changed if source_time is None else source_time,
            layers=layers_by_stem.get(stem, ()),
        )
        results.append(result)
    return results


def _split_name(file: _ListedFile) -> tuple[str, str]:
    """Return the name of a file without its suffix, and the suffix in lower case."""
    stem, suffix = os.path.splitext(file.name)  # noqa: PTH122 (a path takes ten times as long)
    return stem, suffix.lower()


def _find_source_time(stem: str, times: Mapping[str, float]) -> float | None:
    """Return the time of the file from which an upscaled image or a last frame was made; None without one."""
    # `times` are the modification times of the folder's files, by name without suffix.
    if UPSCALED_SUFFIX not in stem and LAST_FRAME_SUFFIX not in stem:
        return None  # the pattern is slow, and folders may contain many files
    match = DERIVED_NAME.fullmatch(stem)
    return None if match is None else times.get(match[1])


def _group_layers(folder: Path, stems: Collection[str]) -> dict[str, tuple[Path, ...]]:
    """Return the layers of each image that has some, back to front, by the image's name without suffix."""
    numbered: dict[str, dict[int, Path]] = {}
    for stem in stems:
        match = LAYER_NAME.fullmatch(stem)
        if match is not None and f"{match[1]}{COMPOSITE}" in stems:
            numbered.setdefault(f"{match[1]}{COMPOSITE}", {})[int(match[2])] = folder / f"{stem}.png"
    return {stem: tuple(layers[index] for index in sorted(layers)) for stem, layers in numbered.items()}
