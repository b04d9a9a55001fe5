"""Read the list of released files, catalogue.toml. Standard library only."""

import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from modules.command import quote_command

# the commands of most sets, in the order they are run; sets of tools name their own
STEPS = ("latents", "texts", "train", "generate")
TRAINING_ADAPTER = "--training_adapter"
WITH_ADAPTER = "-adapter"  # suffix of a task whose set includes a training adapter
# kinds of runs that take no training adapter
OTHER_KINDS = ("whole", "lllite", "lllite_inpainting", "controlnet", "embedding")


@dataclass(frozen=True)
class Licence:
    """License of model weights. `key` is its identifier on the hub; "other" if it has none."""

    name: str
    key: str
    url: str
    terms: str  # what anyone who downloads the weights should know about it
    comes_first: bool = False  # whether it is shown before its files, because it excludes many people
    verified: bool = True  # False: the release's own page does not state it, or could not be read


@dataclass(frozen=True)
class ReleasedFile:
    """A file on the hub or on GitHub, and its path `name` relative to the download folder."""

    repository: str
    file: str
    name: str
    licence: Licence
    size_bytes: int | None  # exact; None: the hub is asked
    sha256: str | None  # None: the hub is asked
    release: str | None = None  # tag of the release on GitHub that has it; None: it is on the hub


@dataclass(frozen=True)
class Inside:
    """Where a component may be included in another option's file, such as the VAE in a checkpoint."""

    option: str  # option of that file
    tensors: str  # beginning of the names of the component's tensors, if that is a single file
    folder: str  # folder of the component, if that is a folder


@dataclass(frozen=True)
class Component:
    """One network or tokenizer that a task needs: a file, or the files of one folder."""

    role: str
    option: str | None  # None: found next to the encoder
    files: tuple[ReleasedFile, ...]
    tensor_bytes: int | None  # size of the tensors, if the exact size of the file is not known
    # size of the trained network in 16 bits, if the file contains other networks too
    trained_bytes: int | None
    in_fp8: str | None  # name of the same component in 8 bits
    inside: Inside | None = None  # where one of the user's files may already contain it

    @property
    def title(self) -> str:
        """Return the label of the component's kind, such as `Transformer` for --dit."""
        role = self.role.removeprefix("its ")
        return f"{role[:1].upper()}{role[1:]}"

    @property
    def path(self) -> PurePosixPath:
        """Path of the file relative to the download folder; the path of their folder for several files."""
        names = [PurePosixPath(file.name) for file in self.files]
        return names[0] if len(names) == 1 else names[0].parent

    @property
    def licence(self) -> Licence:
        """License of the first file, which applies to all files of the component."""
        return self.files[0].licence

    @property
    def size_bytes(self) -> int | None:
        """Return the exact size or the size of the tensors, if known; None for files of only a few MB."""
        return self.files[0].size_bytes or self.tensor_bytes


@dataclass(frozen=True)
class ModelSet:
    """Files and commands of one task of a model; commands have placeholders such as `{dit}` for paths."""

    family: str
    task: str
    title: str  # display name, such as Wan2.2 t2v-A14B
    about: str
    released_by: str  # the repository of the original release
    components: tuple[Component, ...]
    commands: Mapping[str, str]  # in the order they are run
    properties: Mapping[str, Any]  # which data the model is trained with; see catalogue.toml
    usual: Mapping[str, Any]  # defaults of the fields of a form for this model; see catalogue.toml

    @property
    def has_adapter(self) -> bool:
        """Return whether this set includes a training adapter, which generation does not use."""
        return any(part.option == TRAINING_ADAPTER for part in self.components)

    @property
    def family_title(self) -> str:
        """Name of the family as documents and lists show it."""
        return family_title(self.family)

    def typed_commands(self, folder: Path) -> list[str]:
        """Return the model's commands as a user types them, with placeholders replaced by paths in `folder`.

        A placeholder for a file that is not downloaded becomes a word such as DIT_FILE, after its option.
        """
        paths = {}  # placeholder, such as {dit} -> path
        for component in self.components:
            if component.option is not None:
                placeholder = f"{{{component.option.lstrip('-')}}}"
                paths[placeholder] = str(folder / component.path)
        typed_lines = []
        for command in self.commands.values():
            arguments = []
            for argument in shlex.split(command):
                if argument in paths:
                    arguments.append(paths[argument])
                elif argument.startswith("{"):
                    arguments.append(f"{argument.strip('{}').upper()}_FILE")
                else:
                    arguments.append(argument)
            typed_lines.append(quote_command(arguments))
        return typed_lines


