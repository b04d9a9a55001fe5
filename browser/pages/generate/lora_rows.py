"""List the LoRA files of all runs that a model can use, and read their purpose from their headers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from browser.runs.comparable_runs import LORA, ComparableRun, ComparedFile, read_source
from browser.runs.recipes import ModelRecipe, UsedLora
from browser.runs.run_views import label_runs
from browser.runs.runs import Runs, RunSummary
from downloads.catalogue import model_title
from modules.pages.language import refusal, say
from modules.text_files import read_safetensors_texts
from networks.module_names import list_accepted_families, read_family
from protocols.families import HIGH_NOISE, LOW_NOISE

BOTH = "both"  # experts
FOLDER = "loras"  # folder of downloaded LoRAs, in each root and in the models folder
MAX_FILES = 500


@dataclass(frozen=True)
class LoraRow:
    """A LoRA in the Generate form: its file, or one file for each expert, with its step, loss and family."""

    path: str
    title: str
    high_path: str = ""  # path for the high-noise expert, if it has a separate file
    step: int | None = None
    loss: float | None = None
    is_best: bool = False
    folder: str = ""
    family: str = ""
    task: str = ""  # task it was trained for; "" if the command names none
    copies: Sequence[str] = ()  # paths of further files with the same weights
    reason: str = ""  # why it may not fit the selected model; "" if it fits

    @property
    def name(self) -> str:
        """Name of the file without its folder."""
        return Path(self.path).name

    @property
    def names(self) -> set[str]:
        """Names of all files with these weights."""
        return {self.name, *(Path(path).name for path in self.copies)}

    def for_recipe(self, recipe: ModelRecipe) -> "LoraRow":
        """Return the row of a LoRA as the Generate form shows it for a recipe.

        If the recipe's command contains this LoRA, the row gets the path as typed there. If the LoRA was
        trained for another task, `reason` says so.
        """
        task = "".join(recipe.fixed_options.get("--task", ()))
        reason = ""
        if self.task and task and self.task != task:
            reason = say("trained for %(task)s, not %(task2)s", task=self.task, task2=task)
        for lora in recipe.loras:
            lora_path = _complete_path(recipe, lora.path)
            if lora_path == self.path:
                return replace(self, path=lora.path, reason=reason)
            if lora_path in self.copies:
                return replace(self._with_copy_first(lora_path), path=lora.path, reason=reason)
        return replace(self, reason=reason)

    def _with_copy_first(self, copy: str) -> "LoraRow":
        """Return the row with `copy`, a file with equal weights, as `path`; the old path joins `copies`."""
        high_path = ""
        if self.high_path:  # a pair: the copy has its own file for the high-noise expert
            high_path = copy.replace(f"_{LOW_NOISE}.", f"_{HIGH_NOISE}.")
        other_copies = [path for path in (self.path, *self.copies) if path != copy]
        return replace(self, path=copy, high_path=high_path, copies=other_copies)

    def as_used(self, strength: str, expert: str, has_experts: bool) -> list[UsedLora]:
        """Return the LoRA as a generation uses it: one or two files, each with a strength and an expert.

        `expert` is BOTH, HIGH_NOISE or LOW_NOISE.
        """
        if not has_experts:
            return [UsedLora(self.path, strength)]
        used = []
        if expert != HIGH_NOISE:
            used.append(UsedLora(self.path, strength))
        if expert != LOW_NOISE:
            used.append(UsedLora(self.high_path or self.path, strength, HIGH_NOISE))
        return used


class _RunLoraFiles(NamedTuple):
    """The LoRA files of a run, as read when its history was last changed."""

    changed: float  # `RunSummary.changed` of the run then
    family: str  # "" if the run's history has no generation command
    rows: list[LoraRow]  # the newest file first


class RunLoras:
    """The LoRA files of runs whose model can generate; a run is read again only if it has changed."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._loras_of_runs: dict[str, _RunLoraFiles] = {}  # keyed by the id of the run

    def refresh(self) -> list[tuple[RunSummary, str]]:
        """Read changed runs, and return (run, label) for each run to generate with, newest first."""
        with self.runs.lock:
            labeled = label_runs(self.runs.list_all())
            loras_by_run = {}
            for run, label in labeled:
                loras = self._loras_of_runs.get(run.id)
                if loras is None or loras.changed != run.changed:
                    loras = self._read(run, label)
                loras_by_run[run.id] = loras
            self._loras_of_runs = loras_by_run
        return [(run, label) for run, label in labeled if loras_by_run[run.id].family]

    def _read(self, run: RunSummary, label: str) -> _RunLoraFiles:
        """Return a run's family and the Generate form's rows of its LoRA files, with the title `label`."""
        try:
            source = read_source(self.runs, run)
        except OSError:
            source = None
        if source is None:
            return _RunLoraFiles(run.changed, family="", rows=[])
        # names of the run's files that its generation command does not load as LoRAs; None if it loads none
        # as a LoRA, because the run trained a ControlNet, an embedding or a model
        loras: set[str] = set()
        others: set[str] = set()
        for option, words in source.options.items():
            names = loras if option.startswith(LORA) else others
            names.update(name for word in words if (name := Path(word).name) in source.run_history.saved)
        other_networks = None if others and not loras else others
        rows = []
        for file in source.files:  # by step
            # None: the run trained no LoRA
            if other_networks is None or file.name in other_networks:
                continue
            if all(map(self.runs.is_inside, file.paths)):
                rows.append(_make_row(source, file, label))
        rows.reverse()
        return _RunLoraFiles(run.changed, source.family, rows)

    def find_run_family(self, run_id: str) -> str:
        """Return the family of a run; "" if it is unknown or cannot generate."""
        loras = self._loras_of_runs.get(run_id)
        return "" if loras is None else loras.family

    def find_run_file_names(self, run_id: str) -> set[str]:
        """Return the names of the weight files that a run has saved."""
        loras = self._loras_of_runs.get(run_id)
        return set() if loras is None else {name for row in loras.rows for name in row.names}

    def list_rows(self, recipe: ModelRecipe) -> list[LoraRow]:
        """Return the LoRAs for a recipe: first those of its command, then LoRAs of its family's runs."""
        rows: dict[str, LoraRow] = {}  # keyed by the complete path
        for lora in recipe.loras:
            row = LoraRow(path=lora.path, title=recipe.title)
            rows.setdefault(_complete_path(recipe, lora.path), row)
        for loras in self._loras_of_runs.values():
            if loras.family == recipe.family:
                for row in loras.rows:
                    adapted_row = row.for_recipe(recipe)
                    rows[_complete_path(recipe, adapted_row.path)] = adapted_row
        # files for the high-noise expert belong to the row of the low-noise file
        high_paths = {_complete_path(recipe, row.high_path) for row in rows.values() if row.high_path}
        return [row for path, row in rows.items() if path not in high_paths]

    def list_foreign_rows(self, recipe: ModelRecipe) -> list[LoraRow]:
        """Return the LoRAs of other model families, each with a text that says why it does not fit."""
        foreign_rows: list[LoraRow] = []
        for loras in self._loras_of_runs.values():
            if loras.family != recipe.family:
                reason = say(
                    "of %(family)s, not %(family2)s",
                    family=model_title(loras.family),
                    family2=model_title(recipe.family),
                )
                foreign_rows += [replace(row, reason=reason) for row in loras.rows]
        return foreign_rows

    def find_source(self, run_id: str) -> ComparableRun | None:
        """Return the run with this id, with its generation options; None if pages cannot generate with it.

        Raises OSError if its history cannot be read.
        """
        run = self.runs.find(run_id)
        return None if run is None else read_source(self.runs, run)


