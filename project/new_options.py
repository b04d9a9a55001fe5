"""Options of new_project.py. Standard library only."""

from pathlib import Path
from typing import Any

from dataset.options import DATASET_FILE
from modules.option_values import Repeated, gibibytes, option_argv
from modules.options import Options, option, option_values, unsupported
from modules.output_files import check_output_name
from project.options import (
    FULL_MODEL,
    KIND_NAMES,
    MODEL_FILES,
    MODELS,
    TRAINING_TABLE,
    as_operand,
    check_trigger,
    list_model_files,
)


class NewOptions(Options):
    """Options of `new`, which writes the project files for a dataset folder."""

    key_files = (DATASET_FILE, MODEL_FILES, TRAINING_TABLE)

    folder: Path = option(
        "clips, images or both, with captions in .txt files; for models that edit, with a folder "
        "control of what each image is made from; for control networks, of their control images",
        positional=True,
        place="folder",
        hint="the one with clips or images",
    )
    family: str | None = option("kind of model, such as wan, kontext or qwen; asked for on a terminal")
    task: str | None = option("which of its models, such as t2v-1.3B; likewise")
    trigger_word: str | None = option(
        "made-up word for the subject, put before captions without it; used alone if there is no caption",
        flags=("--word",),
    )
    output_name: str | None = option(
        "name of the trained file; when not given that of the folder, or an embedding's word"
    )
    max_train_steps: int = option(
        "length of the training", default=2000, minimum=1, hint="1500 to 3000 are usual"
    )
    train: str | None = option(
        "what is trained: a LoRA; adapter: a LoRA that unlearns a distillation, for --training_adapter; "
        "lllite or controlnet: a network that follows control images; lllite_inpainting: one that repaints; "
        "embedding: the trigger word alone; whole: the model itself, for a domain with hundreds of "
        "files. Without it a LoRA, or with a folder control or conditioning of the images' names the "
        "model's control network",
        choices=KIND_NAMES,
    )
    whole_model: bool = option("--train whole", excludes="train", hint="both say what is trained")
    from_file: Path | None = option(
        "project of another trainer whose values are taken: .yaml of AI Toolkit or ltx-trainer, .toml of "
        "diffusion-pipe, .json of OneTrainer, SimpleTuner or the GUI of kohya_ss; nothing of it is run",
        name="from",
        place="file",
        metavar="FILE",
    )
    recipe: str | None = option(
        "recipe whose model and values are taken: a name of `recipe list`, or a file of `recipe save`, also "
        "of somebody else, which can set values alone",
        metavar="NAME",
        excludes="from",
        hint="both say how it is trained",
    )
    models: Path = option("folder that tools/download.py fills", default=MODELS)
    model_files: tuple[str, ...] = option(
        "file of a model elsewhere, such as dit=my.safetensors; may be repeated: "
        + ", ".join(list_model_files()),
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
    download = unsupported("`new` only writes files: pass it to `run`")
    card = unsupported("set the memory of the card in GiB, such as --memory 12", nargs="?")
    vram = unsupported("set the memory of the card in GiB, such as --memory 12", nargs="?")

    def __post_init__(self) -> None:
        if self.output_name is not None:
            check_output_name("--output_name", self.output_name)
        if self.trigger_word is not None:
            check_trigger(self.trigger_word)

    @property
    def trains(self) -> str | None:
        """Return the kind of run that the command line names; None if it names none."""
        return FULL_MODEL if self.whole_model else self.train

    def make_argv(self, folder: Path, **changes: Any) -> list[str]:
        """Return the command that describes a folder with the options of this `new`.

        Args:
            folder: The folder to describe, which need not exist yet.
            **changes: Options with other values, by name; None or False leaves one out.

        Returns:
            Words after `reelsmith`. Files and folders are named as they were typed.
        """
        defaults = option_values(NewOptions(folder=self.folder))
        values = {**option_values(self), "dry_run": False, "print_run": False, **changes}
        typed = {f"--{name}": value for name, value in values.items() if value != defaults[name]}
        if self.memory is not None:
            typed["--memory"] = f"{self.memory:g}"
        if self.model_files:
            typed["--model_file"] = Repeated(self.model_files)
        return ["new", as_operand(folder), *option_argv({**typed, "--folder": None})]
