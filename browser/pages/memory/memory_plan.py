"""The memory of a training run on the New page: the script's plan as a bar, and options that change it.

A plan is a background job in the folder, `python SCRIPT --config_file run.toml --plan GIB`. It simulates a
batch from the caches with the headers of the model's files, and needs no GPU.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit
from starlette.responses import Response

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import (
    DATASET_FILE,
    ChangedMeanwhileError,
    DescribedFolder,
    DraftFile,
    edit_toml,
    read_described,
)
from browser.folders.draft_changes import find_training_script, read_draft_file, reject_new_errors
from browser.folders.durations import describe_duration
from browser.folders.training_settings import NUMBER, read_settings
from browser.jobs.background_jobs import has_changed_since, name_background_job
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import Job
from browser.runs.runs import RUNNING
from modules.errors import UserError
from modules.pages.language import refusal, say
from modules.speed_options import BASE_FORMS
from modules.text_files import read_text
from project.model_sizes import find_memory
from project.options import RUN_FILE

PLAN = "plan"  # kind of the background job
SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GiB of common graphics cards
DEFAULT_SIZE = 24  # GiB, on a machine without a card
STOP_SECONDS = 5
TABLE_HEAD = re.compile(r"GiB +device +host")
PART = re.compile(r"( *)(.*?) {2,}(\d+\.\d+)")
CUDA_CONTEXT_SIZE = re.compile(r"about (\d+\.\d+) of CUDA itself")
# storage formats of the transformer's weights -> options that select them
WEIGHT_FORMAT_SWITCHES = {form.name: form.switches for form in BASE_FORMS}
CHECKPOINTING_SWITCHES = {
    "recomputed": ("gradient_checkpointing",),
    "offloaded": ("gradient_checkpointing", "gradient_checkpointing_cpu_offload"),
}
SWAP_KEY = "blocks_to_swap"


@dataclass(frozen=True)
class PlannedPart:
    """A row of a memory plan: a phase of the training run, or a part of the memory that a phase takes."""

    name: str
    device_gib: float
    host_gib: float
    note: str


@dataclass(frozen=True)
class ReadPlan:
    """Memory plan printed by a training script: the phase that needs most memory, divided into parts."""

    phase: PlannedPart
    parts: Sequence[PlannedPart]
    remarks: Sequence[str]  # the lines below the table, the verdict among them

    @property
    def cuda_gib(self) -> float:
        """GPU memory in GiB that the CUDA context takes."""
        match = CUDA_CONTEXT_SIZE.search(" ".join(self.remarks))
        return float(match[1]) if match else 0.0

    @property
    def fits(self) -> bool | None:
        """Whether the training run fits the card's memory; None if the plan was made without a card."""
        verdicts = {"Fits": True, "Does not fit": False}
        for remark in self.remarks:
            if remark.partition(":")[0] in verdicts:
                return verdicts[remark.partition(":")[0]]
        return None

    def segments(self, size: float) -> list[tuple[PlannedPart, float]]:
        """Return the parts of memory on the card, each with its percentage of the bar's length.

        `size` is the card's memory in GiB.
        """
        cuda = PlannedPart(say("CUDA itself"), self.cuda_gib, 0.0, "")
        parts = [part for part in (*self.parts, cuda) if part.device_gib]
        bar_gib = max(size, sum(part.device_gib for part in parts))
        return [(part, 100 * part.device_gib / bar_gib) for part in parts]

    def card_share(self, size: float) -> float:
        """Return where the card's memory ends on the bar, in percent of the bar's length."""
        needed_gib = sum(part.device_gib for part in self.parts) + self.cuda_gib
        return 100 * size / max(size, needed_gib)


