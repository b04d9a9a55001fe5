"""Compare saved LoRA files: show the samples and clips of each, have tools/compare.py make what is missing.

A row is a prompt with all its settings, a column a file at strength 1. A clip is found by its metadata
(prompt, seed, SHA-256 of its LoRA), so that two files of the same name are never confused.
"""

import contextlib
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from browser.jobs import WAITING, JobQueue
from browser.runs import RUNNING, Glance, Runs
from browser.views import COMPARED, COMPARED_FOLDER, FileNotes
from modules.errors import OptionError, UserError
from modules.families import HIGH_NOISE, LOW_NOISE, with_scripts
from modules.installation import MOST_BEFORE
from modules.media.reading import read_tags
from modules.text_files import read_text, real_path
from training.reports.history import SampleRow, Story
from training.reports.page import link, list_files
from training.reports.sample_files import FOLDER as SAMPLES

MOST_COLUMNS, MOST_ROWS, USUAL_ROWS = 24, 40, 8
SCRIPT = ["python", "tools/compare.py"]
LORA = "--lora_weight"
# options of a generation that a comparison sets itself, or that would write elsewhere
REPLACED = {
    *(f"{name}{end}" for name in (LORA, "--lora_multiplier") for end in ("", f"_{HIGH_NOISE}")),
    *("--prompt", "--seed", "--save_path", "--from_file", "--config_file", "--console_log_file"),
}
PLACEHOLDER = re.compile(r"[A-Z0-9_.]+_FILE")
SEED = "0"  # if neither a prompt nor the run tells one: all columns need the same
# options of a prompt line that a clip tells
SETTINGS = (
    *("infer_steps", "guidance_scale", f"guidance_scale_{HIGH_NOISE}", "embedded_cfg_scale", "flow_shift"),
    *("video_length", "video_seconds", "video_sections", "negative_prompt"),
)


@dataclass(frozen=True)
class ComparableRun:
    """Hold a run whose files can be compared, with the options that generate with its models."""

    run: Glance
    story: Story
    family: str  # as tools/compare.py calls it
    options: Mapping[str, Sequence[str]]  # name -> the words that follow
    missing: Sequence[str] = ()  # words that stand for what the run does not know

    @property
    def folder(self) -> Path:
        return self.run.history.parent / COMPARED_FOLDER

    @property
    def is_link(self) -> bool:
        """Return whether `folder` is a link to another place: then it is neither read nor written."""
        return real_path(self.folder) != self.folder

    @property
    def working_folder(self) -> Path:
        return working_folder(self.run, self.options)

    @property
    def problem(self) -> str:
        """Return why no clip can be made with this run's files; empty if clips can be made."""
        for name, words in self.options.items():
            is_missing = any(word in self.missing or PLACEHOLDER.fullmatch(word) for word in words)
            if is_missing and name not in REPLACED:
                return f"{self.run.name} was trained without {name}, which a clip needs"
        if self.is_link:
            return f"{self.folder} is a link"
        if LORA not in self.options:
            return f"{self.run.name} has no LoRA for --dit, which tools/compare.py needs"
        if len(self.options[LORA]) > 1:
            return f"samples of {self.run.name} have a second LoRA, which tools/compare.py cannot add"
        return ""

    @property
    def files(self) -> list["ComparedFile"]:
        """Return the saved files that exist, by step; only one of several with equal weights."""
        folder, story, found = self.run.history.parent, self.story, []
        best = story.best_file(folder)
        for step, (name, *twins) in list_files(story, folder):
            pair = name.replace(f"_{LOW_NOISE}.", f"_{HIGH_NOISE}.")
            is_second = name.replace(f"_{HIGH_NOISE}.", f"_{LOW_NOISE}.") != name
            paths = [folder / each for each in dict.fromkeys((name, pair))]
            if is_second or not all(path.is_file() for path in paths):
                continue
            validated = None if story.is_average(name) else story.nearest(step)
            loss = None if validated is None else validated[1]
            found.append(ComparedFile(self, name, paths, step, loss, best in (name, pair, *twins)))
        return found