@cache
def model_sets(fp8_encoders: bool = False) -> tuple[ModelSet, ...]:
    """Return all model sets of the catalogue, with 8-bit text encoders if `fp8_encoders` is set."""
    catalog = _read_catalogue()
    components = known_components()
    sets = []
    for entry in catalog["set"]:
        chosen = [components[name] for name in entry["components"]]
        if fp8_encoders:
            chosen = [components[part.in_fp8] if part.in_fp8 else part for part in chosen]
        model = _read_set(entry, catalog["family"][entry["family"]], chosen)
        sets.append(model)
        if "adapter" in entry:
            # A copy of a distilled model's catalogue entry whose train command uses a training adapter
            placeholder = f"{{{TRAINING_ADAPTER.lstrip('-')}}}"
            train = f"{model.commands['train']} {TRAINING_ADAPTER} {placeholder}"
            sets.append(
                replace(
                    model,
                    task=f"{model.task}{WITH_ADAPTER}",
                    title=f"{model.title} with a training adapter",
                    about=f"{model.about}, to train with an adapter",
                    components=(*model.components, (components[entry["adapter"]])),
                    commands={**model.commands, "train": train},
                    properties={**model.properties, **dict.fromkeys(OTHER_KINDS, "")},
                )
            )
    return tuple(sets)


def find_adapted(model: ModelSet) -> ModelSet | None:
    """Return a model's catalogue entry with its training adapter added; None if none is released."""
    task = f"{model.task}{WITH_ADAPTER}"
    return next(
        (
            candidate
            for candidate in model_sets()
            if (candidate.family, candidate.task) == (model.family, task)
        ),
        None,
    )


def _read_set(entry: Mapping[str, Any], family: Mapping[str, Any], components: list[Component]) -> ModelSet:
    """Return the model set that a `[[set]]` entry of the catalogue describes, with its family's defaults."""
    # `family` is the catalogue's table of that family. Keys of the entry take precedence over keys in it.
    # {option of a component: name of that option in this family}
    option_names = family.get("options", {})
    renamed = [replace(part, option=option_names.get(part.option, part.option)) for part in components]
    base_commands = {**family["commands"], **entry.get("commands", {})}
    arguments_by_step = entry.get("more", {})  # appended to the command of a step
    commands = {}
    for step in entry.get("steps", STEPS):
        commands[step] = f"{base_commands[step]} {arguments_by_step.get(step, '')}".rstrip()
    return ModelSet(
        family=entry["family"],
        task=entry["task"],
        title=entry.get("title") or f"{family['title']} {entry['task']}",
        about=entry["about"],
        released_by=entry["released_by"],
        components=tuple(renamed),
        commands=commands,
        properties={**family.get("data", {}), **entry.get("data", {})},
        usual=entry.get("usual", {}),
    )


def known_licenses() -> dict[str, Licence]:
    """Return all licenses by their names in the catalogue."""
    return {name: Licence(**entry) for name, entry in _read_catalogue()["licence"].items()}


def known_components() -> dict[str, Component]:
    """Return all components by their names in the catalogue."""
    catalog = _read_catalogue()
    licenses = known_licenses()
    components = {}
    for name, entry in catalog["component"].items():
        paths = entry.get("files") or [entry["file"]]  # an entry has one of the two keys
        components[name] = Component(
            role=entry["role"],
            option=entry.get("option"),
            files=tuple(_read_file(entry, path, licenses[entry["licence"]]) for path in paths),
            tensor_bytes=entry.get("tensors"),
            trained_bytes=entry.get("trained"),
            in_fp8=entry.get("fp8"),
            inside=Inside(**entry["inside"]) if "inside" in entry else None,
        )
    return components


def _read_file(entry: Mapping[str, Any], path: str, licence: Licence) -> ReleasedFile:
    """Return the file at `path` in the repository of a component's catalogue entry."""
    folder = PurePosixPath(entry.get("folder", ""))
    return ReleasedFile(
        repository=entry["repository"],
        file=path,
        name=str(folder / entry.get("name", PurePosixPath(path).name)),
        licence=licence,
        size_bytes=entry.get("size"),
        sha256=entry.get("sha256"),
        release=entry.get("release"),
    )


