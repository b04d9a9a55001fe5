"""Runs whose saved LoRAs can be compared or used: the generation command of each, and its files."""

import contextlib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from browser.runs.run_views import COMPARED_FOLDER
from browser.runs.runs import Runs, RunSummary
from modules.extension_words import split_extensions
from modules.installation import FRONT_SCRIPT, MAX_BEFORE
from modules.pages.language import say
from modules.script_words import name_words
from modules.text_files import real_path
from protocols.families import HIGH_NOISE, LOW_NOISE, with_scripts
from training.reports.history import PageCommand, RunHistory, SampleRow
from training.reports.page import list_files
from training.reports.present_files import current_commands
from training.reports.scores import find_best_file

LORA = "--lora_weight"
# generation options that the comparison sets itself, or that would write into other folders
# fmt: off
COMPARISON_OPTIONS = {
    LORA, f"{LORA}_{HIGH_NOISE}", "--lora_multiplier", f"--lora_multiplier_{HIGH_NOISE}", "--prompt",
    "--seed", "--save_path", "--from_file", "--config_file", "--console_log_file",
}
# fmt: on
FRONT_NAME = Path(FRONT_SCRIPT).stem
PLACEHOLDER = re.compile(r"[A-Z0-9_.]+_FILE")


@dataclass(frozen=True)
class ComparableRun:
    """A run whose saved files can be compared, and the generation options that load its model."""

    run: RunSummary
    run_history: RunHistory
    family: str  # as named by tools/compare.py
    options: Mapping[str, Sequence[str]]  # option -> its arguments
    unfilled_words: Sequence[str] = ()  # words of the command that the user has to replace

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
        """Folder in which the run's command was typed, even if its history does not record it."""
        return working_folder(self.run, self.options)

    @property
    def problem(self) -> str:
        """Reason why no clip can be generated with this run's LoRA files; "" if clips can be generated."""
        for name, values in self.options.items():
            if name in COMPARISON_OPTIONS:  # the comparison replaces their values
                continue
            if any(word in self.unfilled_words or PLACEHOLDER.fullmatch(word) for word in values):
                return say(
                    "%(name)s was trained without %(name2)s, which is needed to generate clips",
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
        """Saved LoRA files that still exist, sorted by step. Only one of several equal files is listed."""
        folder = self.run.history.parent
        best = find_best_file(folder, self.run.name, self.run_history)  # by scores or losses
        best_name = None if best is None else best.name
        saved_files = list_files(self.run_history, folder)
        files = [self._find_file(step, equal_names, best_name) for step, equal_names in saved_files]
        return [file for file in files if file is not None]

    def _find_file(
        self, step: int, equal_names: Sequence[str], best_name: str | None
    ) -> "ComparedFile | None":
        """Return a saved file; None if it is not a LoRA to list, or does not exist any more."""
        name = equal_names[0]
        is_high_noise = f"_{HIGH_NOISE}." in name  # listed together with the file of the low-noise expert
        # the embedding of a trigger word is used together with a LoRA
        if is_high_noise or self.run_history.is_embedding(name):
            return None
        # for the low-noise expert, also the file for the high-noise expert
        path = self.run.history.parent / name
        high_noise_path = path.with_name(path.name.replace(f"_{LOW_NOISE}.", f"_{HIGH_NOISE}."))
        paths = [path] if high_noise_path == path else [path, high_noise_path]
        if not all(path.is_file() for path in paths):
            return None
        is_average = self.run_history.is_average(name)
        validation = None if is_average else self.run_history.nearest_validation(step)
        return ComparedFile(
            source=self,
            name=name,
            paths=paths,
            step=step,
            loss=None if validation is None else validation.loss,
            # of a pair, the best file may be the one for the high-noise expert
            is_best=best_name in (paths[-1].name, *equal_names),
            copies=equal_names[1:],
        )


@dataclass(frozen=True)
class ComparedFile:
    """A column of the comparison: a saved LoRA file, or two files for a model with two experts."""

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
        """File name without its extension and without the expert's suffix."""
        return self.name.removesuffix(".safetensors").removesuffix(f"_{LOW_NOISE}")

    @property
    def step_title(self) -> str:
        """Title of the column: the step, or the file's name if it has more than the run and step."""
        name = re.escape(self.source.run.name)
        if re.fullmatch(rf"{name}-step\d+", self.title):
            return say("step %(step)s", step=f"{self.step:,}")
        return self.title

    def samples(self) -> Iterator[SampleRow]:
        """Yield the samples that the training run generated with exactly these weights.

        Averaged (EMA) weights match only samples that were generated with `--sample_ema`, and plain weights
        only samples that were generated without it.
        """
        run_history = self.source.run_history
        options = dict(run_history.start.changed) if run_history.start else {}
        if run_history.is_average(self.name) == (options.get("sample_ema") == "True"):
            yield from (row for row in run_history.samples.values() if row.step == self.step)


def read_source(runs: Runs, run: RunSummary) -> ComparableRun | None:
    """Return a run with the first generation command in its history; None if the history has none.

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
            unfilled_words=command.unfilled_words,
        )
    return None


def trains_lora(runs: Runs, run: RunSummary) -> bool:
    """Return whether the generation command of a run loads its files as LoRAs."""
    with contextlib.suppress(OSError):
        source = read_source(runs, run)
        return source is not None and LORA in source.options
    return False


class _TypedCommand(NamedTuple):
    """A command that a run's history suggests, split into this project's script and its arguments."""

    line: str
    script: str
    argv: Sequence[str]  # arguments of the script
    unfilled_words: Sequence[str]  # words that the user has to replace


def _read_commands(commands: Iterable[PageCommand], scripts: Collection[str]) -> Iterator[_TypedCommand]:
    """Yield the commands from a run's history that start one of the given scripts."""
    for command in commands:
        try:
            argv = shlex.split(command.bash)
            unfilled_words = shlex.split(command.missing)
        except ValueError:  # a manually edited history
            continue
        _, argv = split_extensions(argv)
        # the script's name follows `python`, or a launcher and its options; with extensions, `reelsmith.py`
        # and the words of the script follow
        for index, word in enumerate(argv[:MAX_BEFORE]):
            script = re.split(r"[\\/.]", word.removesuffix(".py"))[-1]
            if script == FRONT_NAME:
                script, argv = _find_words(argv, index, scripts)
            if script in scripts:
                yield _TypedCommand(command.bash, script, argv[index + 1 :], unfilled_words)
                break


def _find_words(argv: list[str], index: int, scripts: Collection[str]) -> tuple[str, list[str]]:
    """Return the script that the words after the front script name ("": none), and `argv` without them."""
    following = argv[index + 1 :]
    for script in scripts:
        words = name_words(script).split()
        if following[: len(words)] == words:
            return script, [*argv[: index + 1], *following[len(words) :]]
    return "", argv


def working_folder(run: RunSummary, options: Mapping[str, Sequence[str]]) -> Path:
    """Return the folder in which a run's command was typed.

    It is recorded in the run's history. For a history of an older version, it is derived from the command's
    output option. If that fails, the browser's own working folder is returned.
    """
    with contextlib.suppress(OSError, ValueError):  # the history may come from another machine
        if run.working_folder is not None and run.working_folder.is_dir():
            return run.working_folder
    output_words = options.get("--output_dir")
    # training scripts have --output_dir; generation scripts write samples to --save_path below it
    typed_output = Path(*output_words) if output_words else Path(*options.get("--save_path", ())).parent
    output_folder = run.history.parent.parts  # the history is in the output folder
    num_working_parts = len(output_folder) - len(typed_output.parts)
    ends_as_typed = output_folder[num_working_parts:] == typed_output.parts
    if typed_output.is_absolute() or not ends_as_typed:
        return Path.cwd()
    return Path(*output_folder[:num_working_parts])


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
