"""Compare saved LoRA files: show samples and clips of each.

The script tools/compare.py generates the missing clips.

A row is a prompt with all its settings, a column is a file at strength 1. A clip is found by its metadata
(prompt, seed, SHA-256 of its LoRA), so that two files of the same name are never confused.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from browser.core.short_names import short_digest
from browser.jobs.jobs import WAITING, JobQueue
from browser.runs.comparable_runs import (
    COMPARISON_OPTIONS,
    ComparableRun,
    ComparedFile,
    group_options,
    read_source,
)
from browser.runs.run_views import COMPARED, COMPARED_FOLDER, FileNotes
from browser.runs.runs import RUNNING, Runs, RunSummary
from downloads.catalogue import model_title
from generation.prompt_lines import split_line
from modules.errors import UserError
from modules.media.reading import read_tags
from modules.pages.language import join, refusal, say
from modules.pages.page import link
from modules.text_files import read_text
from protocols.families import HIGH_NOISE
from training.reports.sections import SAMPLES

MAX_COLUMNS = 24
MAX_ROWS = 40
DEFAULT_ROWS = 8
SCRIPT = ["python", "tools/compare.py"]
DEFAULT_SEED = "0"  # if neither the prompt nor the run has a seed: all columns need the same seed
# prompt-line options that the metadata of a clip contain
# fmt: off
PROMPT_LINE_OPTIONS = (
    "infer_steps", "guidance_scale", f"guidance_scale_{HIGH_NOISE}", "embedded_cfg_scale", "flow_shift",
    "video_length", "video_seconds", "video_sections", "negative_prompt",
)
# fmt: on


@dataclass(frozen=True)
class ComparedPrompt:
    """A row of the comparison: a line for `--from_file`, with the prompt and settings for all columns."""

    prompt: str
    line: str
    seed: str


@dataclass(frozen=True)
class Comparison:
    """The runs that are compared, their files as columns, and prompts as rows."""

    sources: Sequence[ComparableRun] = ()
    columns: Sequence[ComparedFile] = ()
    rows: Sequence[ComparedPrompt] = ()
    sampled_prompts: Sequence[str] = ()  # prompts that have samples, which the user may select
    selected_prompts: Sequence[str] = ()  # the prompts shown as rows
    typed_lines: str = ""  # prompt lines that the user has typed
    problem: str = ""  # reason why no clips can be generated; "" if they can


def read_comparison(runs: Runs, form: Mapping[str, Sequence[str]]) -> Comparison:
    """Return the comparison of saved LoRA files that a form requests.

    The rows are the selected prompts and the typed prompt lines. If the form has none, the first prompts
    with samples are used. Raises OptionError if the runs cannot be compared.
    """
    sources = _read_sources(runs, form)  # the selected runs
    columns: list[ComparedFile] = []
    for source in sources:
        columns += _select_files(runs, source, form.get("file", ()))
    sampled_prompts = _list_prompts(sources)
    typed_lines = "\n".join(form.get("more", ())).replace("\r\n", "\n")
    prompt_lines = [line for line in typed_lines.split("\n") if line.strip() and not line.startswith("#")]
    selected_prompts = [prompt for prompt in sampled_prompts if prompt in form.get("prompt", ())]
    if not form.get("prompt") and not prompt_lines:
        selected_prompts = sampled_prompts[:DEFAULT_ROWS]
    rows = _make_rows(sources, selected_prompts, prompt_lines)
    if len(columns) > MAX_COLUMNS or len(rows) > MAX_ROWS:
        raise refusal(
            "at most %(max_columns)s files and %(most_rows)s prompts can be compared: choose fewer",
            max_columns=MAX_COLUMNS,
            most_rows=MAX_ROWS,
        )
    return Comparison(
        sources=sources,
        columns=columns,
        rows=rows,
        sampled_prompts=sampled_prompts,
        selected_prompts=selected_prompts,
        typed_lines=typed_lines,
        # the command of the first run generates the clips of all columns
        problem=sources[0].problem if sources else "",
    )


def find_runs_without_files(runs: Sequence[RunSummary]) -> set[str]:
    """Return the ids of runs without a saved file in their folder, without reading their histories."""
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
    """Return the runs that a form names directly or by a file."""
    # the key of a file is RUN_ID/NAME
    ids = [*form.get("run", ()), *(key.partition("/")[0] for key in form.get("file", ()))]
    found_runs = [runs.find(id) for id in dict.fromkeys(ids)]
    chosen_runs = [run for run in found_runs if run is not None]
    found_sources = [read_source(runs, run) for run in chosen_runs]
    sources = [source for source in found_sources if source is not None]
    if len(sources) < len(chosen_runs):
        names = {run.name for run in chosen_runs} - {source.run.name for source in sources}
        raise refusal("%(names)s: no generation command in its history", names=join(", ", sorted(names)))
    _reject_different_families(sources)
    return sources


def _reject_different_families(sources: Sequence[ComparableRun]) -> None:
    """Raise OptionError with the family of each run if they are not all the same."""
    if len({source.family for source in sources}) <= 1:
        return
    models = {
        say("%(name)s: %(family)s", name=source.run.name, family=model_title(source.family))
        for source in sources
    }
    raise refusal("Only files of the same model can be compared: %(names)s", names=join(", ", sorted(models)))


def _select_files(runs: Runs, source: ComparableRun, keys: Sequence[str]) -> list[ComparedFile]:
    """Return a run's files with these keys; without keys, the best file and the file saved before it."""
    files = [file for file in source.files if all(map(runs.is_inside, file.paths))]
    chosen = [file for file in files if file.key in keys]
    if chosen:
        return chosen
    best_index = next((index for index, file in enumerate(files) if file.is_best), len(files) - 1)
    return files[max(0, best_index - 1) :][:2]


