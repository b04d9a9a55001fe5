"""Find the datasets of runs and of folders, and measure them by tools/dataset_report.py, another process."""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser.options import PROJECT_CONFIG
from browser.runs import CONFIG, Glance, Runs
from modules.console import count_of
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.installation import program_environment, program_words
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.text_files import parse_json, parse_toml, read_text, real_path

SETTLED_SECONDS = 2.0  # files are measured again once unchanged for so long: caching writes many
MOST_ENTRIES = 100_000  # of a folder, that are counted
MOST_ERROR = 4000  # characters
TABLES = re.compile(r"(?m)^\s*(\[\[\s*datasets\s*\]\]|datasets\s*=)")
# frames per second, steps of sides and of frames of models, for files of which no run tells the model
MODELS = {
    "Wan": ("16", "16", "4"),
    "Wan2.2 TI2V-5B": ("24", "32", "4"),
    "HunyuanVideo": ("24", "16", "4"),
    "FramePack": ("30", "16", "4"),
    "LTX-2": ("24", "32", "8"),
}
# by what a run calls its model
OF_RUNS = {"hunyuan_video": "HunyuanVideo", "framepack": "FramePack", "ltx2_v1": "LTX-2"}
File = dict[str, Any]  # as `data_tools/report/files.py` lists it


@dataclass(frozen=True)
class FoundDataset:
    """Hold the configuration file of a dataset, and the runs that trained on it."""

    path: Path
    folder: Path  # that relative paths in it begin at
    is_project: bool = False  # the whole folder of the file is open, though only one in it was given
    runs: Sequence[tuple[str, str]] = ()  # id and name of those that trained on it
    model: str = next(iter(MODELS))

    @property
    def id(self) -> str:
        return hashlib.blake2s(os.fsencode(self.path), digest_size=8).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.path.name} in {self.path.parent.name}"

    def places(self) -> list[Path]:
        """Return the existing files and folders that the configuration names.

        Raises OSError or ValueError if it cannot be read.
        """
        return find_places(self.path, self.folder)


def find_places(config: Path, folder: Path) -> list[Path]:
    """Return the existing files and folders that a dataset's configuration names.

    folder: where relative paths begin. Raises OSError or ValueError if the configuration cannot be read.
    """
    text = read_text(config)
    content = parse_toml(text) if config.suffix == CONFIG else parse_json(text)
    places = []
    for one in _texts_in(content):
        begin = re.split(r"[*?\[{]", one)[0]  # of a pattern, the folder that it looks into
        path = folder / begin
        path = path if begin == one else path.parent
        with contextlib.suppress(OSError, ValueError):
            if path.exists():
                places.append(path)
    return list(dict.fromkeys(places))


def choose_folder(config: Path, working_folder: Path) -> Path:
    """Return the folder where relative paths of a configuration begin, of which no run tells.

    That is the configuration's own folder, as `new` writes it, if anything it names exists there, else
    `working_folder`, as for a command typed there.
    """
    with contextlib.suppress(OSError, ValueError):
        if not find_places(config, config.parent) and find_places(config, working_folder):
            return working_folder
    return config.parent


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts_in(value)


@dataclass
class Measured:
    """Hold the results of measuring a dataset, and whether a measurement is running."""

    version: int = 0  # counts measurings; 0: there is none yet
    files: dict[str, File] = field(default_factory=dict)  # those inside the folders, by their id
    outside: int = 0  # number of files outside the folders
    remarks: list[str] = field(default_factory=list)  # those about no single file
    totals: dict[str, int] = field(default_factory=dict)  # faults and remarks, as the report counts them
    error: str = ""
    decodes: bool = False  # whole files were read, not only headers
    model: str = ""
    mark: object = None  # `Datasets.mark` of the files that were measured
    seen: tuple[object, float] = (None, 0.0)  # a newer mark, and since when it is seen
    is_running: bool = False
    began: float = 0.0  # when the current measurement began, in seconds of the monotonic clock
    num_media: int = 0  # files that it finds in the folders of the dataset


