"""Options of run_project.py. Standard library only."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dataset.options import DATASET_FILE
from modules.option_tables import list_rows
from modules.option_values import option_argv
from modules.options import (
    SECRET,
    STARTS,
    KeyFile,
    Options,
    get_option_info,
    option,
    option_values,
    options_with,
    unsupported,
)
from modules.typed_command import AT_END, read_command
from project.new_options import NewOptions
from project.options import MODEL_FILES, MODELS, ON_END, TRAINING_TABLE, as_operand, own_command
from protocols.families import with_scripts


def _list_new_options() -> Collection[str]:
    return get_option_info(NewOptions)


NEW_COMMAND_KEYS = KeyFile(
    _list_new_options, "`new` has it, which describes the folder: type `new` again with --{key}."
)


def _make_training_record() -> Any:
    """Return a record of the training options that `run` has too, as a training's table declares them."""
    content: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for name, row in TRAINING_ROWS.items():
        if "of_run" in row.get("noted", {}):
            facts = row.get("facts", {})
            settings: dict[str, Any] = {"choices": tuple(row["choices"])} if "choices" in row else {}
            content[name] = option(row["noted"]["of_run"], place=facts.get("place", ""), **settings)
            types[name] = Path | None if "are_paths" in facts else str | None
    return type("OptionsOfTraining", (Options,), {**content, "__annotations__": types})


# options of a training by name: the features that declare some of them import torch
TRAINING_ROWS = list_rows(f"{next(iter(with_scripts().values())).training_script}.py")
OptionsOfTraining: Any = _make_training_record()


class RunOptions(Options):
    """Options of `run`: the dataset folder to train on, and what may be downloaded or started."""

    key_files = (DATASET_FILE, MODEL_FILES, TRAINING_TABLE, NEW_COMMAND_KEYS)

    folder: Path = option("folder that `new` described", positional=True)
    download: bool = option("download the model, after its licenses")
    models: Path = option("folder that --download may fill", default=MODELS, place="new folder")
    output_dir: Path | None = option(
        "folder for the trained files, anywhere; default: that of run.toml, in the folder", place="new folder"
    )
    training: OptionsOfTraining
    may_write: tuple[Path, ...] = option(
        "further folders that the run may write into, as caches may lie elsewhere; default: its own alone",
        default=(),
        place="new folder",
        action="extend",
    )
    on_end: str | None = option(AT_END, metavar="COMMAND", facts={**STARTS, **SECRET})
    resume = unsupported("`run` continues by itself: type the same command again", nargs="?")
    dry_run: bool = option("print the commands, and run none")
    check: bool = option("check the folder and the options of its training, and end", excludes="dry_run")

    def __post_init__(self) -> None:
        _ = self.end_words  # raises OptionError

    @property
    def end_words(self) -> list[str]:
        """Return the arguments of the command that --on_end starts; [] without the option."""
        return [] if self.on_end is None else read_command(ON_END, self.on_end)

    @property
    def typed_for_training(self) -> dict[str, Any]:
        """Command-line options that are passed on to the training script, by name."""
        values = {"output_dir": self.output_dir, **option_values(self.training)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def as_arguments(self) -> list[str]:
        """Return the command-line arguments that repeat this run, without options that may not be stored."""
        unsaid = {"folder": None, "dry_run": None, "check": None, **dict.fromkeys(STARTING)}
        if self.models == MODELS:
            unsaid["models"] = None
        typed = {f"--{name}": value for name, value in (option_values(self) | unsaid).items()}
        return ["run", as_operand(self.folder), *option_argv(typed)]

    @property
    def going_on(self) -> str:
        """Return a sentence with the command that resumes an interrupted run."""
        return f"The same command continues: {own_command(*self.as_arguments)}"


STARTING = options_with(RunOptions, "reach", STARTS["reach"])  # names of options that start a program
