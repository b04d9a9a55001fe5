"""The settings of another trainer's file in our terms, and the report about each of its keys."""

import contextlib
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modules.control_codes import shorten
from modules.text_files import real_path
from project.foreign.contract import ForeignRun, Program, TrainedNetworks, is_off
from project.foreign.sample_prompts import ForeignSample

# number of parent folders searched for files: paths are relative to the program's working folder
MAX_AROUND = 4
MAX_DIFFERENCES = 6  # settings that the first line names
NO_REASON = "this program has no such thing"
MISSPELT = 0.85  # minimum similarity of a misspelled key to a known one


class FileEpochs(NamedTuple):
    """Number of epochs that a key sets, and whether it has precedence over a number of steps."""

    key: str
    number: int
    precedence: str


class ForeignFile(NamedTuple):
    """A file that another trainer's project names: a network, or a LoRA to start from."""

    key: str
    value: str
    options: tuple[str, ...]  # names of --model_file, or network_weights; () for the base model
    is_released: bool = False  # the value also names a released model

    @property
    def is_base_model(self) -> bool:
        """Whether it is the model that is trained."""
        return not self.options


@dataclass
class ForeignDataset:
    """A dataset folder in another trainer's project file, with the dataset.toml keys for its table."""

    path: Path | None = None
    folder_key: str = ""
    table_keys: dict[str, Any] = field(default_factory=dict)
    source_keys: dict[str, str] = field(default_factory=dict)  # our key -> key in the file
    draws_fixed_number: bool = False  # whether the file's number of repeats is a number of files per epoch
    files_per_epoch: int | None = None  # files drawn per epoch; None: all, repeated num_repeats times
    is_unused: bool = False


