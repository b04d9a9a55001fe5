"""Find the datasets of runs and of folders; measure them with tools/dataset_report.py in another process."""

import atexit
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser.options import PROJECT_CONFIG
from browser.runs import CONFIG, Runs, RunSummary
from browser.short_names import short_digest
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.installation import program_environment, program_words
from modules.media.labels import label_of
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.pages.language import join, say, say_count
from modules.paths import is_on_foreign_share
from modules.text_files import parse_json, parse_toml, read_text, real_path
from project.options import find_models
from protocols.families import caption_formats, with_scripts

SETTLED_SECONDS = 2.0  # files are measured again once unchanged for so long: caching writes many
MAX_ENTRIES = 100_000  # maximum number of counted entries of a folder
# dataset keys that name folders of accompanying files, such as mask_directory
BESIDE = re.compile(r"(?!image_|video_|audio_)\w+_(directory|dir)")
MAX_ERROR = 4000  # characters
TABLES = re.compile(r"(?m)^[ \t]*(\[\[\s*datasets\s*\]\]|datasets\s*=)")
# frame rate, and step of sides and frame counts, by model; used if no run tells the dataset's model
MODELS = {
    "Wan": ("16", "16", "4"),
    "Wan2.2 TI2V-5B": ("24", "32", "4"),
    "HunyuanVideo": ("24", "16", "4"),
    "FramePack": ("30", "16", "4"),
    "LTX-2": ("24", "32", "8"),
    "MiniMax-H3": ("24", "32", "17"),
    "models of pictures": ("24", "16", "1"),
}
IMAGES = "models of pictures"
# keyed by the model's name in the history of a run
OF_RUNS = {
    "hunyuan_video": "HunyuanVideo",
    "framepack": "FramePack",
    "ltx2_v1": "LTX-2",
    "minimax_h3": "MiniMax-H3",
}


@functools.cache
def image_families() -> frozenset[str]:
    """Return the families that generate images only, by the names that runs use."""
    families = {f"{entry.training_script}.py": name for name, entry in with_scripts().items()}
    frames: dict[str, int] = {}
    for model in find_models():
        for word in shlex.split(model.commands["train"]):
            if word in families:
                name = families[word]
                frames[name] = max(frames.get(name, 1), model.properties["frames"])
    return frozenset(name for name, maximum in frames.items() if maximum == 1)


File = dict[str, Any]  # as `data_tools/report/files.py` lists it


@dataclass(frozen=True)
class FoundDataset:
    """The configuration file of a dataset, and the runs that trained on it."""

    path: Path
    folder: Path  # that relative paths in it begin at
    is_project: bool = False  # the whole project folder may be shown, not only its output folder
    runs: Sequence[tuple[str, str]] = ()  # id and name of each run that trained on it
    model: str = next(iter(MODELS))
    caption_format: str = ""  # the family of a run whose captions are JSON objects

    @property
    def id(self) -> str:
        """Short digest of the configuration's path; identifies the dataset in addresses."""
        return short_digest(self.path)

    @property
    def name(self) -> str:
        """Name of the configuration file and its folder, in the language of the page."""
        return say("%(name)s in %(name2)s", name=self.path.name, name2=self.path.parent.name)

    def named_paths(self) -> list[Path]:
        """Return the existing files and folders that the configuration names.

        Raises:
            OSError: If the configuration cannot be read.
            ValueError: If it is not valid TOML.
        """
        return list_named_paths(self.path, self.folder)


def list_named_paths(config: Path, folder: Path, with_companions: bool = True) -> list[Path]:
    """Return the existing files and folders that a dataset's configuration names.

    Args:
        config: Path of the configuration.
        folder: Folder that relative paths refer to.
        with_companions: Include folders of masks, control images, references and caches, which lie next to
            the media.

    Raises:
        OSError: If the configuration cannot be read.
        ValueError: If it is not valid TOML.
    """
    text = read_text(config)
    content = parse_toml(text) if config.suffix == CONFIG else parse_json(text)
    paths = []
    for text in _list_texts(content, with_companions):
        begin = re.split(r"[*?\[{]", text)[0]  # of a glob pattern, the folder before the first wildcard
        path = folder / begin
        if begin != text:
            path = path.parent
        if is_on_foreign_share(path, folder):
            continue
        with contextlib.suppress(OSError, ValueError):
            if path.exists():
                paths.append(path)
    return list(dict.fromkeys(paths))


