"""Compare saved LoRA files: show samples and clips of each.

The script tools/compare.py generates the missing clips.

A row is a prompt with all its settings, a column is a file at strength 1. A clip is found by its metadata
(prompt, seed, SHA-256 of its LoRA), so that two files of the same name are never confused.
"""

import contextlib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from browser.jobs import WAITING, JobQueue
from browser.run_views import COMPARED, COMPARED_FOLDER, FileNotes
from browser.runs import RUNNING, Runs, RunSummary
from browser.short_names import short_digest
from downloads.catalogue import model_title
from generation.prompt_lines import split_line
from modules.errors import OptionError, UserError
from modules.installation import MAX_BEFORE
from modules.media.reading import read_tags
from modules.pages.language import join, say
from modules.pages.page import link
from modules.text_files import read_text, real_path
from protocols.families import HIGH_NOISE, LOW_NOISE, with_scripts
from training.reports.history import PageCommand, RunHistory, SampleRow
from training.reports.page import list_files
from training.reports.present_files import current_commands
from training.reports.scores import find_best_file
from training.reports.sections import SAMPLES

MAX_COLUMNS = 24
MAX_ROWS = 40
DEFAULT_ROWS = 8
SCRIPT = ["python", "tools/compare.py"]
LORA = "--lora_weight"
# generation options that the comparison sets itself, or that would write into other folders
# fmt: off
REPLACED = {
    LORA, f"{LORA}_{HIGH_NOISE}", "--lora_multiplier", f"--lora_multiplier_{HIGH_NOISE}", "--prompt",
    "--seed", "--save_path", "--from_file", "--config_file", "--console_log_file",
}
# fmt: on
PLACEHOLDER = re.compile(r"[A-Z0-9_.]+_FILE")
SEED = "0"  # if neither prompt nor run has a seed: all columns need the same one
# prompt-line options that the metadata of a clip contain
# fmt: off
SETTINGS = (
    "infer_steps", "guidance_scale", f"guidance_scale_{HIGH_NOISE}", "embedded_cfg_scale", "flow_shift",
    "video_length", "video_seconds", "video_sections", "negative_prompt",
)
# fmt: on


@dataclass(frozen=True)
class ComparableRun:
    """A run whose saved files can be compared, and the generation options that load its model."""

    run: RunSummary
    run_history: RunHistory
    family: str  # as named by tools/compare.py
    options: Mapping[str, Sequence[str]]  # option -> its arguments
    missing: Sequence[str] = ()  # placeholders that the user has to replace

    @property
    def folder(self) -> Path:
        """Folder of the run's comparison clips, next to its history."""
        return self.run.history.parent / COMPARED_FOLDER

    @property
    def is_link(self) -> bool:
        """Whether `folder` is a link. A linked folder is neither read nor written."""
        return real_path(self.folder) != self.folder

    @property
    def working_folder(self) -> Path:
        """Folder in which the run's command was typed, also if its history does not record the folder."""
        return working_folder(self.run, self.options)

    @property
    def problem(self) -> str:
        """Reason why no clip can be generated with the files of this run; "" if clips can be generated."""
        for name, values in self.options.items():
            # a file that the run did not have, or a part of its command that the user has to replace
            is_missing = any(word in self.missing or PLACEHOLDER.fullmatch(word) for word in values)
            if is_missing and name not in REPLACED:  # the comparison itself sets the options in REPLACED
                return say(
                    "%(name)s was trained without %(name2)s, which is needed to make them",
                    name=self.run.name,
                    name2=name,
                )
        if self.is_link:
            return say("%(folder)s is a link", folder=self.folder)
        if LORA not in self.options:
            return say("%(name)s has no LoRA that can be compared", name=self.run.name)
        if len(self.options[LORA]) > 1:
            return say(
                "samples of %(name)s have a second LoRA, which a comparison cannot add",
                name=self.run.name,
            )
        return ""

    @property
    def files(self) -> list["ComparedFile"]:
        """Saved files that still exist, sorted by step. Of several with equal weights, only one is listed."""
        folder = self.run.history.parent
        run_history = self.run_history
        best = find_best_file(folder, self.run.name, run_history)
        best_name = None if best is None else best.name
        files = []
        for step, names in list_files(run_history, folder):
            name = names[0]
            if f"_{HIGH_NOISE}." in name:
                continue  # listed together with the file of the low-noise expert
            if run_history.is_embedding(name):
                continue  # the embedding of a trigger word, used together with a LoRA
            high_noise_name = name.replace(f"_{LOW_NOISE}.", f"_{HIGH_NOISE}.")
            paths = [folder / name]
            if high_noise_name != name:
                paths.append(folder / high_noise_name)
            if not all(path.is_file() for path in paths):
                continue
            validation = None if run_history.is_average(name) else run_history.nearest_validation(step)
            file = ComparedFile(
                source=self,
                name=name,
                paths=paths,
                step=step,
                loss=None if validation is None else validation.loss,
                is_best=best_name in (high_noise_name, *names),
                copies=names[1:],
            )
            files.append(file)
        return files


