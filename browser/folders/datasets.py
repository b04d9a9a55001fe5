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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from browser.core.options import PROJECT_CONFIG
from browser.core.short_names import short_digest
from browser.runs.runs import CONFIG, Runs, RunSummary
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.installation import program_environment, program_words
from modules.media.labels import find_stem_label
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
COMPANION_KEY = re.compile(r"(?!image_|video_|audio_)\w+_(directory|dir)")
MAX_ERROR = 4000  # characters
DATASET_TABLE = re.compile(r"(?m)^[ \t]*(\[\[\s*datasets\s*\]\]|datasets\s*=)")
IMAGE_MODELS = "models of images"
# by what their sides are multiples of, in pixels
IMAGE_MODELS_BY_STEP = {16: IMAGE_MODELS, 8: f"{IMAGE_MODELS} (8 px)", 32: f"{IMAGE_MODELS} (32 px)"}
# frame rate, and step of sides and frame counts, by model; used if no run names the dataset's model
MODELS = {
    "Wan": ("16", "16", "4"),
    "Wan2.2 TI2V-5B": ("24", "32", "4"),
    "HunyuanVideo": ("24", "16", "4"),
    "HunyuanVideo 1.5": ("24", "16", "4"),
    "Kandinsky 5": ("24", "16", "4"),
    "Kandinsky 6": ("24", "16", "4"),
    "FramePack": ("30", "16", "4"),
    "LTX-2": ("24", "32", "8"),
    "MiniMax-H3": ("24", "32", "17"),
    **{name: ("24", str(step), "1") for step, name in IMAGE_MODELS_BY_STEP.items()},
}
# keyed by the model's name in the history of a run
MODEL_BY_FAMILY = {
    "hunyuan_video": "HunyuanVideo",
    "hunyuan_video_1_5": "HunyuanVideo 1.5",
    "kandinsky": "Kandinsky 5",
    "kandinsky_6": "Kandinsky 6",
    "framepack": "FramePack",
    "ltx2_v1": "LTX-2",
    "minimax_h3": "MiniMax-H3",
}


@functools.cache
def image_families() -> Mapping[str, int]:
    """Return the step of image sides of the families that generate only images, by the names in histories."""
    families = {f"{entry.training_script}.py": name for name, entry in with_scripts().items()}
    steps: dict[str, int] = {}
    with_clips: set[str] = set()
    for model in find_models():
        for word in shlex.split(model.commands["train"]):
            if word in families:
                steps[families[word]] = model.properties.get("side_step", 16)
                if model.properties["frames"] > 1:
                    with_clips.add(families[word])
    return {name: step for name, step in steps.items() if name not in with_clips}


File = dict[str, Any]  # as `data_tools/report/files.py` lists it


@dataclass(frozen=True)
class FoundDataset:
    """A dataset's TOML or JSON configuration file, and the runs that trained on it."""

    path: Path
    base_folder: Path  # folder that relative paths in the configuration refer to
    is_project: bool = False  # the whole project folder may be shown, not only its output folder
    runs: Sequence[tuple[str, str]] = ()  # id and name of each run that trained on it
    model: str = next(iter(MODELS))
    caption_format: str = ""  # the family of a run whose captions are JSON objects

    @property
    def id(self) -> str:
        """Short digest of the configuration's path; identifies the dataset in URLs."""
        return short_digest(self.path)

    @property
    def name(self) -> str:
        """Name of the configuration file and its folder, in the page's language."""
        return say("%(name)s in %(name2)s", name=self.path.name, name2=self.path.parent.name)

    def named_paths(self) -> list[Path]:
        """Return the existing files and folders that the configuration names.

        Raises:
            OSError: If the configuration cannot be read.
            ValueError: If it is not valid TOML.
        """
        return list_named_paths(self.path, self.base_folder)