def read_plan(text: str) -> ReadPlan | None:
    """Parse the memory plan that a training script has printed for one GPU; None if there is none.

    The plan is a table of phases, each with the indented parts of its memory below it.
    """
    lines = text.splitlines()
    head_indices = [index for index, line in enumerate(lines) if TABLE_HEAD.fullmatch(line.rstrip())]
    if not head_indices:
        return None
    head_index = head_indices[-1]  # the last table: the log may contain several plans
    phases: list[PlannedPart] = []
    parts_by_phase: list[list[PlannedPart]] = []
    remarks: list[str] = []
    for index in range(head_index + 1, len(lines)):
        row = _read_table_row(lines[index], head=lines[head_index])
        if row is None:
            remarks = [line.strip() for line in lines[index:] if line.strip()]
            break
        if row.is_indented:
            parts_by_phase[-1].append(row.part)
        else:
            phases.append(row.part)
            parts_by_phase.append([])
    if not phases:
        return None
    largest = max(range(len(phases)), key=lambda index: phases[index].device_gib)
    return ReadPlan(phases[largest], parts_by_phase[largest], remarks)


class _TableRow(NamedTuple):
    """A row of a printed memory plan."""

    part: PlannedPart
    is_indented: bool  # a part of the phase above


def _read_table_row(line: str, head: str) -> _TableRow | None:
    """Parse a row of a printed plan, whose numbers are right-aligned below the titles in `head`."""
    device_end = head.index("device") + len("device")
    host_end = head.index("host") + len("host")
    match = PART.fullmatch(line[:device_end])
    if match is None:
        return None
    host = line[device_end:host_end].strip()
    part = PlannedPart(
        name=match[2].strip(),
        device_gib=float(match[3]),
        host_gib=float(host) if host else 0.0,
        note=line[host_end:].strip(),
    )
    return _TableRow(part, is_indented=match[1] != "")


@dataclass(frozen=True)
class MemoryOptions:
    """The keys of run.toml with the largest effect on memory, as the page shows them."""

    swap: str  # number of swapped blocks
    weights: str  # name of WEIGHTS; "": 16 bits
    checkpointing: str  # name of CHECKPOINTING; "": activations stay on the card
    weight_choices: Sequence[str]
    checkpointing_choices: Sequence[str]
    can_swap: bool


def _find_used_choice(
    keys_by_choice: Mapping[str, Sequence[str]], values: Mapping[str, Any], option_names: Sequence[str]
) -> str:
    """Return the last choice whose options, as far as the script has them, are all set; "" if none."""
    used_choice = ""
    for choice, keys in keys_by_choice.items():
        if all(values.get(key) for key in keys if key in option_names):
            used_choice = choice
    return used_choice


def read_switches(values: Mapping[str, Any], option_names: Sequence[str]) -> MemoryOptions:
    """Return the memory options of a run.toml. `option_names` are all options of its training script."""
    # one switch is enough for a weight format, because scripts have different ones of its switches
    weights = {
        choice: keys
        for choice, keys in WEIGHT_FORMAT_SWITCHES.items()
        if any(key in option_names for key in keys)
    }
    checkpointing = {
        choice: keys
        for choice, keys in CHECKPOINTING_SWITCHES.items()
        if all(key in option_names for key in keys)
    }
    return MemoryOptions(
        swap=str(values.get(SWAP_KEY, "")),
        weights=_find_used_choice(weights, values, option_names),
        checkpointing=_find_used_choice(checkpointing, values, option_names),
        weight_choices=list(weights),
        checkpointing_choices=list(checkpointing),
        can_swap=SWAP_KEY in option_names,
    )


def edit_switches(
    text: str, current: MemoryOptions, fields: Mapping[str, str], option_names: Sequence[str]
) -> str:
    """Return the text of run.toml with the memory options that the form has changed.

    `current` are the memory options in `text`, `option_names` are all options of the training script. Raises
    ValueError if `text` is not TOML.
    """
    changes: dict[str, Any] = {}
    swap = fields.get("swap", "").strip()
    if current.can_swap and swap != current.swap:
        # the value is a number of blocks or a word; an empty field removes the option
        changes[SWAP_KEY] = tomlkit.value(swap) if NUMBER.fullmatch(swap) else swap or None
    weights = fields.get("weights", "")
    if weights != current.weights:
        changes |= _select_choice(WEIGHT_FORMAT_SWITCHES, weights, option_names)
    checkpointing = fields.get("checkpointing", "")
    if checkpointing != current.checkpointing:
        changes |= _select_choice(CHECKPOINTING_SWITCHES, checkpointing, option_names)
    return edit_toml(text, changes)