@dataclass(frozen=True)
class ComparedFile:
    """A column: a saved LoRA file. For models with two experts, the files of both."""

    source: ComparableRun
    name: str
    paths: Sequence[Path]
    step: int
    loss: float | None
    is_best: bool
    copies: Sequence[str] = ()  # names of further files with the same weights

    @property
    def key(self) -> str:
        """Value that identifies the file in forms: the run's id and the file's name."""
        return f"{self.source.run.id}/{self.name}"

    @property
    def title(self) -> str:
        """Name of the file without its ending and without the suffix of the expert."""
        return self.name.removesuffix(".safetensors").removesuffix(f"_{LOW_NOISE}")

    @property
    def step_title(self) -> str:
        """Title of the column: the step, or the file's name if it says more than the run and the step."""
        name = re.escape(self.source.run.name)
        if re.fullmatch(rf"{name}-step\d+", self.title):
            return say("step %(step)s", step=f"{self.step:,}")
        return self.title

    def samples(self) -> Iterator[SampleRow]:
        """Yield the samples that the training generated with exactly these weights.

        A file of averaged weights matches samples only if the training sampled with averaged weights
        (`--sample_ema`), and a file of plain weights only if it did not.
        """
        run_history = self.source.run_history
        options = dict(run_history.start.changed) if run_history.start else {}
        if run_history.is_average(self.name) == (options.get("sample_ema") == "True"):
            yield from (row for row in run_history.samples.values() if row.step == self.step)


@dataclass(frozen=True)
class ComparedPrompt:
    """A row of the comparison: a line for `--from_file`, with the prompt and settings for all columns."""

    prompt: str
    line: str
    seed: str


@dataclass
class Comparison:
    """The requested runs, columns and rows. `problem` is the reason why no clips can be generated, or ""."""

    sources: list[ComparableRun] = field(default_factory=list)
    columns: list[ComparedFile] = field(default_factory=list)
    sampled_prompts: list[str] = field(default_factory=list)
    rows: list[ComparedPrompt] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)  # selected prompts among `sampled_prompts`
    typed_lines: str = ""  # typed lines of prompts
    problem: str = ""


def read_source(runs: Runs, run: RunSummary) -> ComparableRun | None:
    """Return a run for comparison, with the first generation command in its history; None if it has none.

    Raises:
        OSError: If the history cannot be read.
    """
    run_history = runs.open(run).run_history
    families = {entry.generation_script: name for name, entry in with_scripts().items()}
    for command in _read_commands(current_commands(run_history, run.history.parent, run.name), families):
        return ComparableRun(  # only the first one counts
            run=run,
            run_history=run_history,
            family=families[command.script],
            options=group_options(command.argv),
            missing=command.missing,
        )
    return None


class _TypedCommand(NamedTuple):
    """A command in a run's history that starts a script of this program."""

    line: str
    script: str
    argv: Sequence[str]  # arguments of the script
    missing: Sequence[str]  # words that the user has to replace