def list_named_paths(config: Path, folder: Path, with_companions: bool = True) -> list[Path]:
    """Return the existing files and folders that a dataset's TOML or JSON file names.

    Args:
        folder: Folder to which relative paths refer.
        with_companions: Whether to include the folders of masks, control images, references and caches, which
            are not media folders.

    Raises:
        OSError: If the configuration cannot be read.
        ValueError: If it is not valid TOML.
    """
    text = read_text(config)
    content = parse_toml(text) if config.suffix == CONFIG else parse_json(text)
    paths = []
    for text in _list_texts(content, with_companions):
        fixed_part = re.split(r"[*?\[{]", text)[0]  # the part of a glob pattern before its first wildcard
        path = folder / fixed_part
        if fixed_part != text:
            path = path.parent
        if is_on_foreign_share(path, folder):
            continue
        with contextlib.suppress(OSError, ValueError):
            if path.exists():
                paths.append(path)
    return list(dict.fromkeys(paths))


def select_folder(config: Path, working_folder: Path) -> Path:
    """Return the folder to which a dataset file's relative paths refer, if no run has used the file.

    It is the file's own folder, as in files that `new` writes, if a path named in the file exists there;
    otherwise it is `working_folder`, as for a command typed there.
    """
    with contextlib.suppress(OSError, ValueError):
        if not list_named_paths(config, config.parent) and list_named_paths(config, working_folder):
            return working_folder
    return config.parent


def _list_texts(content: Any, with_companions: bool) -> Iterator[str]:
    """Yield the strings in nested JSON; `with_companions` includes paths of masks, caches and so on."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, entry in content.items():
            if with_companions or not COMPANION_KEY.fullmatch(key):
                yield from _list_texts(entry, with_companions)
    elif isinstance(content, list):
        for entry in content:
            yield from _list_texts(entry, with_companions)


@dataclass
class Measurement:
    """Results of measuring a dataset, and the state of the measurement that is running."""

    version: int = 0  # number of finished measurements; 0 while the first one is running
    files: dict[str, File] = field(default_factory=dict)  # files inside the shown folders, by id
    num_hidden_files: int = 0  # files outside the shown folders
    remarks: list[str] = field(default_factory=list)  # remarks that are not about a single file
    totals: dict[str, int] = field(default_factory=dict)  # faults and remarks, as the report counts them
    error: str = ""
    reads_whole_files: bool = False  # whole files were read, not only headers
    model: str = ""
    fingerprint: object = None  # `Datasets.compute_fingerprint` of the measured files; None: never measured
    latest_fingerprint: object = None  # fingerprint of the files when last checked
    latest_since: float = 0.0  # when they first had it, in seconds of the monotonic clock
    is_running: bool = False
    started_at: float = 0.0  # when the current measurement began, in seconds of the monotonic clock
    num_media: int = 0  # number of media found in the dataset's folders


@dataclass(frozen=True)
class MediaCounts:
    """Counts of the media in a dataset's folders, by file name and without opening the files."""

    num_images: int = 0
    num_clips: int = 0
    num_audios: int = 0
    shown_file: Path | None = None  # first image or clip by name, shown as the dataset's thumbnail

    @property
    def total(self) -> int:
        """Number of images, clips and audio files together."""
        return self.num_images + self.num_clips + self.num_audios

    @property
    def summary(self) -> str:
        """The counts as text, such as `5 images, 1 clip`."""
        counts = []
        if self.num_images:
            counts.append(say_count(self.num_images, "%(n)s image", "%(n)s images"))
        if self.num_clips:
            counts.append(say_count(self.num_clips, "%(n)s clip", "%(n)s clips"))
        if self.num_audios:
            counts.append(say_count(self.num_audios, "%(n)s sound", "%(n)s sounds"))
        return join(", ", counts) or say("no images or clips in its folders")