def families() -> list[str]:
    """Return the names of all families in the catalogue, in its order."""
    return list(_read_catalogue()["family"])


def family_title(family: str) -> str:
    """Return the name of a family in its page's title, such as FLUX.1."""
    return str(_read_catalogue()["family"][family].get("title", ""))


@lru_cache(maxsize=256)  # names in other programs' files have no number
def model_title(name: str, task: str = "") -> str:
    """Return the display name of a model, given the internal name in runs, results and the catalogue.

    `task` is the model's task if it is known: runs have one internal name for Wan2.1 and Wan2.2. A name
    without a title, which another program may have written, is returned unchanged.
    """
    catalog = _read_catalogue()
    task_models = [model for model in model_sets() if task == model.task and model.family.startswith(name)]
    if task_models:
        return task_models[0].title
    if task:
        return f"{model_title(name)} {task}"
    family = catalog["family"].get(name, {})
    return str(catalog["titles"].get(name) or family.get("title") or name)


def further_name(family: str) -> str:
    """Return a family's shorter alternative name, such as sd; "" if it has none."""
    return str(_read_catalogue()["family"][family].get("also", ""))


def family_page(family: str) -> str:
    """Return the page of a family in docs/, such as flux.md."""
    return str(_read_catalogue()["family"][family]["page"])


@dataclass(frozen=True)
class _Download:
    """A model download that includes a missing file, and its target folder."""

    model: ModelSet
    in_fp8: bool
    folder: Path  # where the files are stored

    @property
    def missing_bytes(self) -> int:
        """Return the total known size of the files that are still missing."""
        missing = [part for part in self.model.components if not (self.folder / part.path).exists()]
        return sum(part.size_bytes or 0 for part in missing)

    @property
    def command(self) -> str:
        """The command that starts the download."""
        words = ["python", "tools/download.py", "--family", self.model.family, "--task", self.model.task]
        if self.in_fp8:
            words.append("--fp8_encoders")
        return quote_command([*words, "--to", str(self.folder)])

    def runs_with(self, scripts: Collection[str]) -> bool:
        """Return whether one of these scripts runs the model."""
        return any(shlex.split(command)[1] in scripts for command in self.model.commands.values())


def download_hint(path: Path, scripts: Collection[str] = ()) -> str | None:
    """Return a sentence with the command that downloads a missing file, if it is a released one.

    Many models share an autoencoder or text encoder. Among the models that `scripts` run, or among all models
    without scripts, the one with the smallest download is chosen. If only models of other scripts have the
    file, the sentence says so and names the smallest download for these scripts.
    """
    # The downloads that would create the file `path`, each with the folder to download to
    downloads = []
    for in_fp8 in (False, True):
        for model in model_sets(in_fp8):
            for component in model.components:
                parts = component.path.parts
                if component.option is not None and path.parts[-len(parts) :] == parts:
                    downloads.append(_Download(model, in_fp8, path.parents[len(parts) - 1]))
    download_for_scripts = _select_smallest(
        [download for download in downloads if download.runs_with(scripts)]
    )
    if download_for_scripts is not None:
        return f"{download_for_scripts.command} downloads it"
    other_download = _select_smallest(downloads)  # for models of other scripts
    if other_download is None:
        return None
    replacements = [_Download(model, in_fp8=False, folder=other_download.folder) for model in model_sets()]
    replacement = _select_smallest([download for download in replacements if download.runs_with(scripts)])
    if replacement is None:
        return f"{other_download.command} downloads it"
    return (
        f"{path.name} belongs to {other_download.model.title}, which this script does not run. "
        f"{replacement.command} downloads files that fit"
    )


def _select_smallest(downloads: Sequence[_Download]) -> _Download | None:
    """Return the download with the fewest missing bytes; None if there are none."""
    # a set with text encoders in 8 bits is chosen only if the missing file is one of them
    return min(downloads, key=lambda download: (download.in_fp8, download.missing_bytes), default=None)


@cache
def _read_catalogue() -> dict[str, Any]:
    """Return the content of catalogue.toml, which is read once."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