def _read_commands(commands: Iterable[PageCommand], scripts: Collection[str]) -> Iterator[_TypedCommand]:
    """Yield the commands of a history that start one of the given scripts."""
    for command in commands:
        try:
            argv = shlex.split(command.bash)
            missing = shlex.split(command.missing)
        except ValueError:  # a manually edited history
            continue
        # the script's name follows `python`, or a launcher and its options
        for index, word in enumerate(argv[:MAX_BEFORE]):
            script = re.split(r"[\\/.]", word.removesuffix(".py"))[-1]
            if script in scripts:
                yield _TypedCommand(command.bash, script, argv[index + 1 :], missing)
                break


def working_folder(run: RunSummary, options: Mapping[str, Sequence[str]]) -> Path:
    """Return the folder in which a run's command was typed.

    It is recorded in the run's history. Histories of older versions do not have it: then it follows from the
    command's output option, and failing that, the browser's own working folder is returned.
    """
    with contextlib.suppress(OSError, ValueError):  # the history may come from another machine
        if run.working_folder is not None and run.working_folder.is_dir():
            return run.working_folder
    output_words = options.get("--output_dir")
    # training scripts have --output_dir; generation scripts write samples to --save_path below it
    typed = Path(*output_words) if output_words else Path(*options.get("--save_path", ())).parent
    parents = run.history.parent.parts
    # the history lies in the output folder; without the typed relative path, the working folder remains
    count = len(parents) - len(typed.parts)
    if typed.is_absolute() or parents[count:] != typed.parts:
        return Path.cwd()
    return Path(*parents[:count])


def group_options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the arguments that follow each option of a command line, by the option's name."""
    options: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            name, mark, value = word.partition("=")
            options[name] = [value] if mark else []
        elif options:
            last_name = list(options)[-1]
            options[last_name].append(word)
    return options


def read_comparison(runs: Runs, form: Mapping[str, Sequence[str]]) -> Comparison:
    """Return the comparison that a form requests. Raises OptionError if the runs cannot be compared."""
    sources = _read_sources(runs, form)  # the selected runs
    comparison = Comparison(sources, typed_lines="\n".join(form.get("more", ())))
    for source in sources:
        comparison.columns += _select_files(runs, source, form.get("file", ()))
    _select_rows(comparison, form.get("prompt", ()))
    if len(comparison.columns) > MAX_COLUMNS or len(comparison.rows) > MAX_ROWS:
        raise OptionError(
            say(
                "%(max_columns)s files and %(most_rows)s prompts are the most: choose fewer",
                max_columns=MAX_COLUMNS,
                most_rows=MAX_ROWS,
            )
        )
    if sources:  # the first run's command generates the clips of all columns
        comparison.problem = sources[0].problem
    return comparison


def find_without_files(runs: Sequence[RunSummary]) -> set[str]:
    """Return the ids of runs whose folder has no saved file of their name; no history is read for this."""
    names: dict[Path, list[str]] = {}
    bare = set()
    for run in runs:
        folder = run.history.parent
        if folder not in names:
            with contextlib.suppress(OSError):
                names[folder] = [path.name for path in folder.glob("*.safetensors")]
        saved = re.compile(rf"{re.escape(run.name)}([-_].*)?\.safetensors", re.DOTALL)
        if not any(map(saved.fullmatch, names.get(folder, []))):
            bare.add(run.id)
    return bare