def count_media(dataset: FoundDataset, may_show: Callable[[Path], bool]) -> MediaCounts:
    """Count the media in a dataset's folders by file name, without opening the files.

    Control images, references and masks are not counted, because they belong to other media.

    Args:
        may_show: Returns whether a folder may be shown.

    Raises:
        OSError: If the configuration cannot be read.
        ValueError: If the configuration is not valid TOML.
    """
    images: list[str] = []
    clips: list[str] = []
    num_audios = 0
    for folder in list_named_paths(dataset.path, dataset.base_folder, with_companions=False):
        if not (folder.is_dir() and may_show(folder)):
            continue
        for entry in _list_main_entries(folder):
            suffix = Path(entry.name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images.append(entry.path)
            elif suffix in VIDEO_SUFFIXES:
                clips.append(entry.path)
            elif suffix in AUDIO_SUFFIXES:
                num_audios += 1
    first_path = min([*images, *clips], default=None)
    return MediaCounts(len(images), len(clips), num_audios, None if first_path is None else Path(first_path))


def _list_main_entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder, without files that belong to a clip, such as clip_mask.png."""
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MAX_ENTRIES):
            if find_stem_label(Path(entry.name).stem) is None:
                yield entry


class _LocatedRun(NamedTuple):
    """A run, and the folder to which the relative path of its dataset file refers."""

    run: RunSummary
    folder: Path


def _make_run_dataset(config: Path, located_runs: Sequence[_LocatedRun], is_project: bool) -> FoundDataset:
    """Return the dataset of a TOML file that runs have trained on."""
    # If the runs were started in several folders, only the runs from the folder of the oldest run count.
    # `located_runs` begins with the newest run
    folder = list(dict.fromkeys(located.folder for located in located_runs))[-1]
    runs = [located.run for located in located_runs if located.folder == folder]
    newest_family = runs[0].model
    side_step = image_families().get(newest_family)
    default_model = next(iter(MODELS)) if side_step is None else IMAGE_MODELS_BY_STEP[side_step]
    caption_families = [run.model for run in runs if run.model in caption_formats()]
    return FoundDataset(
        config,
        folder,
        is_project=is_project,
        runs=[(run.id, run.name) for run in runs],
        model=MODEL_BY_FAMILY.get(newest_family, default_model),
        caption_format=caption_families[0] if caption_families else "",
    )


class Datasets:
    """Finds the datasets below the root folders, and caches the measurement of each dataset."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.lock = threading.RLock()
        self._found: dict[str, FoundDataset] = {}
        self._measurements: dict[str, Measurement] = {}
        self._is_dataset_cache: dict[
            Path, tuple[int, bool]
        ] = {}  # by .toml file: (change time, is a dataset)
        self._measuring = threading.Semaphore()  # one measurement at a time
        self._processes: set[subprocess.Popen[bytes]] = set()
        atexit.register(self.close)

    def list_all(self) -> list[FoundDataset]:
        """Return all datasets, found in runs and in folders, sorted by path."""
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
        """Return the datasets that runs trained on, by the path of their TOML file."""
        # `projects` are the dataset.toml files that `new` wrote next to a run.toml.
        runs_by_config: dict[Path, list[_LocatedRun]] = {}
        for run in self.runs.list_all():
            changed_options = dict(run.start.changed) if run.start else {}
            typed_config = changed_options.get("dataset_config")
            if typed_config:
                folder, config = _locate_config(typed_config, run)
                runs_by_config.setdefault(config, []).append(_LocatedRun(run, folder))
        return {
            config: _make_run_dataset(config, located_runs, is_project=config in projects)
            for config, located_runs in runs_by_config.items()
        }

    def _find_projects(self) -> set[Path]:
        """Return the dataset.toml files next to the root folders."""
        # `new` writes FOLDER/dataset.toml, and a training run of that folder saves into FOLDER/output.
        configs: set[Path] = set()
        for folder in self.runs.root_folders:
            config = folder.parent / PROJECT_CONFIG
            with contextlib.suppress(OSError):
                if config.is_file() and real_path(config) == config:  # not a link
                    configs.add(config)
        return configs

    def may_show(self, dataset: FoundDataset, path: Path) -> bool:
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
            if self._is_dataset_cache.get(path, (None, False))[0] != changed:
                self._is_dataset_cache[path] = changed, DATASET_TABLE.search(read_text(path)) is not None
        except (OSError, ValueError):
            return False
        return self._is_dataset_cache[path][1]

    def list_hidden_folders(self, dataset: FoundDataset) -> list[Path]:
        """Return the folders that have to be added to the command line before this dataset can be shown.

        Raises:
            OSError: If the configuration does not exist.
            ValueError: If the configuration cannot be read.
        """
        if not (self.may_show(dataset, dataset.path) and dataset.path.is_file()):
            dataset.path.stat()
            return [dataset.path.parent]
        paths = [path for path in dataset.named_paths() if not self.may_show(dataset, path)]
        return list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))

    def measure(self, dataset: FoundDataset) -> Measurement:
        """Return the last measurement of a dataset; start a new one if its files have changed since.

        Raises OSError or ValueError if the dataset's file cannot be read.
        """
        fingerprint = self.compute_fingerprint(dataset)
        with self.lock:
            measurement = self._measurements.setdefault(dataset.id, Measurement(model=dataset.model))
            if measurement.latest_fingerprint != fingerprint:
                measurement.latest_fingerprint = fingerprint
                measurement.latest_since = time.monotonic()
            settled_seconds = time.monotonic() - measurement.latest_since
            # files that are still being copied keep changing the fingerprint: wait until it is stable
            is_settled = settled_seconds >= SETTLED_SECONDS
            was_never_measured = measurement.fingerprint is None
            if fingerprint != measurement.fingerprint and (is_settled or was_never_measured):
                self.start_measuring(dataset)
            return measurement

    def describe(self, dataset: FoundDataset) -> tuple[MediaCounts, str]:
        """Return the media counts of a dataset's folders, and the state of its measurement as text."""
        try:
            if self.list_hidden_folders(dataset):
                return MediaCounts(), say("partly outside the folders that are shown")
            media = count_media(dataset, lambda path: self.may_show(dataset, path))
        except OSError as error:
            return MediaCounts(), f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return MediaCounts(), f"cannot be read: {error}"
        with self.lock:
            return media, _describe_measurement(self._measurements.get(dataset.id))

    def compute_fingerprint(self, dataset: FoundDataset) -> object:
        """Return the paths, times and sizes of the dataset's files, to detect changes by comparison.

        Raises OSError or ValueError if the dataset file cannot be read.
        """
        entries: list[object] = []
        for path in (dataset.path, *dataset.named_paths()):
            with contextlib.suppress(OSError):
                status = path.stat()
                size = status.st_size if path.is_file() else 0
                entries.append((str(path), status.st_mtime_ns, size))
        return entries

    def accept_edit(self, dataset: FoundDataset, before: object) -> None:
        """Keep a dataset's measurements valid after this server has saved one of its captions.

        `before` is the fingerprint of the dataset's files before the save, which `compute_fingerprint`
        returned. If other files have changed as well, the dataset is measured again.
        """
        with self.lock:
            measurement = self._measurements.get(dataset.id)
            if measurement is not None and measurement.fingerprint == before:
                measurement.fingerprint = self.compute_fingerprint(dataset)

    def start_measuring(
        self, dataset: FoundDataset, reads_whole_files: bool | None = None, model: str | None = None
    ) -> None:
        """Measure a dataset in the background, unless a measurement is running.

        Args:
            reads_whole_files: Whether to read whole files instead of headers; None to keep the setting.
            model: Key of MODELS; None to keep the model of the last measurement.

        Raises:
            OSError: If the configuration does not exist.
            ValueError: If the configuration cannot be read.
        """
        with self.lock:
            measurement = self._measurements.setdefault(dataset.id, Measurement(model=dataset.model))
            if measurement.is_running or self.list_hidden_folders(dataset):
                return
            measurement.is_running = True
            measurement.fingerprint = self.compute_fingerprint(dataset)
            measurement.started_at = time.monotonic()
            measurement.num_media = count_media(dataset, lambda path: self.may_show(dataset, path)).total
            if reads_whole_files is not None:
                measurement.reads_whole_files = reads_whole_files
            measurement.model = model or measurement.model
            threading.Thread(target=self._run_measurement, args=(dataset, measurement), daemon=True).start()

    def _run_measurement(self, dataset: FoundDataset, measurement: Measurement) -> None:
        """Measure a dataset's files, and store in `measurement` what pages may show of the report."""
        options = _report_options(dataset, measurement)
        report: dict[str, Any] = {}
        error = ""
        with self._measuring:  # one measurement at a time
            try:
                report = self._run_report(options, dataset.base_folder)
            except (OSError, ValueError, OptionError) as problem:
                error = str(problem)
        all_files = list(report.get("files", ()))
        shown_files = self._select_shown_files(dataset, all_files)
        remarks = [*report.get("faults", ()), *report.get("remarks", ())]
        with self.lock:
            measurement.files = {_identify(file): file for file in shown_files}
            measurement.num_hidden_files = len(all_files) - len(shown_files)
            measurement.error = error
            measurement.remarks = [f"{remark['kind']}: {remark['text']}" for remark in remarks]
            measurement.totals = {name: report.get(f"num_{name}", 0) for name in ("faults", "remarks")}
            measurement.version += 1
            measurement.is_running = False

    def _select_shown_files(self, dataset: FoundDataset, files: Sequence[File]) -> list[File]:
        """Return the report's files that are inside the shown folders, without captions that are outside."""
        for file in files:  # paths in the report are relative to its working folder
            for part in file["parts"]:
                for name in ("path", "in"):
                    if name in part and "://" not in part[name]:
                        part[name] = str(dataset.base_folder / part[name])
            for name in ("caption_file", "caption_list"):
                if file[name] and "://" not in file[name]:
                    file[name] = str(dataset.base_folder / file[name])
        shown_files = [file for file in files if self._may_show_file(dataset, file)]
        for file in shown_files:
            path = Path(file["caption_file"] or file["caption_list"])
            exists = path.exists() or path.is_symlink()
            if exists and not self.may_show(dataset, path):
                _leave_out_caption(file)
        return shown_files

    def _may_show_file(self, dataset: FoundDataset, file: File) -> bool:
        first_part = file["parts"][0]
        return self.may_show(dataset, Path(first_part.get("in", first_part["path"])))

    def _run_report(self, options: Sequence[str], folder: Path) -> dict[str, Any]:
        """Run tools/dataset_report.py in `folder`, and return its JSON report."""
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