def select_folder(config: Path, working_folder: Path) -> Path:
    """Return the folder that a configuration's relative paths refer to if no run has used the configuration.

    It is the configuration's own folder, as `new` writes it, if a path named in the configuration exists
    there; otherwise it is `working_folder`, as for a command typed there.
    """
    with contextlib.suppress(OSError, ValueError):
        if not list_named_paths(config, config.parent) and list_named_paths(config, working_folder):
            return working_folder
    return config.parent


def _list_texts(content: Any, with_companions: bool) -> Iterator[str]:
    """Yield all strings in nested JSON; `with_companions` includes those for masks, caches and so on."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, entry in content.items():
            if with_companions or not BESIDE.fullmatch(key):
                yield from _list_texts(entry, with_companions)
    elif isinstance(content, list):
        for entry in content:
            yield from _list_texts(entry, with_companions)


@dataclass
class Measured:
    """Results of measuring a dataset, and the state of the measurement that is running."""

    version: int = 0  # number of finished measurements; 0 while the first one is running
    files: dict[str, File] = field(default_factory=dict)  # files inside the shown folders, by id
    outside: int = 0  # number of files outside the folders
    remarks: list[str] = field(default_factory=list)  # remarks that are not about a single file
    totals: dict[str, int] = field(default_factory=dict)  # faults and remarks, as the report counts them
    error: str = ""
    decodes: bool = False  # whole files were read, not only headers
    model: str = ""
    mark: object = None  # `Datasets.mark` of the files that were measured
    newer_mark: object = None  # mark of the files if they have changed since
    newer_since: float = 0.0  # when they had this mark first, in seconds of the monotonic clock
    is_running: bool = False
    began: float = 0.0  # when the current measurement began, in seconds of the monotonic clock
    num_media: int = 0  # number of media found in the dataset's folders


@dataclass(frozen=True)
class MediaFiles:
    """Numbers of media in a dataset's folders, counted by file name without opening the files."""

    pictures: int = 0
    clips: int = 0
    audios: int = 0
    first: Path | None = None  # first image or clip by name

    @property
    def total(self) -> int:
        """Number of images, clips and audio files together."""
        return self.pictures + self.clips + self.audios

    @property
    def words(self) -> str:
        """The counts as a text such as `5 pictures, 1 clip`."""
        counts = []
        if self.pictures:
            counts.append(say_count(self.pictures, "%(n)s picture", "%(n)s pictures"))
        if self.clips:
            counts.append(say_count(self.clips, "%(n)s clip", "%(n)s clips"))
        if self.audios:
            counts.append(say_count(self.audios, "%(n)s sound", "%(n)s sounds"))
        return join(", ", counts) or say("no pictures or clips in its folders")


def count_media(dataset: FoundDataset, is_open: Callable[[Path], bool]) -> MediaFiles:
    """Count the media in a dataset's folders by their names; no file is opened.

    Control images, references and masks are not counted: they belong to the media that they go with.

    Args:
        dataset: The dataset.
        is_open: Returns whether a folder may be shown.

    Raises:
        OSError: If the configuration cannot be read.
        ValueError: If the configuration is not valid TOML.
    """
    images: list[str] = []
    clips: list[str] = []
    audios = 0
    for folder in list_named_paths(dataset.path, dataset.folder, with_companions=False):
        if not (folder.is_dir() and is_open(folder)):
            continue
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, MAX_ENTRIES):
                path = Path(entry.name)
                suffix = path.suffix.lower()
                if label_of(path.stem) is not None:  # named as a companion of a clip, such as clip_mask.png
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images.append(entry.path)
                elif suffix in VIDEO_SUFFIXES:
                    clips.append(entry.path)
                elif suffix in AUDIO_SUFFIXES:
                    audios += 1
    first = min([*images, *clips], default=None)
    return MediaFiles(len(images), len(clips), audios, None if first is None else Path(first))


