"""The settings of another trainer's file in our terms, and the report about each of its keys."""

import contextlib
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modules.control_codes import shorten
from modules.text_files import real_path
from project.foreign.contract import ForeignRun, Parts, Program, is_off

# number of parent folders searched for files: paths are relative to the program's working folder
MAX_AROUND = 4
NO_REASON = "this program has no such thing"
MISSPELT = 0.85  # minimum similarity of a misspelled key


class FileEpochs(NamedTuple):
    """Number of epochs that a key sets, and whether it has precedence over a number of steps."""

    key: str
    number: int
    counts: str


@dataclass
class ForeignDataset:
    """A dataset folder in another trainer's project file, with the settings of its table."""

    path: Path | None = None
    key: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    source_keys: dict[str, str] = field(default_factory=dict)  # our key -> key in the file
    num_drawn: int | None = None  # files drawn per epoch; None: all, repeated num_repeats times
    is_unused: bool = False


@dataclass
class ForeignProject:
    """The settings of another trainer's project file, translated into options of ours."""

    path: Path
    program: Program
    keys: frozenset[str] = frozenset()  # all keys of the file
    # options of the script and keys of dataset.toml, for a program with the same names
    options: frozenset[str] = frozenset()
    run: ForeignRun = ForeignRun("lora", "")
    parts: Parts = Parts()
    new: dict[str, Any] = field(default_factory=dict)  # options of `new`
    training: dict[str, Any] = field(default_factory=dict)  # keys of [training]
    data: dict[str, Any] = field(default_factory=dict)  # keys of [general] in dataset.toml
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of the optimizer
    network_arguments: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, ForeignDataset] = field(default_factory=dict)  # by the key of the dataset
    folders: dict[str, Path] = field(default_factory=dict)  # by key
    epochs: list[FileEpochs] = field(default_factory=list)
    per_epoch: dict[str, FileEpochs] = field(default_factory=dict)  # by the option with steps
    warmup_share: tuple[str, float] | None = None  # key and fraction of the steps
    others: dict[str, Any] = field(default_factory=dict)  # keys without a rule that may be our options
    source_keys: dict[str, str] = field(default_factory=dict)  # our option or key -> key in the file
    # keys that name a model -> unknown value
    models: dict[str, str] = field(default_factory=dict)
    has_other_optimizer: bool = False  # the project's optimizer differs from the one used
    keeps_few: bool = False  # saves are large, so keep few
    assumed: dict[str, Any] = field(default_factory=dict)  # missing keys -> the program's defaults
    adopted: list[str] = field(default_factory=list)  # keys with unchanged values
    changed: list[str] = field(default_factory=list)  # lines
    omitted: list[str] = field(default_factory=list)  # lines
    reasons: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys left out for it
    without_effect: list[str] = field(default_factory=list)  # keys without effect in the other program
    empty: list[str] = field(default_factory=list)  # keys without a value
    unknown: list[str] = field(default_factory=list)  # unknown keys

    @property
    def title(self) -> str:
        """Name of the trainer that wrote the file."""
        return self.program.title

    def key_of(self, name: str) -> str:
        """Return the key of the foreign file that set a training option or a dataset.toml key."""
        return self.source_keys.get(name, name)

    def leave(self, key: str, reason: str) -> None:
        """Record why a key is omitted. Keys with the same reason share a line."""
        self.reasons.setdefault(reason, []).append(show(key))

    def leave_value(self, key: str, value: Any, reason: str) -> None:
        """Record a key that is omitted, on a line with its value."""
        self.omitted.append(f"{show(key)} = {show(value)}: {reason}")

    def note_change(self, key: str, value: Any, result: str) -> None:
        """Record a key of the foreign file whose value is changed for this program.

        `result` describes the new setting.
        """
        self.changed.append(f"{show(key)} = {show(value)}: {result}")

    def forget(self, key: str) -> None:
        """Remove a key from the lists of adopted and changed values."""
        self.adopted = [name for name in self.adopted if name != key]
        self.changed = [line for line in self.changed if not line.startswith(f"{key} = ")]

    def drop(self, name: str, reason: str) -> None:
        """Remove a training option; `reason` replaces the earlier note about its key."""
        value = self.training.pop(name)
        key = self.key_of(name)
        self.forget(key)
        if key in self.assumed:
            self.assumed.pop(key)
        elif is_off(value) or value == 0:
            self.without_effect.append(key)
        else:
            self.leave_value(key, value, reason)

    def lines(self, folder: Path) -> list[str]:
        """Return the report about a foreign project file, in which every key occurs once.

        `folder` is the dataset folder.
        """
        lines = [f"{self.path} is a project of {self.title}; nothing of it is run."]

        # a key with the described folder is used; keys with other folders are left out
        adopted = [*self.adopted]
        other_folders: list[str] = []
        for key, other_folder in self.folders.items():
            if is_same_folder(self.path, other_folder, folder):
                adopted.append(key)
            else:
                other_folders.append(f"{key} = {show(other_folder)}: {folder} is described")
        if adopted:
            lines.append(f"  taken: {', '.join(dict.fromkeys(adopted))}")
        if self.assumed:
            assumed = [f"{key} = {show(value)}" for key, value in self.assumed.items()]
            lines.append(f"  taken as {self.title} has it if a file does not say it: {', '.join(assumed)}")

        for text in self.changed:
            lines.append(f"  changed: {text}")
        for text in (*other_folders, *self.omitted):
            lines.append(f"  left: {text}")
        for reason, keys in self.reasons.items():
            lines.append(f"  left: {', '.join(keys)}: {reason}")
        if self.without_effect:
            lines.append(f"  of no effect there or here: {', '.join(dict.fromkeys(self.without_effect))}")
        if self.empty:
            lines.append(f"  left, without a value: {', '.join(self.empty)}")

        misspelt: list[str] = []
        unknown: list[str] = []
        for key in self.unknown:
            meant = self._find_near(key)  # a similar key that the program has, or ""
            if meant:
                misspelt.append(f"{key} (for {meant}?)")
            else:
                unknown.append(key)
        if misspelt:
            lines.append(f"  left, seems to be misspelt: {', '.join(misspelt)}")
        if unknown:
            lines.append(f"  left, {NO_REASON}: {', '.join(unknown)}")
        return lines

    def _find_near(self, key: str) -> str:
        """Return a known key, unused in the file, that differs by a letter or two; "" if there is none."""
        table, _, name = key.rpartition(".")
        generic = without_numbers(table)
        rules = [rule.rpartition(".") for rule in self.program.rules]
        names = [last for place, _, last in rules if place == generic]
        names += [] if table else self.options
        lacking = [last for last in names if f"{table}.{last}".lstrip(".") not in self.keys]
        near = difflib.get_close_matches(name, lacking, 1, MISSPELT)
        return near[0] if near else ""


def without_numbers(key: str) -> str:
    """Return a key with [] for its list indices, as the rules spell it."""
    return re.sub(r"\[\d+\]", "[]", key)


def find_beside(file: Path, name: str) -> Path | None:
    """Find a file that a project names: next to it, in a folder above it, or in the working folder."""
    if "\0" in name:
        return None
    around = [file.parent, *list(real_path(file).parents)[1:MAX_AROUND], Path()]
    for parent in around:
        with contextlib.suppress(OSError, ValueError):  # an impossible file name
            if (parent / name).exists():
                return parent / name
    return None


def is_same_folder(file: Path, place: Path, folder: Path) -> bool:
    """Return whether a project's folder is the dataset folder, or one is inside the other."""
    found = find_beside(file, str(place))
    there, here = real_path(file.parent / place if found is None else found), real_path(folder)
    return there == here or there in here.parents or here in there.parents


def show(value: Any) -> str:
    """Format a value on one line of at most 120 characters."""
    return shorten(" ".join(str(value).split()), 120)