def _read_sources(runs: Runs, form: Mapping[str, Sequence[str]]) -> list[ComparableRun]:
    """Return the runs that a form names directly or by a file.

    Raises OptionError if a run has no generation command, or if they are of different model families.
    """
    # the key of a file is RUN_ID/NAME
    ids = [*form.get("run", ()), *(key.partition("/")[0] for key in form.get("file", ()))]
    candidates = [runs.find(id) for id in dict.fromkeys(ids)]
    chosen_runs = [run for run in candidates if run is not None]
    sources = []
    for run in chosen_runs:
        source = read_source(runs, run)
        if source is not None:
            sources.append(source)
    if len(sources) < len(chosen_runs):
        names = {run.name for run in chosen_runs} - {source.run.name for source in sources}
        raise OptionError(
            say("%(names)s: its history has no command that generates", names=join(", ", sorted(names)))
        )
    if len({source.family for source in sources}) > 1:
        models = {
            say("%(name)s is of %(family)s", name=source.run.name, family=model_title(source.family))
            for source in sources
        }
        raise OptionError(say("Files of one model are compared: %(names)s", names=join(", ", sorted(models))))
    return sources


def _select_files(runs: Runs, source: ComparableRun, keys: Sequence[str]) -> list[ComparedFile]:
    """Return the files of a run with these keys; without keys, the best file and the file before it."""
    files = [file for file in source.files if all(map(runs.is_inside, file.paths))]
    chosen = [file for file in files if file.key in keys]
    if chosen:
        return chosen
    best_index = next((index for index, file in enumerate(files) if file.is_best), len(files) - 1)
    return files[max(0, best_index - 1) :][:2]


def _select_rows(comparison: Comparison, prompts: Sequence[str]) -> None:
    """Add the prompts that have samples, and a row for each selected prompt and each typed line.

    Without selected prompts and typed lines, the first prompts that have samples become rows.
    """
    sources = comparison.sources
    comparison.sampled_prompts = _list_prompts(sources)
    lines = []
    for line in comparison.typed_lines.splitlines():
        if line.strip() and not line.startswith("#"):
            lines.append(line)
    if not prompts and not lines:
        prompts = comparison.sampled_prompts[:DEFAULT_ROWS]
    comparison.chosen = [prompt for prompt in comparison.sampled_prompts if prompt in prompts]
    seed = sources[0].options.get("--seed", [SEED])[0] if sources else SEED
    comparison.rows = [_make_sampled_row(sources, prompt, seed) for prompt in comparison.chosen]
    comparison.rows += [_make_typed_row(line, seed) for line in lines]


def _list_prompts(sources: Sequence[ComparableRun]) -> list[str]:
    """Return each distinct prompt that has samples."""
    prompts: dict[str, None] = {}
    for source in sources:
        for row in source.run_history.samples.values():
            prompts |= dict.fromkeys(row.prompts.values())
    return list(prompts)


def _make_typed_row(line: str, seed: str) -> ComparedPrompt:
    """Return the row of a typed prompt line. `seed` is used for a line without a seed of its own."""
    line = line.strip()
    split = split_line(line)
    prompt = split.prompt.strip()
    typed_seeds = [re.fullmatch(r"(?:d|seed) +(\d+)", option.strip()) for option in split.options]
    for typed_seed in typed_seeds:
        if typed_seed:
            return ComparedPrompt(prompt, line, typed_seed[1])
    return ComparedPrompt(prompt, f"{line} --seed {seed}", seed)


def _make_sampled_row(sources: Sequence[ComparableRun], prompt: str, seed: str) -> ComparedPrompt:
    """Return the row of a prompt that has samples, with the settings of the first sample."""
    settings: dict[str, str] = {}
    for name, text in _first_tags(sources, prompt).items():  # metadata, such as bt_seeds
        if text != "N/A":
            settings[name.removeprefix("bt_")] = text
    line = f"{prompt} --seed {settings.get('seeds', seed)}"
    if "height" in settings and "width" in settings:
        line += f" --video_size {settings['height']} {settings['width']}"
    for name in SETTINGS:
        text = settings.get(name, "")
        # a line break or two dashes would end the option's value in a prompt line
        fits_in_line = "\\n" not in text and " --" not in text
        is_length_of_image = (name, text) == ("video_length", "1")  # the default of image models
        if text and fits_in_line and not is_length_of_image:
            line += f" --{name} {text}"
    return ComparedPrompt(prompt, line, settings.get("seeds", seed))