@dataclass(frozen=True)
class ComparedFile:
    """Hold a column: a saved LoRA; for models with two experts, the files of both."""

    source: ComparableRun
    name: str
    paths: Sequence[Path]
    step: int
    loss: float | None
    is_best: bool

    @property
    def key(self) -> str:
        return f"{self.source.run.id}/{self.name}"

    @property
    def title(self) -> str:
        return self.name.removesuffix(".safetensors").removesuffix(f"_{LOW_NOISE}")

    def samples(self) -> Iterator[SampleRow]:
        story = self.source.story
        options = dict(story.start.changed) if story.start else {}
        if story.is_average(self.name) == (options.get("sample_ema") == "True"):
            yield from (row for row in story.samples.values() if row.step == self.step)


@dataclass(frozen=True)
class ComparedPrompt:
    """Hold a row. line: a line for `--from_file`, with the settings that all columns share."""

    prompt: str
    line: str
    seed: str


@dataclass
class Comparison:
    """Hold the requested runs, columns and rows. problem: why no clips can be made; empty if they can."""

    sources: list[ComparableRun] = field(default_factory=list)
    columns: list[ComparedFile] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # prompts that have samples
    rows: list[ComparedPrompt] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)  # those of `known` that are chosen
    more: str = ""  # prompt lines that were typed
    problem: str = ""


def read_source(runs: Runs, run: Glance) -> ComparableRun | None:
    """Return a run for comparison; None if its history names no command that generates.

    Raises OSError if its history cannot be read.
    """
    story = runs.open(run).story
    families = {entry.generation_script: name for name, entry in with_scripts().items()}
    for command in story.commands:
        try:
            words, missing = shlex.split(command.bash), shlex.split(command.missing)
        except ValueError:  # an edited history
            continue
        # behind python, or behind a launcher with its options
        for place, word in enumerate(words[:MOST_BEFORE]):
            script = re.split(r"[\\/.]", word.removesuffix(".py"))[-1]
            if script in families:
                return ComparableRun(run, story, families[script], group_options(words[place + 1 :]), missing)
    return None


def working_folder(run: Glance, options: Mapping[str, Sequence[str]]) -> Path:
    """Return the folder in which a run's command was typed: the one in its history, else the one that its
    output option shows, else the browser's own.
    """
    with contextlib.suppress(OSError, ValueError):  # of a history from elsewhere
        if run.working_folder is not None and run.working_folder.is_dir():
            return run.working_folder
    told = options.get("--output_dir")
    typed = Path(*told) if told else Path(*options.get("--save_path", ())).parent
    parents = run.history.parent.parts
    count = len(parents) - len(typed.parts)
    if typed.is_absolute() or parents[count:] != typed.parts:
        return Path.cwd()
    return Path(*parents[:count])