class Datasets:
    """Finds the datasets below the roots of some runs, and caches the measurements of each dataset."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.lock = threading.RLock()
        self._found: dict[str, FoundDataset] = {}
        self._measured: dict[str, Measured] = {}
        self._texts: dict[Path, tuple[int, bool]] = {}  # by .toml file: change time, is a dataset
        self._measuring = threading.Semaphore()  # one measurement at a time
        self._processes: set[subprocess.Popen[bytes]] = set()
        atexit.register(self.close)

    def list_all(self) -> list[FoundDataset]:
        """Return all datasets, of runs and of folders, sorted by path."""
        projects = self._find_projects()
        datasets = self._find_run_datasets(projects)
        for config in (*self.runs.configs(), *projects):
            path = real_path(config)
            if path not in datasets and self._is_dataset(config):
                folder = select_folder(path, Path.cwd())
                datasets[path] = FoundDataset(path, folder, is_project=path in projects)
        with self.lock:
            self._found = {dataset.id: dataset for dataset in datasets.values()}
        return sorted(datasets.values(), key=lambda dataset: str(dataset.path))

    def _find_run_datasets(self, projects: Collection[Path]) -> dict[Path, FoundDataset]:
        """Return the datasets that runs trained on, by the path of their configuration.

        `projects` are the configurations of described folders.
        """
        runs: dict[tuple[Path, Path], list[tuple[str, str]]] = {}  # by configuration and working folder
        models: dict[Path, str] = {}
        formats: dict[Path, str] = {}
        for run in self.runs.list_all():
            changed = run.start.changed if run.start else ()
            typed_config = dict(changed).get("dataset_config")
            if typed_config:
                folder, path = _locate(typed_config, run)
                runs.setdefault((path, folder), []).append((run.id, run.name))
                # the key of MODELS for which the dataset is measured
                default_model = IMAGES if run.model in image_families() else next(iter(MODELS))
                models.setdefault(path, OF_RUNS.get(run.model, default_model))
                if run.model in caption_formats():
                    formats[path] = run.model
        datasets = {}
        for (path, folder), names in runs.items():
            datasets[path] = FoundDataset(
                path,
                folder,
                is_project=path in projects,
                runs=names,
                model=models[path],
                caption_format=formats.get(path, ""),
            )
        return datasets

    def _find_projects(self) -> set[Path]:
        """Return the dataset files next to the given folders.

        `new` writes FOLDER/dataset.toml, and a training run of that folder saves into FOLDER/output.
        """
        configs: set[Path] = set()
        for folder in self.runs.tops:
            config = folder.parent / PROJECT_CONFIG
            with contextlib.suppress(OSError):
                if config.is_file() and real_path(config) == config:  # not a link
                    configs.add(config)
        return configs

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
        """Return the dataset with this id; None if there is none."""
        if id not in self._found:
            self.list_all()
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

    def list_outside(self, dataset: FoundDataset) -> list[Path]:
        """Return the folders that have to be added to the command line before this dataset can be shown.

        Raises:
            OSError: If the configuration does not exist.
            ValueError: If the configuration cannot be read.
        """
        if not (self.is_open(dataset, dataset.path) and dataset.path.is_file()):
            dataset.path.stat()
            return [dataset.path.parent]
        paths = [path for path in dataset.named_paths() if not self.is_open(dataset, path)]
        return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))

    def measure(self, dataset: FoundDataset) -> Measured:
        """Return the measurements of a dataset; start a new one if its files have changed.

        Raises OSError or ValueError if the configuration cannot be read.
        """
        mark = self.mark(dataset)
        with self.lock:
            measured = self._measured.setdefault(dataset.id, Measured(model=dataset.model))
            if measured.newer_mark != mark:
                measured.newer_mark = mark
                measured.newer_since = time.monotonic()
            settled_seconds = time.monotonic() - measured.newer_since
            # files that are still being copied keep changing the mark: wait until it is stable
            # no mark: it was never measured, so it is measured at once
            is_settled = settled_seconds >= SETTLED_SECONDS or measured.mark is None
            if mark != measured.mark and is_settled:
                self.start(dataset)
            return measured

    def describe(self, dataset: FoundDataset) -> tuple[MediaFiles, str]:
        """Return the number of media in a dataset's folders, and in words the state of its measurement."""
        try:
            if self.list_outside(dataset):
                return MediaFiles(), say("partly outside the folders that are shown")
            media = count_media(dataset, lambda path: self.is_open(dataset, path))
        except OSError as error:
            return MediaFiles(), f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return MediaFiles(), f"cannot be read: {error}"
        with self.lock:
            return media, _describe_measured(self._measured.get(dataset.id))

    def mark(self, dataset: FoundDataset) -> object:
        """Return a value that changes with the dataset's files. Raises OSError or ValueError."""
        marks: list[object] = []
        for path in (dataset.path, *dataset.named_paths()):
            with contextlib.suppress(OSError):
                status = path.stat()
                size = status.st_size if path.is_file() else 0
                marks.append((str(path), status.st_mtime_ns, size))
        return marks

    def accept_edit(self, dataset: FoundDataset, before: object) -> None:
        """Keep a dataset's measurements valid after this server has saved one of its captions.

        `before` is the fingerprint of the dataset's files before the save, which `mark` returned. If other
        files have changed as well, the dataset is measured again.
        """
        with self.lock:
            measured = self._measured.get(dataset.id)
            if measured is not None and measured.mark == before:
                measured.mark = self.mark(dataset)

    def start(self, dataset: FoundDataset, decodes: bool | None = None, model: str | None = None) -> None:
        """Measure a dataset in the background, unless a measurement is running.

        Args:
            dataset: The dataset.
            decodes: Read whole files instead of headers; None: as in the last measurement.
            model: Key of MODELS; None: as in the last measurement.

        Raises:
            OSError: If the configuration does not exist.
            ValueError: If the configuration cannot be read.
        """
        with self.lock:
            measured = self._measured.setdefault(dataset.id, Measured(model=dataset.model))
            if measured.is_running or self.list_outside(dataset):
                return
            measured.is_running = True
            measured.mark = self.mark(dataset)
            measured.began = time.monotonic()
            measured.num_media = count_media(dataset, lambda path: self.is_open(dataset, path)).total
            if decodes is not None:
                measured.decodes = decodes
            measured.model = model or measured.model
            threading.Thread(target=self._run_measurement, args=(dataset, measured), daemon=True).start()

    def _run_measurement(self, dataset: FoundDataset, measured: Measured) -> None:
        """Measure a dataset's files, and store what may be shown of the report in `measured`."""
        options = _report_options(dataset, measured)
        report: dict[str, Any] = {}
        error = ""
        with self._measuring:  # one measurement at a time
            try:
                report = self._report(options, dataset.folder)
            except (OSError, ValueError, OptionError) as problem:
                error = str(problem)
        # leave out files outside the roots, and the captions of files whose caption is outside
        all_files = list(report.get("files", ()))
        for file in all_files:
            _join_paths(file, dataset.folder)
        files = [file for file in all_files if self._is_file_open(dataset, file)]
        for file in files:
            if not self._is_caption_open(dataset, file):
                _leave_out_caption(file)
        remarks = [*report.get("faults", ()), *report.get("remarks", ())]
        with self.lock:
            measured.files = {_identify(file): file for file in files}
            measured.outside = len(all_files) - len(files)
            measured.error = error
            measured.remarks = [f"{remark['kind']}: {remark['text']}" for remark in remarks]
            measured.totals = {name: report.get(f"num_{name}", 0) for name in ("faults", "remarks")}
            measured.version += 1
            measured.is_running = False

    def _is_file_open(self, dataset: FoundDataset, file: File) -> bool:
        first_part = file["parts"][0]
        return self.is_open(dataset, Path(first_part.get("in", first_part["path"])))

    def _is_caption_open(self, dataset: FoundDataset, file: File) -> bool:
        """Return whether a caption may be shown: it lies inside the shown folders, or does not exist."""
        path = Path(file["caption_file"] or file["caption_list"])
        return self.is_open(dataset, path) or not (path.exists() or path.is_symlink())

    def _report(self, options: Sequence[str], folder: Path) -> dict[str, Any]:
        """Run tools/dataset_report.py in `folder`, and return its JSON report.

        Raises ValueError with its message if it fails.
        """
        process = subprocess.Popen(
            [sys.executable, *program_words(Path("tools/dataset_report.py")), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=program_environment(PYTHONUTF8="1"),
        )
        self._processes.add(process)  # these are killed when the server ends
        try:
            output, errors = process.communicate()
        finally:
            self._processes.discard(process)
        if process.returncode:
            text = errors.decode("utf-8", "replace").strip()[-MAX_ERROR:]
            raise ValueError(
                escape_control_codes(text)
                or say("it ended with %(returncode)s", returncode=process.returncode)
            )
        return dict(json.loads(output))

    def close(self) -> None:
        """Kill the running measurements."""
        for process in list(self._processes):
            process.kill()


def _describe_measured(measured: Measured | None) -> str:
    """Describe the state of a dataset's measurement. The caller holds the lock of `Datasets`."""
    if measured is None:
        return say("not measured yet")
    if not measured.version:  # the first measurement is running
        return say("being measured")
    if measured.error:
        return say("cannot be measured")
    info = []
    dropped = sum(bool(file["dropped"]) for file in measured.files.values())
    if dropped:
        info.append(say("%(dropped)s dropped", dropped=dropped))
    states = set()  # states of all caches, such as "valid"
    for file in measured.files.values():
        for parts in file["caches"].values():
            states |= {state for state, _ in parts.values()}
    if not states:
        info.append(say("not cached"))
    elif states == {"valid"}:
        info.append(say("caches valid"))
    else:
        info.append(say("caches out of date"))
    return join(", ", info)


def _report_options(dataset: FoundDataset, measured: Measured) -> list[str]:
    """Return the options of tools/dataset_report.py that measure a dataset."""
    fps, pixel_step, frame_step = MODELS[measured.model]
    options = ["--dataset_config", str(dataset.path), "--fps", fps, "--pixel_step", pixel_step]
    options += ["--frame_step", frame_step]
    options += ["--json", "--files", "--no_download", "--num_workers", "2"]
    if not measured.decodes:
        options.append("--no_decode")
    return options


def _identify(file: File) -> str:
    """Return the id of a file in its dataset."""
    return short_digest(f"{file['table']} {file['parts'][0]['path']}")


def _leave_out_caption(file: File) -> None:
    """Remove a file's caption, and the messages that may quote it, from the report."""
    file |= {"text": None, "captions": [], "faults": [], "remarks": []}
    for states in file["caches"].values():
        for part, (state, _) in states.items():
            states[part] = (state, "")


def _join_paths(file: File, folder: Path) -> None:
    """Make the paths in a file's report absolute. `folder` is the working folder of the report."""
    for part in file["parts"]:
        for name in ("path", "in"):
            if name in part and "://" not in part[name]:
                part[name] = str(folder / part[name])
    for name in ("caption_file", "caption_list"):
        if file[name] and "://" not in file[name]:
            file[name] = str(folder / file[name])


def _locate(typed: str, run: RunSummary) -> tuple[Path, Path]:
    """Return the working folder of a run, and the path of its --dataset_config.

    The history of an older version does not have the working folder: the run folder's parents are tried, the
    nearest first. The browser's own working folder is not tried: its dataset would be attributed to every
    run.
    """
    bases = list(run.history.parent.parents)
    if run.working_folder is not None:
        bases.insert(0, run.working_folder)
    for base in bases:
        with contextlib.suppress(OSError, ValueError):
            if (base / typed).is_file():
                return base, real_path(base / typed)
    return bases[0], bases[0] / typed