@dataclass(frozen=True)
class MediaFiles:
    """Hold what the folders of a dataset have at a glance, before anything is measured."""

    pictures: int = 0
    clips: int = 0
    first: Path | None = None  # by name

    @property
    def total(self) -> int:
        return self.pictures + self.clips

    @property
    def words(self) -> str:
        """Return the counts in words: `5 pictures, 1 clip`."""
        counts = (self.pictures, "picture"), (self.clips, "clip")
        return (
            ", ".join(count_of(*each) for each in counts if each[0]) or "no pictures or clips in its folders"
        )


def look_at_media(dataset: FoundDataset, is_open: Callable[[Path], bool]) -> MediaFiles:
    """Count the pictures and clips in the folders that a dataset names; nothing is opened.

    is_open: whether a folder may be shown. Raises as `FoundDataset.places`.
    """
    pictures, clips = [], []
    for place in dataset.places():
        if not (place.is_dir() and is_open(place)):
            continue
        with os.scandir(place) as entries:
            for entry in itertools.islice(entries, MOST_ENTRIES):
                suffix = Path(entry.name).suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    pictures.append(entry.path)
                elif suffix in VIDEO_SUFFIXES:
                    clips.append(entry.path)
    first = min([*pictures, *clips], default=None)
    return MediaFiles(len(pictures), len(clips), None if first is None else Path(first))