def _make_rows(
    sources: Sequence[ComparableRun], prompts: Sequence[str], prompt_lines: Sequence[str]
) -> list[ComparedPrompt]:
    """Return one row for each prompt with samples, and one for each prompt line that the user has typed."""
    seed = sources[0].options.get("--seed", [DEFAULT_SEED])[0] if sources else DEFAULT_SEED
    rows = [_make_sampled_row(sources, prompt, seed) for prompt in prompts]
    return rows + [_make_typed_row(line, seed) for line in prompt_lines]


def _list_prompts(sources: Sequence[ComparableRun]) -> list[str]:
    """Return each distinct prompt that has samples."""
    prompts: dict[str, None] = {}
    for source in sources:
        for row in source.run_history.samples.values():
            prompts |= dict.fromkeys(row.prompts.values())
    return list(prompts)


def _make_typed_row(line: str, seed: str) -> ComparedPrompt:
    """Return the row of a typed prompt line. `seed` applies if the line does not set one."""
    line = line.strip()
    split = split_line(line)
    prompt = split.prompt.strip()
    typed_seeds = [re.fullmatch(r"(?:d|seed) +(\d+)", option.strip()) for option in split.options]
    for typed_seed in typed_seeds:
        if typed_seed:
            return ComparedPrompt(prompt, line, typed_seed[1])
    return ComparedPrompt(prompt, f"{line} --seed {seed}", seed)


def _make_sampled_row(sources: Sequence[ComparableRun], prompt: str, default_seed: str) -> ComparedPrompt:
    """Return the row of a prompt with samples, with the settings of its first sample."""
    settings: dict[str, str] = {}
    for name, text in _first_tags(sources, prompt).items():  # metadata, such as bt_seeds
        if text != "N/A":
            settings[name.removeprefix("bt_")] = text
    seed = settings.get("seeds", default_seed)
    line = f"{prompt} --seed {seed}"
    if "height" in settings and "width" in settings:
        line += f" --video_size {settings['height']} {settings['width']}"
    for name in PROMPT_LINE_OPTIONS:
        text = settings.get(name, "")
        # a line break or two dashes would end the option's value in a prompt line
        fits_in_line = "\\n" not in text and " --" not in text
        is_default_length = (name, text) == ("video_length", "1")  # the default of image models
        if text and fits_in_line and not is_default_length:
            line += f" --{name} {text}"
    return ComparedPrompt(prompt, line, seed)


