"""Options of new_project.py and run_project.py. Standard library only."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.options import DATASET_FILE
from downloads.catalogue import ModelSet, model_sets
from modules.command import as_typed
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.installation import FRONT_SCRIPT
from modules.option_values import gibibytes, option_words
from modules.options import (
    SECRET,
    STARTS,
    KeyFile,
    Options,
    facts_of,
    option,
    option_values,
    options_with,
    unsupported,
)
from modules.output_files import check_output_name
from modules.text_files import bad_character
from modules.typed_command import AT_END, read_command
from training.features.composing import options_of_run

RUN_FILE = "run.toml"
ON_END = "--on_end"
MODELS = Path("models")  # of the working folder
MOST_OF_WORD = 200  # characters of a trigger word
# small, and of a kind that tools/caption_dataset.py is tested with
CAPTION_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
CAPTION_MODEL_SIZE = "4.4 GB"
# fmt: off
WRITE_CAPTIONS = [
    "python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml", "--model", CAPTION_MODEL,
]
# fmt: on


def _training_keys() -> Collection[str]:
    from training.options import TrainingOptions  # only mistakes need them

    return facts_of(TrainingOptions)


TRAINING_TABLE = KeyFile(
    _training_keys, f"It is an option of the training: write {{key}} = ... below [training] in {RUN_FILE}."
)


def _model_files() -> Collection[str]:
    parts = (part for model in find_models() for part in model.components)
    return dict.fromkeys(part.option.lstrip("-") for part in parts if part.option)


MODEL_FILES = KeyFile(
    _model_files, "It is a file of the model: give it to `new`, as --model_file {key}=FILE."
)


def find_models(fp8_encoders: bool = False) -> list[ModelSet]:
    """Return the models that a folder can be described for: all except those that need control clips."""
    sets = model_sets(fp8_encoders)
    return [model for model in sets if "train" in model.commands and not model.data.get("control")]


def times_of_steps(steps: int) -> dict[str, int]:
    """Return the options of a training that follow from its number of steps: saves, states and samples."""
    every = max(steps // 10, min(steps, 50))
    return {"save_every_n_steps": every, "save_last_n_steps_state": every, "sample_every_n_steps": every}


def own_command(*words: str) -> str:
    """Return a command of `reelsmith` to type: `new` or `run`, and what follows."""
    return as_typed(["python", FRONT_SCRIPT, *words])


def check_trigger(word: str) -> None:
    """Raise OptionError if a trigger word cannot stand in one line of a prompt file."""
    reason = bad_character(word)
    if reason is None and (escape_control_codes(word) != word or len(f"{word}.".splitlines()) > 1):
        reason = "a control code or a line break"
    if reason is None and "\t" in word:
        reason = "a tab"
    if reason is not None:
        raise OptionError(f"--trigger_word {word!r} holds {reason}. Give a word of letters, such as mrsfluff")
    if not word.strip() or len(word) > MOST_OF_WORD:
        raise OptionError(
            f"--trigger_word has {len(word.strip())} characters: give 1 to {MOST_OF_WORD}, such as mrsfluff"
        )


def _options_of_new() -> Collection[str]:
    return facts_of(NewOptions)


OF_NEW = KeyFile(_options_of_new, "`new` has it, which describes the folder: type `new` again with --{key}.")


class NewOptions(Options):
    """Content of the project files for a folder."""

    key_files = (DATASET_FILE, MODEL_FILES, TRAINING_TABLE)

    folder: Path = option(
        "clips, pictures or both, with captions in .txt files; for models that edit, with a folder control "
        "of what each picture is made from",
        positional=True,
        place="folder",
        hint="the one with clips or pictures",
    )
    family: str | None = option("kind of model, such as wan, kontext or qwen; asked for on a terminal")
    task: str | None = option("which of its models, such as t2v-1.3B; likewise")
    trigger_word: str | None = option(
        "made-up word for what is learned, put before captions without it; alone where there is no caption"
    )
    output_name: str | None = option("name of the LoRA; that of the folder when not given")
    max_train_steps: int = option(
        "length of the training", default=2000, least=1, hint="1500 to 3000 are usual"
    )
    whole_model: bool = option(
        "train the model itself rather than a LoRA, for a domain with hundreds of files; each save is a "
        "whole model"
    )
    models: Path = option("folder that tools/download.py fills", default=MODELS)
    model_files: tuple[str, ...] = option(
        "file of a model in another place, such as dit=my.safetensors; once for each: "
        + ", ".join(_model_files()),
        default=(),
        name="model_file",
        action="append",
        nargs=None,
        metavar="NAME=PATH",
    )
    memory: float | None = option(
        "GiB of the card; this machine's when not given, 0: a CPU", type=gibibytes, metavar="GIB"
    )
    overwrite: bool = option("replace dataset.toml, prompts.txt and run.toml")
    dry_run: bool = option("show how the three files would change, and write nothing")
    print_run: bool = option("print what run.toml would be, and write nothing", excludes="dry_run")
    download = unsupported("`new` only writes files: give it to `run`")
    card = unsupported("give the GiB of the card as --memory, such as --memory 12", nargs="?")
    vram = unsupported("give the GiB of the card as --memory, such as --memory 12", nargs="?")

    def __post_init__(self) -> None:
        if self.output_name is not None:
            check_output_name("--output_name", self.output_name)
        if self.trigger_word is not None:
            check_trigger(self.trigger_word)


if TYPE_CHECKING:  # a record of what the list of features has
    OptionsOfFeatures = Options
else:
    OptionsOfFeatures = options_of_run()


class RunOptions(Options):
    """Which described folder to train on."""

    key_files = (DATASET_FILE, MODEL_FILES, TRAINING_TABLE, OF_NEW)

    folder: Path = option("folder that `new` described", positional=True)
    download: bool = option("download the model, after its licences")
    models: Path = option("folder that --download may fill", default=MODELS, place="new folder")
    output_dir: Path | None = option(
        "folder for the trained files, anywhere; default: that of run.toml, in the folder", place="new folder"
    )
    of_features: OptionsOfFeatures  # of the training
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
        """Return the words of the command to start at the end; none without --on_end."""
        return [] if self.on_end is None else read_command(ON_END, self.on_end)

    @property
    def typed_for_training(self) -> dict[str, Any]:
        """Return the options that are handed to the training, and given, by name."""
        values = {"output_dir": self.output_dir, **option_values(self.of_features)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def words(self) -> list[str]:
        """Return the words behind `reelsmith` that run this again, as far as a file may keep them."""
        unsaid = {"folder": None, "dry_run": None, "check": None, **dict.fromkeys(STARTING)}
        if self.models == MODELS:
            unsaid["models"] = None
        typed = {f"--{name}": value for name, value in (option_values(self) | unsaid).items()}
        return ["run", str(self.folder), *option_words(typed)]

    @property
    def going_on(self) -> str:
        """Return a note with the command that continues after an interruption."""
        return f"The same command continues: {own_command(*self.words)}"


STARTING = options_with(RunOptions, "reach", STARTS["reach"])  # names of options that start a program