def _first_tags(sources: Sequence[ComparableRun], prompt: str) -> Mapping[str, str]:
    """Return the metadata of a prompt's first sample that has any."""
    for source in sources:
        for row in source.run_history.samples.values():
            for index, name in row.files.items():
                if row.prompts.get(index) == prompt:
                    tags = read_clip_tags(source.run.history.parent / SAMPLES / name)
                    if tags:
                        return tags
    return {}


def read_clip_tags(path: Path) -> Mapping[str, str]:
    """Return the metadata of a clip or image file; empty if the file cannot be read."""
    with contextlib.suppress(OSError, UserError):
        status = path.stat()
        return _read_tags(path, status.st_mtime_ns, status.st_size)
    return {}


@lru_cache(maxsize=10_000)
def _read_tags(path: Path, changed: int, size: int) -> Mapping[str, str]:
    return read_tags(path)


@dataclass(frozen=True)
class ShownClip:
    """A cell of the comparison: the address of its clip, or the state of the job that generates it."""

    href: str = ""
    note: str = ""
    is_asked: bool = False  # a job generates it


class ClipKey(NamedTuple):
    """Key of a generated clip: its prompt, its seed and the hashes of its LoRA files."""

    prompt: str
    seed: str
    digests: frozenset[str]  # SHA-256 of its LoRA files; none for a clip without LoRA


class QueuedClip(NamedTuple):
    """The last job of the queue that generates a clip."""

    number: int
    state: str


QueuedClips = Mapping[tuple[str, str], QueuedClip]  # by LoRA file and prompt line


def fill_cells(comparison: Comparison, notes: FileNotes, jobs: QueuedClips) -> list[list[ShownClip]]:
    """Return a list of cells for each row: first the clip without LoRA, then one cell for each column.

    `jobs` is the result of `find_queued_clips`. Files that were never hashed before are hashed now, which
    takes a while.
    """
    clips = _find_made_clips(comparison)
    digests: dict[str, frozenset[str]] = {}
    if clips:  # hashing takes long, and without clips there is nothing to find by the digests
        digests = {file.key: frozenset(map(notes.hash, file.paths)) for file in comparison.columns}
    cells = []
    for row in comparison.rows:
        without_lora = ClipKey(row.prompt, row.seed, frozenset())  # no LoRA: no file digests
        cells_of_row = [ShownClip(clips.get(without_lora, ""))]
        for file in comparison.columns:
            address = ""
            if clips:
                address = clips.get(ClipKey(row.prompt, row.seed, digests[file.key]), "")
            cells_of_row.append(_fill_cell(file, row, address, jobs))
        cells.append(cells_of_row)
    return cells


def _find_made_clips(comparison: Comparison) -> dict[ClipKey, str]:
    """Return the addresses of the clips that tools/compare.py generated without a LoRA or at strength 1."""
    clips: dict[ClipKey, str] = {}
    for source in comparison.sources:
        if not source.folder.is_dir() or source.is_link:
            continue
        for path in sorted(source.folder.iterdir()):
            if not COMPARED.fullmatch(f"{COMPARED_FOLDER}/{path.name}"):
                continue
            tags = read_clip_tags(path)
            lora = tags.get("bt_lora_0")  # `NAME: STRENGTH`
            if lora is not None and not lora.endswith(": 1.0"):  # columns show LoRAs at strength 1 only
                continue
            digests = {text for name, text in tags.items() if re.fullmatch(r"bt_lora\w*_sha256_\d+", name)}
            key = ClipKey(tags.get("bt_prompt", ""), tags.get("bt_seeds", ""), frozenset(digests))
            clips[key] = _address(source, COMPARED_FOLDER, path.name)
    return clips