def group_options(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the words that follow each option."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, mark, value = word.partition("=")
        if word.startswith("--"):
            found[name] = [value] if mark else []
        elif found:
            found[[*found][-1]].append(word)
    return found


def read_comparison(runs: Runs, asked: Mapping[str, Sequence[str]]) -> Comparison:
    """Return the comparison that a form asks for. Raises OptionError if its runs cannot be compared."""
    wanted = [*asked.get("file", ())]
    ids = [*asked.get("run", ()), *(key.partition("/")[0] for key in wanted)]
    found = [run for id in dict.fromkeys(ids) if (run := runs.find(id)) is not None]
    sources = [source for run in found if (source := read_source(runs, run)) is not None]
    if len(sources) < len(found):
        names = {run.name for run in found} - {source.run.name for source in sources}
        raise OptionError(f"{', '.join(sorted(names))}: its history tells no command that generates")
    if len({source.family for source in sources}) > 1:
        names = {f"{source.run.name} is of {source.family}" for source in sources}
        raise OptionError(f"Files of one model are compared: {', '.join(sorted(names))}")
    comparison = Comparison(sources, more="\n".join(asked.get("more", ())))
    for source in sources:
        files = [file for file in source.files if all(map(runs.is_inside, file.paths))]
        chosen = [file for file in files if file.key in wanted]
        place = next((at for at, file in enumerate(files) if file.is_best), len(files) - 1)
        comparison.columns += chosen or files[max(0, place - 1) :][:2]  # the best and the one before
    lines = [line for line in comparison.more.splitlines() if line.strip() and not line.startswith("#")]
    prompts = dict.fromkeys(
        prompt
        for source in sources
        for row in source.story.samples.values()
        for prompt in row.prompts.values()
    )
    comparison.known = [*prompts]
    wanted = [*asked.get("prompt", ())] or ([] if lines else comparison.known[:USUAL_ROWS])
    comparison.chosen = [prompt for prompt in comparison.known if prompt in wanted]
    usual = sources[0].options.get("--seed", [SEED])[0] if sources else SEED
    comparison.rows = [_known_row(sources, prompt, usual) for prompt in comparison.chosen]
    for line in lines:
        line, given = line.strip(), re.search(r" --(?:d|seed) +(\d+)", line)
        prompt, seed = line.partition(" --")[0].strip(), given[1] if given else usual
        comparison.rows.append(ComparedPrompt(prompt, line if given else f"{line} --seed {seed}", seed))
    if len(comparison.columns) > MOST_COLUMNS or len(comparison.rows) > MOST_ROWS:
        raise OptionError(f"{MOST_COLUMNS} files and {MOST_ROWS} prompts are the most: choose fewer")
    comparison.problem = next((source.problem for source in sources[:1] if source.problem), "")
    return comparison


def _known_row(sources: Sequence[ComparableRun], prompt: str, seed: str) -> ComparedPrompt:
    """Return the row of a prompt that has samples, with the settings of the first sample."""
    tags: Mapping[str, str] = {}
    for source in sources:
        for row in source.story.samples.values():
            for index, name in row.files.items():
                if row.prompts.get(index) == prompt and not tags:
                    tags = tags_of(source.run.history.parent / SAMPLES / name)
    told = {name.removeprefix("bt_"): text for name, text in tags.items() if text != "N/A"}
    line = f"{prompt} --seed {told.get('seeds', seed)}"
    if "height" in told and "width" in told:
        line += f" --video_size {told['height']} {told['width']}"
    for name in SETTINGS:
        text = told.get(name, "")
        if text and "\\n" not in text and " --" not in text and (name, text) != ("video_length", "1"):
            line += f" --{name} {text}"
    return ComparedPrompt(prompt, line, told.get("seeds", seed))


def tags_of(path: Path) -> Mapping[str, str]:
    with contextlib.suppress(OSError, UserError):
        status = path.stat()
        return _read_tags(path, status.st_mtime_ns, status.st_size)
    return {}


@lru_cache(maxsize=10_000)
def _read_tags(path: Path, changed: int, size: int) -> Mapping[str, str]:
    return read_tags(path)


@dataclass(frozen=True)
class ShownClip:
    """Hold a cell: the address of its clip or, without a clip, its state."""

    href: str = ""
    note: str = ""
    is_asked: bool = False  # a job makes it


def fill_cells(
    comparison: Comparison, notes: FileNotes, jobs: Mapping[tuple[str, str], tuple[int, str]]
) -> list[list[ShownClip]]:
    """Return a list of cells for each row: first the clip without LoRA, then one cell for each column.

    jobs: the result of `asked_cells`. Hashes files that were not hashed before, which takes a while.
    """
    made: dict[tuple[str, str, frozenset[str]], str] = {}
    for source in comparison.sources:
        paths = source.folder.iterdir() if source.folder.is_dir() and not source.is_link else ()
        for path in sorted(path for path in paths if COMPARED.fullmatch(f"{COMPARED_FOLDER}/{path.name}")):
            tags = tags_of(path)
            digests = {text for name, text in tags.items() if re.fullmatch(r"bt_lora\w*_sha256_\d+", name)}
            if tags.get("bt_lora_0", ": 1.0").endswith(": 1.0"):
                key = tags.get("bt_prompt", ""), tags.get("bt_seeds", ""), frozenset(digests)
                made[key] = _address(source, COMPARED_FOLDER, path.name)
    digests_of = {
        file.key: frozenset(map(notes.hash, file.paths)) if made else None for file in comparison.columns
    }
    cells = []
    for row in comparison.rows:
        of_row = [ShownClip(made.get((row.prompt, row.seed, frozenset()), ""))]
        for file in comparison.columns:
            clip = _sample_of(file, row)
            href = made.get((row.prompt, row.seed, digests_of[file.key] or frozenset("?")), "")
            if href or clip is None:
                number, state = jobs.get((str(file.paths[0]), row.line), (0, ""))
                is_asked = state in (WAITING, RUNNING)
                clip = ShownClip(href, f"job {number}: {state}" if state and not href else "", is_asked)
            of_row.append(clip)
        cells.append(of_row)
    return cells


def _sample_of(file: ComparedFile, row: ComparedPrompt) -> ShownClip | None:
    for samples in file.samples():
        for index, name in samples.files.items():
            path = file.source.run.history.parent / SAMPLES / name
            if samples.prompts.get(index) == row.prompt and path.is_file():
                seed = tags_of(path).get("bt_seeds", row.seed)
                note = f"sample with seed {seed}" if seed != row.seed else ""
                return ShownClip(_address(file.source, SAMPLES, name), note)
    return None


def _address(source: ComparableRun, *parts: str) -> Markup:
    return Markup(f"/run/{source.run.id}/{link(*parts)[2:]}")  # quoted, and no path of a folder


def asked_cells(queue: JobQueue) -> dict[tuple[str, str], tuple[int, str]]:
    """Return the number and state of the last queued job for each pair of LoRA file and prompt line."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for job in queue.jobs():
        with contextlib.suppress(OSError, ValueError, LookupError, UserError):  # lines may be typed by hand
            if job.words[:2] != SCRIPT:
                continue
            options = group_options(job.words[2:])
            for line in read_text(Path(job.folder, *options["--from_file"])).splitlines():
                found |= {(file, line): (job.id, job.state) for file in options["--lora"]}
    return found


def plan_jobs(
    comparison: Comparison, cells: Sequence[Sequence[ShownClip]]
) -> list[tuple[list[str], Path, str]]:
    """Return the jobs for the missing clips: the words of each, its prompt file and that file's text."""
    rows_of: dict[tuple[int, ...], list[ComparedPrompt]] = {}
    for row, (_, *of_row) in zip(comparison.rows, cells, strict=True):
        if row.line.splitlines() != [row.line] or row.line.startswith("#"):
            continue  # cannot be a line of a prompt file
        missing = tuple(index for index, cell in enumerate(of_row) if not (cell.href or cell.is_asked))
        rows_of.setdefault(missing, []).append(row)
    jobs = []
    for missing, rows in rows_of.items():
        if missing and not comparison.problem:
            source, files = comparison.sources[0], [comparison.columns[index].paths for index in missing]
            text = "".join(f"{row.line}\n" for row in rows)
            path = source.folder / f"prompts-{hashlib.blake2s(text.encode(), digest_size=4).hexdigest()}.txt"
            words = [*SCRIPT, "--family", source.family, "--lora", *(str(paths[0]) for paths in files)]
            if len(files[0]) > 1:
                words += ["--lora_high_noise", *(str(paths[1]) for paths in files)]
            for name, values in source.options.items():
                words += [name, *values] if name not in REPLACED else []
            words += ["--seed", SEED, "--from_file", str(path), "--save_path", str(source.folder)]
            jobs.append((words, path, text))
    return jobs
