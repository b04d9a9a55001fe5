"""Options of new_project.py and run_project.py. Standard library only."""

from pathlib import Path

from downloads.catalogue import ModelSet, model_sets
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import Options, option
from modules.output_files import ask_on_terminal, has_terminal

RUN_FILE = "run.toml"


def find_models(fp8_encoders: bool = False) -> list[ModelSet]:
    """Return the models that a folder can be described for: not those that need control clips too."""
    sets = model_sets(fp8_encoders)
    return [one for one in sets if "train" in one.commands and not one.data.get("control")]


def choose_model(family: str | None, task: str | None) -> ModelSet:
    """Return the named model; ask for missing words on a terminal.

    Raises OptionError if the model is unknown, or nobody can be asked.
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


def _names() -> str:
    files = dict.fromkeys(part.option for one in find_models() for part in one.components if part.option)
    return ", ".join(option.lstrip("-") for option in files)


class NewOptions(Options):
    """Content of the project files for a folder."""

    folder: Path = option(
        "clips, pictures or both, with captions in .txt files",
        positional=True,
        place="folder",
        hint="the one with clips or pictures",
    )
    family: str | None = option("kind of model, such as wan; asked for on a terminal")
    task: str | None = option("which of its models, such as t2v-1.3B; likewise")
    trigger_word: str | None = option("made-up word for what is learned, put before captions without it")
    output_name: str | None = option("name of the LoRA; that of the folder when not given")
    max_train_steps: int = option(
        "length of the training", default=2000, least=1, hint="1500 to 3000 are usual"
    )
    models: Path = option("folder that tools/download.py fills", default=Path("models"))
    model_files: tuple[str, ...] = option(
        f"file of a model in another place, such as dit=my.safetensors; once for each: {_names()}",
        default=(),
        name="model_file",
        action="append",
        nargs=None,
        metavar="NAME=PATH",
    )
    memory: float | None = option(
        "GiB of the card; this machine's when not given, 0: a CPU", least=0, hint="such as 12; 0 for a CPU"
    )
    overwrite: bool = option("replace dataset.toml, prompts.txt and run.toml")


class RunOptions(Options):
    """Which described folder to train on."""

    folder: Path = option("folder that `new` described", positional=True)
    download: bool = option("download the model, after its licences")
    dry_run: bool = option("print the commands, and run none")