def _select_choice(
    keys_by_choice: Mapping[str, Sequence[str]], choice: str, option_names: Sequence[str]
) -> dict[str, Any]:
    """Return the changes to run.toml for a selected memory option, such as fp8 weights."""
    # They set the keys of this choice, and remove (None) the keys of all other choices.
    # Only keys in `option_names`, the training script's options, are set. The choice "" removes all keys, and
    # an unknown choice changes nothing.
    if choice not in ("", *keys_by_choice):
        return {}
    changes: dict[str, Any] = {key: None for keys in keys_by_choice.values() for key in keys}
    for key in keys_by_choice.get(choice, ()):
        if key in option_names:
            changes[key] = True
    return changes


@dataclass(frozen=True)
class PrintedLine:
    """A line that a plan has printed. `command` is a command in it, which can be added to the queue."""

    text: str
    command: str = ""


class MemoryPages:
    """Shows and plans the memory of a folder's training run, and changes memory options in run.toml."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, folder: Path, _: Mapping[str, str]) -> Response:
        """Return the HTML of the section about the training run's memory."""
        return self.answer(folder)

    def answer(self, folder: Path, error: str = "", message: str = "") -> Response:
        """Return the HTML of the memory section, with an error or a message about a button's action."""
        described = read_described(folder)
        run_file = read_draft_file(self.site, folder, RUN_FILE)
        job = self.site.background_jobs.find(name_background_job(PLAN, folder))
        card_gib = find_memory()
        size = self.planned_size(job, card_gib)
        plan = self.read_plan(job)
        settings = read_settings(find_training_script(run_file.text))
        values = {
            "folder": folder,
            "run_checksum": run_file.checksum,
            "run_text": run_file.text,
            "switches": read_switches(described.values, [setting.name for setting in settings]),
            "job": job,
            "plan": plan,
            "lines": self.printed_lines(job, folder) if plan is None else [],
            "is_old": plan is not None and self.is_old(job, folder),
            "card": card_gib,
            "size": size,
            "sizes": sorted({*SIZES, size, *([card_gib] if card_gib else [])}),
            "missing": self.list_missing(described),
            "duration": describe_duration(self.site.runs, described, described.steps),
            "command": format_command(self.plan_argv(run_file, size), folder),
            "can_write": not self.site.read_only,
            "error": error,
            "message": message,
        }
        return answer_template("memory/memory_bar.html", say("Memory"), values, is_rejected=error != "")

    def planned_size(self, job: Job | None, card: float) -> float:
        """Return the GPU memory in GiB for which the last plan was made; without a plan, this machine's."""
        try:
            return float(job.argv[-1]) if job is not None else card or DEFAULT_SIZE
        except (UserError, ValueError, IndexError):
            return card or DEFAULT_SIZE

    def read_plan(self, job: Job | None) -> ReadPlan | None:
        """Return the memory plan that a job has printed; None if it failed, is running or printed none."""
        if job is None or job.state == RUNNING or job.code != 0:
            return None
        try:
            return read_plan(read_text(job.log))
        except (OSError, ValueError):
            return None

    def is_old(self, job: Job | None, folder: Path) -> bool:
        """Return whether run.toml or dataset.toml has changed since the plan's job was started."""
        return job is not None and has_changed_since(job, folder, (RUN_FILE, DATASET_FILE))

    def printed_lines(self, job: Job | None, folder: Path) -> list[PrintedLine]:
        """Return the lines that a job has printed; commands that write caches can be added to the queue."""
        if job is None:
            return []
        lines = []
        for line in job.last_lines().splitlines():
            text = line.strip()
            is_command = line.startswith("  ") and text.startswith(("python ", "reelsmith "))
            command = f"cd {shlex.quote(str(folder))} && {text}" if is_command else ""
            if text:
                lines.append(PrintedLine(text, command))
        return lines

    def list_missing(self, described: DescribedFolder) -> list[str]:
        """Return the model's missing files, with their paths as they are written in run.toml."""
        paths = described.model_files.values()
        return [path for path in paths if not (described.folder / path).exists()]

    def plan_argv(self, file: DraftFile, size: float) -> list[str]:
        """Return the command that plans the run for a GPU with `size` GiB. `file` is the run.toml."""
        script = find_training_script(file.text)
        return ["python", script, "--config_file", RUN_FILE, "--plan", f"{size:g}"]

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Plan the run's memory for a GPU, or stop planning; "switch" first writes changed memory options."""
        if action not in (PLAN, "switch", "stop"):
            return answer_unknown()
        message = ""
        try:
            if action == "stop":
                self.site.background_jobs.stop(name_background_job(PLAN, folder))
                return self.answer(folder)
            if action == "switch":
                message = self.write_switches(folder, fields)
            self.plan(folder, read_size(fields.get("size", "")))
        except ChangedMeanwhileError:
            conflict = say(
                "%(run_file)s has changed in the meantime, and was not overwritten. This is its "
                "current content.",
                run_file=RUN_FILE,
            )
            return self.answer(folder, conflict)
        except (OSError, ValueError, UserError) as error:
            return self.answer(folder, str(error), message)
        return self.answer(folder, message=message)

    def write_switches(self, folder: Path, fields: Mapping[str, str]) -> str:
        """Write a form's memory options into run.toml, and return a message with the changed lines.

        Raises ChangedMeanwhileError if run.toml has changed since the page was loaded.
        """
        draft = read_draft_file(self.site, folder, RUN_FILE)
        if draft.checksum != fields.get("have", ""):  # the checksum that the page was built with
            raise ChangedMeanwhileError
        text = draft.text
        option_names = [setting.name for setting in read_settings(find_training_script(text))]
        current = read_switches(read_described(folder).values, option_names)
        new_text = edit_switches(text, current, fields, option_names)
        if new_text == text:
            return ""
        self.site.tracked_runs.reject_while_it_runs(folder)
        note = reject_new_errors(draft, new_text, text)
        draft.save(new_text)
        changed_lines = [f"-{line}" for line in text.splitlines() if line not in new_text.splitlines()]
        changed_lines += [f"+{line}" for line in new_text.splitlines() if line not in text.splitlines()]
        return say(
            "Saved into %(run_file)s: %(names)s. %(note)s",
            run_file=RUN_FILE,
            names="; ".join(changed_lines),
            note=note,
            # without a note, the text ends after the lines
        ).rstrip(". ")

    def plan(self, folder: Path, size: float) -> None:
        """Start planning a folder's run for a GPU with `size` GiB, and stop a plan that is still running."""
        missing = self.list_missing(read_described(folder))
        if missing:
            raise refusal(
                "%(missing)s is missing. A plan reads the headers of the model's files: "
                "download them first (Start does, with --download).",
                missing=missing[0],
            )
        argv = self.plan_argv(read_draft_file(self.site, folder, RUN_FILE), size)
        name = name_background_job(PLAN, folder)
        job = self.site.background_jobs.find(name)
        if job is not None and job.state == RUNNING:
            self.site.background_jobs.stop(name)
            self.site.background_jobs.wait(name, STOP_SECONDS)
        self.site.background_jobs.start(name, argv, folder, within=folder)


def read_size(text: str) -> float:
    """Return a card's memory in GiB from its form field. Raises OptionError if it is not a number."""
    if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?", text) or not float(text):
        raise refusal(
            "%(text)s: enter the GiB of the card, such as %(usual_size)s",
            text=text or "nothing",
            usual_size=DEFAULT_SIZE,
        )
    return float(text)