@dataclass
class ForeignProject:
    """Settings of another trainer's project file, translated to this program's options."""

    path: Path
    program: Program
    file_keys: frozenset[str] = frozenset()  # all keys of the file
    # options of the script and keys of dataset.toml, for a program with the same names
    our_option_names: frozenset[str] = frozenset()
    run: ForeignRun = ForeignRun("lora", "")
    trained_networks: TrainedNetworks = TrainedNetworks()
    new_options: dict[str, Any] = field(default_factory=dict)  # options of `new`
    training_options: dict[str, Any] = field(default_factory=dict)  # keys of [training]
    general_keys: dict[str, Any] = field(default_factory=dict)  # keys of [general] in dataset.toml
    optimizer_arguments: dict[str, Any] = field(default_factory=dict)  # arguments of the optimizer
    network_arguments: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, ForeignDataset] = field(default_factory=dict)  # by the key of the dataset
    folder_by_key: dict[str, Path] = field(default_factory=dict)  # by key
    epoch_settings: list[FileEpochs] = field(default_factory=list)
    epoch_intervals: dict[str, FileEpochs] = field(default_factory=dict)  # by the option with steps
    warmup_fraction: tuple[str, float] | None = None  # key and fraction of the steps
    # keys without a rule that may be our options
    keys_without_rule: dict[str, Any] = field(default_factory=dict)
    source_keys: dict[str, str] = field(default_factory=dict)  # our option or key -> key in the file
    # keys that name a model -> unknown value
    unknown_models: dict[str, str] = field(default_factory=dict)
    own_files: list[ForeignFile] = field(default_factory=list)  # files that the project names
    adapters: list[tuple[str, str]] = field(default_factory=list)  # key and value of training adapters
    samples: list[ForeignSample] = field(default_factory=list)  # samples that the file asks for
    sample_keys: list[str] = field(default_factory=list)  # keys of samples
    kept_files: tuple[str, int] | None = None  # key and number of saved files to keep
    missing_packages: list[str] = field(default_factory=list)  # to install with pip before the run
    replaces_optimizer: bool = False  # the project's optimizer differs from the one used
    keeps_only_latest: bool = False  # saves are large, so keep few
    assumed_defaults: dict[str, Any] = field(default_factory=dict)  # missing keys -> the program's defaults
    adopted_keys: list[str] = field(default_factory=list)  # keys with unchanged values
    change_lines: list[str] = field(default_factory=list)  # lines
    omission_lines: list[str] = field(default_factory=list)  # lines
    differing_settings: list[str] = field(default_factory=list)  # values that are not adopted, as text
    # reason -> keys left out for it
    omitted_keys_by_reason: dict[str, list[str]] = field(default_factory=dict)
    ineffective_keys: list[str] = field(default_factory=list)  # keys without effect in the other program
    empty_keys: list[str] = field(default_factory=list)  # keys without a value
    unknown_keys: list[str] = field(default_factory=list)  # unknown keys

    @property
    def title(self) -> str:
        """Name of the trainer that wrote the file."""
        return self.program.title

    def get_file_key(self, name: str) -> str:
        """Return the key of the foreign file that set a training option or a dataset.toml key."""
        return self.source_keys.get(name, name)

    def list_clip_lengths(self) -> list[int]:
        """Return the frame counts at which clips of any folder are trained; [] if the project sets none."""
        tables = [self.general_keys, *(dataset.table_keys for dataset in self.datasets.values())]
        return [length for table in tables for length in table.get("target_frames", [])]

    def report_omitted_key(self, key: str, reason: str) -> None:
        """Record why a key is omitted from the new project. Keys with the same reason share a line."""
        self.omitted_keys_by_reason.setdefault(reason, []).append(show(key))

    def report_omitted_value(self, key: str, value: Any, reason: str) -> None:
        """Record a key that is omitted, on a report line of its own that shows its value."""
        self.omission_lines.append(f"{show(key)} = {show(value)}: {reason}")
        self.differing_settings.append(f"{show(key)} = {show(value)}")

    def report_change(self, key: str, value: Any, result: str) -> None:
        """Record a key of another trainer's file whose value is converted for this program.

        `result` describes the new setting.
        """
        self.change_lines.append(f"{show(key)} = {show(value)}: {result}")

    def remove_from_report(self, key: str) -> None:
        """Remove a key from the report's lists of adopted and converted values."""
        self.adopted_keys = [name for name in self.adopted_keys if name != key]
        self.change_lines = [line for line in self.change_lines if not line.startswith(f"{key} = ")]

    def remove_option(self, name: str, reason: str) -> None:
        """Drop a training option and report its key with `reason`; a value of off or 0 had no effect."""
        value = self.training_options.pop(name)
        key = self.get_file_key(name)
        self.remove_from_report(key)
        if key in self.assumed_defaults:
            self.assumed_defaults.pop(key)
        elif is_off(value) or value == 0:
            self.ineffective_keys.append(key)
        else:
            self.report_omitted_value(key, value, reason)

    def format_report(self, folder: Path) -> list[str]:
        """Return the lines of the report about another trainer's project file; each key occurs once.

        `folder` is the dataset folder.
        """
        return [
            f"{self.path} is a project of {self.title}; nothing of it is run.",
            *self._describe_differences(),
            *self._describe_adopted(folder),
            *[f"  changed: {text}" for text in self.change_lines],
            *self._describe_omitted(folder),
            *self._describe_unknown(),
        ]

    def _describe_differences(self) -> list[str]:
        """Return a line that names the values that are not adopted, before the lines about all keys."""
        settings = self.differing_settings
        if not settings:
            return []
        others = f" and {len(settings) - MAX_DIFFERENCES} more" if len(settings) > MAX_DIFFERENCES else ""
        shown = "; ".join(settings[:MAX_DIFFERENCES])
        return [f"  different from your project: {shown}{others}. The lines `left` below say why."]

    def _describe_adopted(self, folder: Path) -> list[str]:
        """Return lines about the keys whose values are adopted, and about the other trainer's defaults."""
        adopted_keys = [*self.adopted_keys]
        for key, other_folder in self.folder_by_key.items():
            if is_same_folder(self.path, other_folder, folder):
                adopted_keys.append(key)
        lines = []
        if adopted_keys:
            lines.append(f"  taken: {', '.join(dict.fromkeys(adopted_keys))}")
        if self.assumed_defaults:
            assumed = [f"{key} = {show(value)}" for key, value in self.assumed_defaults.items()]
            lines.append(f"  set as by {self.title}, because the file does not set it: {', '.join(assumed)}")
        return lines

    def _describe_omitted(self, folder: Path) -> list[str]:
        """Return lines about known keys that are not used; keys of other dataset folders come first."""
        lines = []
        for key, other_folder in self.folder_by_key.items():
            if not is_same_folder(self.path, other_folder, folder):
                lines.append(f"  left: {key} = {show(other_folder)}: {folder} is described")
        lines += [f"  left: {text}" for text in self.omission_lines]
        for reason, keys in self.omitted_keys_by_reason.items():
            lines.append(f"  left: {', '.join(keys)}: {reason}")
        if self.ineffective_keys:
            lines.append(
                f"  without effect there and here: {', '.join(dict.fromkeys(self.ineffective_keys))}"
            )
        if self.empty_keys:
            lines.append(f"  left, without a value: {', '.join(self.empty_keys)}")
        return lines

    def _describe_unknown(self) -> list[str]:
        """Return a line about misspelled keys, with their correct spelling, and one about unknown keys."""
        misspelled: list[str] = []
        unknown: list[str] = []
        for key in self.unknown_keys:
            similar_key = self._find_similar_key(key)
            if similar_key:
                misspelled.append(f"{key} (for {similar_key}?)")
            else:
                unknown.append(key)
        lines = []
        if misspelled:
            lines.append(f"  left, probably misspelled: {', '.join(misspelled)}")
        if unknown:
            lines.append(f"  left, {NO_REASON}: {', '.join(unknown)}")
        return lines

    def _find_similar_key(self, key: str) -> str:
        """Return a known key that is spelled almost like `key` and not in the file; "" if there is none."""
        table, _, name = key.rpartition(".")
        table_pattern = without_numbers(table)
        rules = [rule.rpartition(".") for rule in self.program.rules]
        known_names = [rule_name for rule_table, _, rule_name in rules if rule_table == table_pattern]
        known_names += [] if table else self.our_option_names
        unused_names = [
            known for known in known_names if f"{table}.{known}".lstrip(".") not in self.file_keys
        ]
        similar_names = difflib.get_close_matches(name, unused_names, 1, MISSPELT)
        return similar_names[0] if similar_names else ""


def without_numbers(key: str) -> str:
    """Return a key with [] instead of its list indices, as keys are written in the rules."""
    return re.sub(r"\[\d+\]", "[]", key)


def find_beside(file: Path, name: str) -> Path | None:
    """Return the file that a project names: next to the project, in a parent folder or in the working folder.

    Returns None if it is in none of them.
    """
    if "\0" in name:
        return None
    around = [file.parent, *list(real_path(file).parents)[1:MAX_AROUND], Path()]
    for parent in around:
        with contextlib.suppress(OSError, ValueError):  # an impossible file name
            if (parent / name).exists():
                return parent / name
    return None


def is_same_folder(file: Path, project_folder: Path, folder: Path) -> bool:
    """Return whether a project's folder and the dataset folder are the same, or one contains the other."""
    found = find_beside(file, str(project_folder))
    first = real_path(file.parent / project_folder if found is None else found)
    second = real_path(folder)
    return first == second or first in second.parents or second in first.parents


def show(value: Any) -> str:
    """Format a value as one line of at most 120 characters."""
    return shorten(" ".join(str(value).split()), 120)