def _first_tags(sources: Sequence[ComparableRun], prompt: str) -> Mapping[str, str]:
    """Return the metadata of a prompt's first sample that has any."""
    for source in sources:
        for row in source.run_history.samples.values():
            for index, name in row.files_as_trained.items():
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
    """A cell of the comparison: the URL of its image or clip, or the state of the job that generates it."""

    href: str = ""
    note: str = ""
    is_queued: bool = False  # a job generates it

    @property
    def is_missing(self) -> bool:
        """Whether there is neither a clip nor a queued job that generates it."""
        return not self.href and not self.is_queued


class ClipKey(NamedTuple):
    """Key of a generated image or clip: its prompt, its seed and the hashes of its LoRA files."""

    prompt: str
    seed: str
    digests: frozenset[str]  # SHA-256 of its LoRA files; none for a clip without LoRA


class QueuedClip(NamedTuple):
    """The newest queued job that generates a clip of the comparison."""

    number: int
    state: str


QueuedClips = Mapping[tuple[str, str], QueuedClip]  # keyed by LoRA file and prompt line


@dataclass(frozen=True)
class RowClips:
    """One row of the comparison: a clip without a LoRA, and one clip for each LoRA file (column)."""

    without_lora: ShownClip
    with_lora: Sequence[ShownClip]


def find_row_clips(comparison: Comparison, notes: FileNotes, queued_clips: QueuedClips) -> list[RowClips]:
    """Return the cells of each row of a comparison: generated clips, samples, and queued jobs.

    `queued_clips` is the result of `find_queued_clips`. LoRA files without a cached hash are hashed, which
    takes a while.
    """
    addresses = _find_generated_clips(comparison)
    digests: dict[str, frozenset[str]] = {}
    if addresses:  # hashing takes long, and without clips there is nothing to find by the digests
        digests = {file.key: frozenset(map(notes.hash, file.paths)) for file in comparison.columns}
    row_clips = []
    for row in comparison.rows:
        key_without_lora = ClipKey(row.prompt, row.seed, frozenset())
        clips = []
        for file in comparison.columns:
            address = ""
            if addresses:
                address = addresses.get(ClipKey(row.prompt, row.seed, digests[file.key]), "")
            clips.append(_fill_cell(file, row, address, queued_clips))
        row_clips.append(RowClips(ShownClip(addresses.get(key_without_lora, "")), with_lora=clips))
    return row_clips


def _find_generated_clips(comparison: Comparison) -> dict[ClipKey, str]:
    """Return the URLs of the clips that tools/compare.py generated without a LoRA or at strength 1."""
    # A clip's metadata, in keys that begin with `bt_`, contains its prompt, seed, LoRAs and their SHA-256.
    addresses: dict[ClipKey, str] = {}
    for source in comparison.sources:
        if not source.folder.is_dir() or source.is_link:
            continue
        for path in sorted(source.folder.iterdir()):
            if not COMPARED.fullmatch(f"{COMPARED_FOLDER}/{path.name}"):
                continue
            tags = read_clip_tags(path)
            lora = tags.get("bt_lora_0")  # `NAME: STRENGTH`
            if lora is None or lora.endswith(": 1.0"):  # columns show LoRAs at strength 1 only
                digests = {
                    text for name, text in tags.items() if re.fullmatch(r"bt_lora\w*_sha256_\d+", name)
                }
                key = ClipKey(tags.get("bt_prompt", ""), tags.get("bt_seeds", ""), frozenset(digests))
                addresses[key] = _address(source, COMPARED_FOLDER, path.name)
    return addresses


