"""Options of new_project.py and run_project.py. Standard library only."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from downloads.catalogue import ModelSet, model_sets
from modules.asking import ask_on_terminal, has_terminal
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import check_at_least

RUN_FILE = "run.toml"


@dataclass(frozen=True)
class NewOptions:
    """What to write about a folder."""

    folder: Path
    family: str | None
    task: str | None
    trigger_word: str | None
    output_name: str | None
    max_train_steps: int
    models: Path
    model_files: tuple[str, ...] = field(metadata={"option": "model_file"})  # NAME=PATH
    memory: float | None  # GiB of the card; None: this machine's
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise OptionError(f"{self.folder}: there is no such folder. Give the one with clips or pictures.")
        check_at_least("--max_train_steps", self.max_train_steps, 1, "1500 to 3000 are usual")
        check_at_least("--memory", self.memory, 0, "the GiB of the card, such as 12; 0 for a CPU")


@dataclass(frozen=True)
class RunOptions:
    """Which described folder to train on."""

    folder: Path
    download: bool
    dry_run: bool


def find_models(fp8_encoders: bool = False) -> list[ModelSet]:
    """Return the models that a folder can be described for: not those that need control clips too."""
    sets = model_sets(fp8_encoders)
    return [one for one in sets if "train" in one.commands and not one.data.get("control")]


def choose_model(family: str | None, task: str | None) -> ModelSet:
    """Return the model that is named; what is not is asked for on a terminal.

    Raises OptionError if there is no such model, or nobody to ask.
    """
    models = find_models()
    family = _choose("--family", family, {one.family: "" for one in models})
    of_family = {one.task: one for one in models if one.family == family}
    return of_family[_choose("--task", task, {name: one.about for name, one in of_family.items()})]


def _choose(option: str, given: str | None, known: dict[str, str]) -> str:
    if given is None and len(known) == 1:
        return next(iter(known))
    if given is None and not has_terminal():
        raise OptionError(f"{option} is missing: give one of {', '.join(known)}")
    if given is None:
        lines = "".join(f"  {name}  {about}\n" for name, about in known.items())
        given = ask_on_terminal(f"{lines}{option}? ").strip()
    if given not in known:
        raise OptionError(f"{option} {given}: choose from {', '.join(known)}.{did_you_mean(given, known)}")
    return given


def add_new_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `NewOptions`."""
    parser.add_argument("folder", type=Path, help="clips, pictures or both, with captions in .txt files")
    add = parser.add_argument
    add("--family", help="kind of model, such as wan; asked for on a terminal")
    add("--task", help="which of its models, such as t2v-1.3B; likewise")
    add("--trigger_word", help="made-up word for what is learned, put before captions without it")
    add("--output_name", help="name of the LoRA; that of the folder when not given")
    add("--max_train_steps", type=int, default=2000, help="length of the training")
    add("--models", type=Path, default="models", help="folder that tools/download.py fills")
    files = dict.fromkeys(part.option for one in find_models() for part in one.components if part.option)
    names = ", ".join(option.lstrip("-") for option in files)
    add(
        "--model_file",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"file of a model in another place, such as dit=my.safetensors; once for each: {names}",
    )
    add("--memory", type=float, help="GiB of the card; this machine's when not given, 0: a CPU")
    add("--overwrite", action="store_true", help="replace dataset.toml, prompts.txt and run.toml")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `RunOptions`."""
    parser.add_argument("folder", type=Path, help="folder that `new` described")
    parser.add_argument("--download", action="store_true", help="download the model, after its licences")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run none")