def _fill_cell(file: ComparedFile, row: ComparedPrompt, address: str, jobs: QueuedClips) -> ShownClip:
    """Return the generated clip of a file and a prompt, else a sample, else the state of the queued job.

    `address` is that of the generated clip; "" if there is none.
    """
    if not address:
        sample = _find_sample(file, row)
        if sample is not None:
            return sample
    job = jobs.get((str(file.paths[0]), row.line))
    if job is None:
        return ShownClip(address)
    note = "" if address else say("job %(number)s: %(state)s", number=job.number, state=job.state)
    return ShownClip(address, note, is_asked=job.state in (WAITING, RUNNING))


def _find_sample(file: ComparedFile, row: ComparedPrompt) -> ShownClip | None:
    for samples in file.samples():
        for index, name in samples.files.items():
            path = file.source.run.history.parent / SAMPLES / name
            if samples.prompts.get(index) == row.prompt and path.is_file():
                seed = read_clip_tags(path).get("bt_seeds", row.seed)
                note = say("sample with seed %(seed)s", seed=seed) if seed != row.seed else ""
                return ShownClip(_address(file.source, SAMPLES, name), note)
    return None


def _address(source: ComparableRun, *parts: str) -> Markup:
    return Markup(f"/run/{source.run.id}/{link(*parts)[2:]}")  # quoted, and without folders


def find_queued_clips(queue: JobQueue) -> dict[tuple[str, str], QueuedClip]:
    """Return the last queued job for each pair of LoRA file and prompt line."""
    clips: dict[tuple[str, str], QueuedClip] = {}
    for job in queue.jobs():
        with contextlib.suppress(OSError, ValueError, LookupError, UserError):  # an invalid manual line
            if job.argv[:2] != SCRIPT:
                continue
            options = group_options(job.argv[2:])
            lines = read_text(Path(job.folder, *options["--from_file"])).splitlines()
            for line in lines:
                for file in options["--lora"]:
                    clips[file, line] = QueuedClip(job.id, job.state)
    return clips


class PlannedJob(NamedTuple):
    """A job that generates missing clips."""

    argv: list[str]
    prompt_file: Path
    prompts: str  # text of that file


def plan_jobs(comparison: Comparison, cells: Sequence[Sequence[ShownClip]]) -> list[PlannedJob]:
    """Return the jobs that generate the missing clips; rows that lack clips of the same files share one job.

    `cells` has a list for each row: the clip without a LoRA, then one clip for each column.
    """
    if comparison.problem:
        return []
    rows_by_columns: dict[tuple[int, ...], list[ComparedPrompt]] = {}  # indices of columns without a clip
    for row, cells_of_row in zip(comparison.rows, cells, strict=True):
        if row.line.splitlines() != [row.line] or row.line.startswith("#"):
            continue  # cannot be a line of a prompt file
        file_cells = cells_of_row[1:]  # the first cell is the clip without a LoRA
        missing = [index for index, cell in enumerate(file_cells) if not (cell.href or cell.is_asked)]
        if missing:
            rows_by_columns.setdefault(tuple(missing), []).append(row)
    jobs = []
    for missing_columns, rows in rows_by_columns.items():
        files = [comparison.columns[index] for index in missing_columns]
        jobs.append(_plan_job(comparison.sources[0], files, rows))
    return jobs


def _plan_job(
    source: ComparableRun, files: Sequence[ComparedFile], rows: Sequence[ComparedPrompt]
) -> PlannedJob:
    """Return the job that generates a clip for each pair of file and prompt, with the options of a run."""
    prompts = "".join(f"{row.line}\n" for row in rows)
    digest = short_digest(prompts, 4)
    prompt_file = source.folder / f"prompts-{digest}.txt"
    argv = [*SCRIPT, "--family", source.family, "--lora", *(str(file.paths[0]) for file in files)]
    if len(files[0].paths) > 1:  # each file is a pair: one for each expert of Wan 2.2
        argv += ["--lora_high_noise", *(str(file.paths[1]) for file in files)]
    for name, values in source.options.items():
        if name not in REPLACED:  # options that this job sets itself
            argv += [name, *values]
    argv += ["--seed", SEED, "--from_file", str(prompt_file), "--save_path", str(source.folder)]
    return PlannedJob(argv, prompt_file, prompts)