def _fill_cell(file: ComparedFile, row: ComparedPrompt, address: str, queued_clips: QueuedClips) -> ShownClip:
    """Return the generated clip of a file and a prompt, or a sample, or the state of the queued job."""
    # `address` is the URL of the generated clip; "" if there is none.
    if not address:
        sample = _find_sample(file, row)
        if sample is not None:
            return sample
    job = queued_clips.get((str(file.paths[0]), row.line))
    if job is None:
        return ShownClip(address)
    note = "" if address else say("job %(number)s: %(state)s", number=job.number, state=job.state)
    return ShownClip(address, note, is_queued=job.state in (WAITING, RUNNING))


def _find_sample(file: ComparedFile, row: ComparedPrompt) -> ShownClip | None:
    for samples in file.samples():
        for index, name in samples.files_as_trained.items():
            path = file.source.run.history.parent / SAMPLES / name
            if samples.prompts.get(index) == row.prompt and path.is_file():
                seed = read_clip_tags(path).get("bt_seeds", row.seed)
                note = say("sample with seed %(seed)s", seed=seed) if seed != row.seed else ""
                return ShownClip(_address(file.source, SAMPLES, name), note)
    return None


def _address(source: ComparableRun, *parts: str) -> Markup:
    return Markup(f"/run/{source.run.id}/{link(*parts)[2:]}")  # quoted, and without folders


def find_queued_clips(queue: JobQueue) -> dict[tuple[str, str], QueuedClip]:
    """Return the newest queued job for each pair of LoRA file and prompt line."""
    clips: dict[tuple[str, str], QueuedClip] = {}
    for job in queue.jobs():
        with contextlib.suppress(OSError, ValueError, LookupError, UserError):  # an invalid manual line
            if job.argv[:2] != SCRIPT:
                continue
            options = group_options(job.argv[2:])
            lines = read_text(Path(job.folder, *options["--from_file"])).split("\n")
            for line in lines:
                for file in options["--lora"]:
                    clips[file, line] = QueuedClip(job.id, job.state)
    return clips


class PlannedJob(NamedTuple):
    """A generation command for the comparison's missing clips, with the prompt file that it reads."""

    argv: list[str]
    prompt_file: Path
    prompts: str  # text of that file


def plan_jobs(comparison: Comparison, row_clips: Sequence[RowClips]) -> list[PlannedJob]:
    """Return the jobs that generate a comparison's missing clips. `row_clips` are its cells.

    Rows that lack clips of the same LoRA files share one job.
    """
    if comparison.problem:
        return []
    rows_by_missing_columns: dict[tuple[int, ...], list[ComparedPrompt]] = {}  # keyed by column indices
    for row, clips in zip(comparison.rows, row_clips, strict=True):
        can_be_prompt_line = bool(row.line) and "\n" not in row.line and not row.line.startswith("#")
        missing_columns = tuple(index for index, clip in enumerate(clips.with_lora) if clip.is_missing)
        if can_be_prompt_line and missing_columns:
            rows_by_missing_columns.setdefault(missing_columns, []).append(row)
    jobs = []
    for missing_columns, rows in rows_by_missing_columns.items():
        files = [comparison.columns[index] for index in missing_columns]
        jobs.append(_plan_job(comparison.sources[0], files, rows))
    return jobs


def _plan_job(
    source: ComparableRun, files: Sequence[ComparedFile], rows: Sequence[ComparedPrompt]
) -> PlannedJob:
    """Return the job that generates a clip for each pair of LoRA file and prompt, with a run's options."""
    prompts = "".join(f"{row.line}\n" for row in rows)
    digest = short_digest(prompts, 4)
    prompt_file = source.folder / f"prompts-{digest}.txt"
    argv = [*SCRIPT, "--family", source.family, "--lora", *(str(file.paths[0]) for file in files)]
    if len(files[0].paths) > 1:  # each column is a pair of files, one for each expert of Wan 2.2
        argv += ["--lora_high_noise", *(str(file.paths[1]) for file in files)]
    for name, values in source.options.items():
        if name not in COMPARISON_OPTIONS:  # this job sets these itself
            argv += [name, *values]
    argv += ["--seed", DEFAULT_SEED, "--from_file", str(prompt_file), "--save_path", str(source.folder)]
    return PlannedJob(argv, prompt_file, prompts)
