"""Read the list of released files, catalogue.toml. Standard library only."""

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from modules.command import as_typed

# the commands of a set, in the order they are run; sets of tools name theirs
STEPS = ("latents", "texts", "train", "generate")


@dataclass(frozen=True)
class Licence:
    """A licence of weights. `key` is its identifier on the hub, "other" for those that have none."""

    name: str
    key: str
    url: str
    terms: str  # what somebody who downloads the weights should know of it
    verified: bool = True  # False: the release's own page does not say it, or could not be read


@dataclass(frozen=True)
class ReleasedFile:
    """A file on the hub or on GitHub, and its path `name` below the folder that models are downloaded to."""

    repository: str
    file: str
    name: str
    licence: Licence
    size_bytes: int | None  # exact; None: the hub is asked
    sha256: str | None  # None: the hub is asked
    release: str | None = None  # tag of the release on GitHub that has it; None: it is on the hub


@dataclass(frozen=True)
class Component:
    """One network or tokenizer that a task needs: a file, or the files of one folder."""

    role: str
    option: str | None  # None: found beside the encoder
    files: tuple[ReleasedFile, ...]
    tensor_bytes: int | None  # of its tensors, if the exact size is not known
    in_fp8: str | None  # name of the same component in 8 bits

    @property
    def path(self) -> PurePosixPath:
        names = [PurePosixPath(file.name) for file in self.files]
        return names[0] if len(names) == 1 else names[0].parent

    @property
    def licence(self) -> Licence:
        return self.files[0].licence

    @property
    def size_bytes(self) -> int | None:
        """Return the exact size or the size of the tensors, if known; None for a few MB."""
        return self.files[0].size_bytes or self.tensor_bytes


@dataclass(frozen=True)
class ModelSet:
    """All that a task needs. commands: step -> command, with `{dit}`, `{vae}`, ... instead of paths."""

    family: str
    task: str
    about: str
    released_by: str  # the repository of the original release
    components: tuple[Component, ...]
    commands: Mapping[str, str]  # in the order they are run
    data: Mapping[str, Any]  # what its data are like; see catalogue.toml

    def typed_commands(self, folder: Path) -> list[str]:
        """Return the commands for files below `folder`, as a user types them."""
        paths = {
            f"{{{component.option.lstrip('-')}}}": str(folder / component.path)
            for component in self.components
            if component.option is not None
        }
        lines = [shlex.split(command) for command in self.commands.values()]
        return [as_typed([paths.get(word, word) for word in words]) for words in lines]


def model_sets(fp8_encoders: bool = False) -> list[ModelSet]:
    """Return all sets. fp8_encoders: with the text encoders in 8 bits."""
    data, components = _read_catalogue(), known_components()
    sets = []
    for entry in data["set"]:
        chosen = [components[name] for name in entry["components"]]
        if fp8_encoders:
            chosen = [components[one.in_fp8] if one.in_fp8 else one for one in chosen]
        of_family = data["family"][entry["family"]]
        renamed = of_family.get("options", {})
        chosen = [replace(one, option=renamed.get(one.option, one.option)) for one in chosen]
        more, templates = entry.get("more", {}), of_family["commands"]
        commands = {
            step: f"{templates[step]} {more.get(step, '')}".rstrip() for step in entry.get("steps", STEPS)
        }
        sets.append(
            ModelSet(
                entry["family"],
                entry["task"],
                entry["about"],
                entry["released_by"],
                tuple(chosen),
                commands,
                {**of_family.get("data", {}), **entry.get("data", {})},
            )
        )
    return sets


def known_components() -> dict[str, Component]:
    data = _read_catalogue()
    licences = {name: Licence(**entry) for name, entry in data["licence"].items()}
    components = {}
    for name, entry in data["component"].items():
        folder = PurePosixPath(entry.get("folder", ""))
        files = tuple(
            ReleasedFile(
                entry["repository"],
                path,
                str(folder / entry.get("name", PurePosixPath(path).name)),
                licences[entry["licence"]],
                entry.get("size"),
                entry.get("sha256"),
                entry.get("release"),
            )
            for path in entry.get("files") or [entry["file"]]
        )
        tensors, in_fp8 = entry.get("tensors"), entry.get("fp8")
        components[name] = Component(entry["role"], entry.get("option"), files, tensors, in_fp8)
    return components


def families() -> list[str]:
    return list(_read_catalogue()["family"])


def family_title(family: str) -> str:
    """Return the name of a family as its page has it, such as FLUX.1."""
    return str(_read_catalogue()["family"][family].get("title", ""))


def family_page(family: str) -> str:
    """Return the page of a family in docs/, such as flux.md."""
    return str(_read_catalogue()["family"][family]["page"])


def download_hint(path: Path) -> str | None:
    """Return the command that downloads a file that does not exist, if it is a released one."""
    for in_fp8 in (False, True):
        for one in model_sets(in_fp8):
            for component in one.components:
                parts = component.path.parts
                if component.option is not None and path.parts[-len(parts) :] == parts:
                    words = ["python", "tools/download.py", "--family", one.family, "--task", one.task]
                    words += ["--fp8_encoders"] if in_fp8 else []
                    words += ["--to", str(path.parents[len(parts) - 1])]
                    return f"{as_typed(words)} downloads it"
    return None


@lru_cache(maxsize=1)
def _read_catalogue() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