class Datasets:
    """Find the datasets below the folders of some runs, and keep the measurements of each."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.lock = threading.RLock()
        self._found: dict[str, FoundDataset] = {}
        self._measured: dict[str, Measured] = {}
        self._texts: dict[Path, tuple[int, bool]] = {}  # .toml files: when changed, whether of a dataset
        self._one = threading.Semaphore()  # one measurement at a time
        self._processes: set[subprocess.Popen[bytes]] = set()
        atexit.register(self.close)

    def look(self) -> list[FoundDataset]:
        """Return all datasets in the order of their paths: those of runs, and those in the folders."""
        of_runs: dict[tuple[Path, Path], list[tuple[str, str]]] = {}
        models: dict[Path, str] = {}
        projects = self._find_projects()
        for run in self.runs.look():
            typed = dict(run.start.changed if run.start else ()).get("dataset_config")
            if typed:
                folder, path = _locate(typed, run)
                of_runs.setdefault((path, folder), []).append((run.id, run.name))
                models.setdefault(path, OF_RUNS.get(run.model, next(iter(MODELS))))
        found = {
            path: FoundDataset(path, folder, path in projects, named, models[path])
            for (path, folder), named in of_runs.items()
        }
        for config in (*self.runs.configs(), *projects):
            path = real_path(config)
            if path not in found and self._is_dataset(config):
                folder = choose_folder(path, Path.cwd())
                found[path] = FoundDataset(path, folder, path in projects)
        with self.lock:
            self._found = {one.id: one for one in found.values()}
        return sorted(found.values(), key=lambda one: str(one.path))

    def _find_projects(self) -> set[Path]:
        """Return the datasets next to the given folders: `new` writes FOLDER/dataset.toml, and a training of
        it FOLDER/output.
        """
        found: set[Path] = set()
        for folder in self.runs.tops:
            config = folder.parent / PROJECT_CONFIG
            with contextlib.suppress(OSError):
                if config.is_file() and real_path(config) == config:  # no link to elsewhere
                    found.add(config)
        return found

    def is_open(self, dataset: FoundDataset, path: Path) -> bool:
        """Return whether a path that a dataset names exists inside the folders that are shown."""
        if self.runs.is_below(path):
            return True
        if not dataset.is_project:
            return False
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            return path.resolve(strict=True).is_relative_to(dataset.path.parent)
        return False

    def find(self, id: str) -> FoundDataset | None:
        if id not in self._found:
            self.look()
        return self._found.get(id)

    def _is_dataset(self, path: Path) -> bool:
        """Return whether a .toml file has dataset tables; a file is read again only after a change."""
        try:
            changed = path.stat().st_mtime_ns
            if self._texts.get(path, (None, False))[0] != changed:
                self._texts[path] = changed, TABLES.search(read_text(path)) is not None
        except (OSError, ValueError):
            return False
        return self._texts[path][1]

    def outside(self, dataset: FoundDataset) -> list[Path]:
        """Return the folders that are missing on the command line for this dataset to be shown.

        Raises OSError if the configuration does not exist, ValueError if it cannot be read.
        """
        if not (self.is_open(dataset, dataset.path) and dataset.path.is_file()):
            dataset.path.stat()
            return [dataset.path.parent]
        places = [place for place in dataset.places() if not self.is_open(dataset, place)]
        return list(dict.fromkeys(place if place.is_dir() else place.parent for place in places))

    def measure(self, dataset: FoundDataset) -> Measured:
        """Return the measurements of a dataset; repeat them if files have changed. Raises as `outside`."""
        mark = self.mark(dataset)
        with self.lock:
            measured = self._measured.setdefault(dataset.id, Measured(model=dataset.model))
            if measured.seen[0] != mark:
                measured.seen = mark, time.monotonic()
            is_settled = time.monotonic() - measured.seen[1] >= SETTLED_SECONDS or measured.mark is None
            if mark != measured.mark and is_settled:
                self.start(dataset)
            return measured

    def glance(self, dataset: FoundDataset) -> tuple[MediaFiles, str]:
        """Return what a dataset's folders have, and what is known of it in words. Measures nothing."""
        try:
            if self.outside(dataset):
                return MediaFiles(), "partly outside the folders that are shown"
            media = look_at_media(dataset, lambda path: self.is_open(dataset, path))
        except OSError as error:
            return MediaFiles(), f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return MediaFiles(), f"cannot be read: {error}"
        with self.lock:
            measured = self._measured.get(dataset.id)
            if measured is None or not measured.version:
                return media, "not measured yet" if measured is None else "being measured"
            if measured.error:
                return media, "cannot be measured"
            dropped = sum(bool(file["dropped"]) for file in measured.files.values())
            states = [
                state
                for file in measured.files.values()
                for parts in file["caches"].values()
                for state, _ in parts.values()
            ]
            cached = "not cached" if not states else "caches valid" if set(states) == {"valid"} else ""
            return media, ", ".join(
                filter(None, (f"{dropped} dropped" if dropped else "", cached or "caches out of date"))
            )

    def mark(self, dataset: FoundDataset) -> object:
        """Return a value that changes whenever files of a dataset do. Raises as `FoundDataset.places`."""
        found: list[object] = []
        for place in (dataset.path, *dataset.places()):
            with contextlib.suppress(OSError):
                status = place.stat()
                found.append((str(place), status.st_mtime_ns, status.st_size if place.is_file() else 0))
        return found

    def forgive(self, dataset: FoundDataset, before: object) -> None:
        """Keep a dataset's measurements after a caption was saved here. before: the mark before that."""
        with self.lock:
            measured = self._measured.get(dataset.id)
            if measured is not None and measured.mark == before:
                measured.mark = self.mark(dataset)

    def start(self, dataset: FoundDataset, decodes: bool | None = None, model: str | None = None) -> None:
        """Measure a dataset in the background, unless a measurement is running. Raises as `outside`.

        decodes: read whole files. model: one of MODELS. None: as before.
        """
        with self.lock:
            measured = self._measured.setdefault(dataset.id, Measured(model=dataset.model))
            if measured.is_running or self.outside(dataset):
                return
            measured.is_running, measured.mark = True, self.mark(dataset)
            measured.began = time.monotonic()
            measured.num_media = look_at_media(dataset, lambda path: self.is_open(dataset, path)).total
            measured.decodes = measured.decodes if decodes is None else decodes
            measured.model = model or measured.model
            threading.Thread(target=self._run, args=(dataset, measured), daemon=True).start()

    def _run(self, dataset: FoundDataset, measured: Measured) -> None:
        fps, step, frames = MODELS[measured.model]
        options = ["--dataset_config", str(dataset.path), "--fps", fps, "--pixel_step", step]
        options += ["--frame_step", frames]
        options += ["--json", "--files", "--no_download", "--num_workers", "2"]
        options += [] if measured.decodes else ["--no_decode"]
        with self._one:
            try:
                numbers, error = self._report(options, dataset.folder), ""
            except (OSError, ValueError, OptionError) as problem:
                numbers, error = {}, str(problem)
        files, outside = {}, 0
        for file in numbers.get("files", ()):
            _join_paths(file, dataset.folder)
            if all(self.is_open(dataset, Path(part.get("in", part["path"]))) for part in file["parts"][:1]):
                name = f"{file['table']} {file['parts'][0]['path']}"
                id = hashlib.blake2s(os.fsencode(name), digest_size=8).hexdigest()
                path = Path(file["caption_file"] or file["caption_list"])
                if not self.is_open(dataset, path) and (path.exists() or path.is_symlink()):
                    # the caption lies elsewhere: it is left out, and what may quote it
                    told: File = {"text": None, "captions": [], "faults": [], "remarks": []}
                    told["caches"] = {
                        tag: {part: (state, "") for part, (state, _) in states.items()}
                        for tag, states in file["caches"].items()
                    }
                    file |= told
                files[id] = file
            else:
                outside += 1
        remarks = [*numbers.get("faults", ()), *numbers.get("remarks", ())]
        with self.lock:
            measured.files, measured.outside, measured.error = files, outside, error
            measured.remarks = [f"{one['kind']}: {one['text']}" for one in remarks]
            measured.totals = {name: numbers.get(f"num_{name}", 0) for name in ("faults", "remarks")}
            measured.version += 1
            measured.is_running = False

    def _report(self, options: Sequence[str], folder: Path) -> dict[str, Any]:
        """Return the JSON of tools/dataset_report.py. Raises ValueError with its message if it fails."""
        process = subprocess.Popen(
            [sys.executable, *program_words(Path("tools/dataset_report.py")), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=program_environment(PYTHONUTF8="1"),
        )
        self._processes.add(process)
        try:
            said, errors = process.communicate()
        finally:
            self._processes.discard(process)
        if process.returncode:
            text = errors.decode("utf-8", "replace").strip()[-MOST_ERROR:]
            raise ValueError(escape_control_codes(text) or f"it ended with {process.returncode}")
        return dict(json.loads(said))

    def close(self) -> None:
        for process in list(self._processes):
            process.kill()


def _join_paths(file: File, folder: Path) -> None:
    """Make the paths that the report tells of a file absolute. folder: in which the report was made."""
    for part in file["parts"]:
        for name in ("path", "in"):
            if name in part and "://" not in part[name]:
                part[name] = str(folder / part[name])
    for name in ("caption_file", "caption_list"):
        if file[name] and "://" not in file[name]:
            file[name] = str(folder / file[name])


def _locate(typed: str, run: Glance) -> tuple[Path, Path]:
    """Return the working folder of a run, and the path of its --dataset_config.

    The history of an older version does not tell the working folder: the run folder's parents are tried, the
    nearest first. The browser's own working folder is not: its dataset would be taken for that of all runs.
    """
    bases = list(run.history.parent.parents)
    if run.working_folder is not None:
        bases.insert(0, run.working_folder)
    for base in bases:
        with contextlib.suppress(OSError, ValueError):
            if (base / typed).is_file():
                return base, real_path(base / typed)
    return bases[0], bases[0] / typed