def _make_row(source: ComparableRun, file: ComparedFile, label: str) -> LoraRow:
    """Return the row of a LoRA file that a run has saved, with the title `label`."""
    path, *high_noise_paths = file.paths
    return LoraRow(
        path=str(path),
        title=label,
        high_path="".join(map(str, high_noise_paths)),  # at most one
        step=file.step,
        loss=file.loss,
        is_best=file.is_best,
        folder=str(path.parent),
        family=source.family,
        task="".join(source.options.get("--task", ())),
        copies=[str(path.with_name(name)) for name in file.copies],
    )


def list_downloaded(folders: Iterable[Path]) -> list[Path]:
    """Return the files in the subfolders `loras` of the given folders, sorted by name."""
    files: list[Path] = []
    for folder in folders:
        files += sorted((folder / FOLDER).glob("*.safetensors"))
    return files[:MAX_FILES]


def _complete_path(recipe: ModelRecipe, path: str) -> str:
    return str(recipe.folder / path) if path else ""


def select_default_loras(recipe: ModelRecipe, rows: Sequence[LoraRow]) -> dict[str, tuple[str, str]]:
    """Return, by LoRA path, the strength and expert that the recipe's command sets."""
    chosen: dict[str, tuple[str, str]] = {}
    for lora in recipe.loras:
        for row in rows:
            if lora.path == row.path:
                expert = lora.expert or (BOTH if row.high_path else LOW_NOISE)
                is_second = row.path in chosen and chosen[row.path][1] != expert
                chosen[row.path] = (lora.strength, BOTH if is_second else expert)
    return chosen


def choose_expert(row: LoraRow, folder: Path) -> str:
    """Return the expert for a LoRA, by its file name or metadata: HIGH_NOISE, LOW_NOISE or BOTH."""
    if row.high_path:
        return BOTH
    name = row.name.lower().replace("-", "_")
    for expert in (HIGH_NOISE, LOW_NOISE):
        if expert in name:
            return expert
    trained = _read_texts(folder / row.path).get("ss_wan_expert", "").strip().lower()
    return {"high": HIGH_NOISE, "low": LOW_NOISE}.get(trained, BOTH)


def check_family(path: Path, family: str) -> None:
    """Raise OptionError if a LoRA file's header names a model family that does not fit `family`."""
    texts = _read_texts(path)
    trained_on = read_family(texts)
    if trained_on is None:
        return
    accepted_families = set()
    for script_family in list_accepted_families(family):
        accepted_families |= {script_family.name, *script_family.compatible_families}
    if trained_on.name not in accepted_families:
        raise refusal(
            "%(name)s is a LoRA of %(name2)s, not of %(family)s.",
            name=path.name,
            name2=model_title(trained_on.name),
            family=model_title(family),
        )


def _read_texts(path: Path) -> Mapping[str, str]:
    try:
        return read_safetensors_texts(path)
    except (OSError, ValueError):
        return {}