def _describe_measurement(measurement: Measurement | None) -> str:
    """Describe the state of a dataset's measurement. The caller holds the lock of `Datasets`."""
    if measurement is None:
        return say("not measured yet")
    if not measurement.version:  # the first measurement is running
        return say("being measured")
    if measurement.error:
        return say("cannot be measured")
    phrases: list[str] = []
    num_dropped = sum(bool(file["dropped"]) for file in measurement.files.values())
    if num_dropped:
        phrases.append(say("%(dropped)s dropped", dropped=num_dropped))
    phrases.append(_describe_caches(measurement.files.values()))
    return join(", ", phrases)


def _describe_caches(files: Iterable[File]) -> str:
    """Describe whether the latent and text caches of a dataset's files exist and are valid."""
    states = set()
    for file in files:
        for cache_parts in file["caches"].values():
            states |= {state for state, _ in cache_parts.values()}
    if not states:
        return say("not cached")
    return say("caches valid") if states == {"valid"} else say("caches out of date")


def _report_options(dataset: FoundDataset, measurement: Measurement) -> list[str]:
    """Return the options of tools/dataset_report.py to measure a dataset."""
    fps, pixel_step, frame_step = MODELS[measurement.model]
    options = ["--dataset_config", str(dataset.path), "--fps", fps, "--pixel_step", pixel_step]
    options += ["--frame_step", frame_step]
    options += ["--json", "--files", "--no_download", "--num_workers", "2"]
    if not measurement.reads_whole_files:
        options.append("--no_decode")
    return options


def _identify(file: File) -> str:
    """Return the id of a file in its dataset."""
    return short_digest(f"{file['table']} {file['parts'][0]['path']}")


def _leave_out_caption(file: File) -> None:
    """Remove a file's caption, and messages that may quote it, from its row of the report."""
    file |= {"text": None, "captions": [], "faults": [], "remarks": []}
    for states in file["caches"].values():
        for part, (state, _) in states.items():
            states[part] = (state, "")


def _locate_config(typed: str, run: RunSummary) -> tuple[Path, Path]:
    """Return the working folder of a run, and the path of its --dataset_config."""
    # The history of an older version does not contain the working folder. Then the run folder's parents are
    # tried, the nearest first. The browser's own working folder is not tried, because a dataset there would
    # be attributed to every run.
    bases = list(run.history.parent.parents)
    if run.working_folder is not None:
        bases.insert(0, run.working_folder)
    for base in bases:
        with contextlib.suppress(OSError, ValueError):
            if (base / typed).is_file():
                return base, real_path(base / typed)
    return bases[0], bases[0] / typed
