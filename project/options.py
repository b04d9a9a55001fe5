"""What the options of new_project.py and run_project.py share. Standard library only."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from downloads.catalogue import ModelSet, model_sets
from modules import installation
from modules.command import name_extensions, quote_command
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.installation import FRONT_SCRIPT
from modules.options import KeyFile, get_option_info
from modules.paths import parse_path
from modules.text_files import bad_character, real_path
from protocols.families import FAMILIES, caption_formats, with_scripts

RUN_FILE = "run.toml"
DATASET_FILE = "dataset.toml"
WRITTEN = (DATASET_FILE, "prompts.txt", RUN_FILE)  # files of a described folder
ON_END = "--on_end"
FULL_MODEL = "whole"
# of `project.kinds.composing.KINDS`
KIND_NAMES = (
    "lora",
    "adapter",
    "lllite",
    "lllite_inpainting",
    "controlnet",
    "embedding",
    FULL_MODEL,
)
MODELS = Path("models")  # folder of models in the working folder
MAX_WORD_LENGTH = 200  # maximum characters of a trigger word
# small, and of a kind that tools/caption_dataset.py is tested with
CAPTION_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
CAPTION_MODEL_SIZE = "4.4 GB"
# fmt: off
WRITE_CAPTIONS = [
    "python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml", "--model", CAPTION_MODEL,
]
# fmt: on


def find_caption_format(commands: Iterable[Sequence[str]]) -> str:
    """Return the model family whose JSON caption format these commands need; "" for plain sentences."""
    scripts = {Path(word).name for words in commands for word in words if word.endswith(".py")}
    for name in caption_formats():
        entry = FAMILIES[name]
        if scripts & {*entry.main_scripts, f"{entry.cache}_text_encoder_outputs.py"}:
            return name
    return ""


def make_caption_argv(commands: Iterable[Sequence[str]]) -> list[str]:
    """Return the command that captions a folder in the format that the model expects."""
    format = find_caption_format(commands)
    return [*WRITE_CAPTIONS, "--caption_format", format] if format else WRITE_CAPTIONS


def _training_keys() -> Collection[str]:
    from training.options import TrainingOptions  # imported only for error messages

    return get_option_info(TrainingOptions)


TRAINING_TABLE = KeyFile(
    _training_keys, f"It is an option of the training: write {{key}} = ... below [training] in {RUN_FILE}."
)


def list_model_files() -> Collection[str]:
    """Return the names of the options for model files, without dashes."""
    parts = (part for model in find_models() for part in model.components)
    return dict.fromkeys(part.option.lstrip("-") for part in parts if part.option)


MODEL_FILES = KeyFile(
    list_model_files, "It is a file of the model: pass it to `new`, as --model_file {key}=FILE."
)


def find_models(fp8_encoders: bool = False) -> list[ModelSet]:
    """Return the models that `new` supports: all that can be trained, except those with control clips."""
    sets = model_sets(fp8_encoders)
    return [model for model in sets if "train" in model.commands and not model.properties.get("control")]


def choose_save_intervals(steps: int) -> dict[str, int]:
    """Return how often a training run of `steps` steps saves weights and draws samples, by option name."""
    every = max(steps // 10, min(steps, 50))
    return {"save_every_n_steps": every, "save_last_n_steps_state": every, "sample_every_n_steps": every}


def own_command(*words: str) -> str:
    """Return a `reelsmith` command with these arguments as text for messages."""
    return quote_command(["python", FRONT_SCRIPT, *words])


def find_own_script(words: Sequence[str]) -> Path | None:
    """Return the path of this program's script that a command runs; None for other commands."""
    if words[:1] != ["python"]:
        return None
    return installation.find_script("".join(words[1:2]))


def typed_in(words: Sequence[str], folder: Path) -> str:
    """Return a command as a user in `folder` would type it."""
    if find_own_script(words) is None or installation.PREFIX:
        return quote_command(words)
    python, script, *arguments = name_extensions(words)
    absolute = installation.ROOT / script
    relative = parse_path(folder, absolute)
    return quote_command([python, min(relative, str(absolute), key=len), *arguments])


def as_operand(folder: Path) -> str:
    """Return a folder as a command-line argument, with `./` in front if it looks like an option."""
    return f".{os.sep}{folder}" if str(folder).startswith("-") else str(folder)


def download_options(models: Path) -> list[str]:
    """Return the options that make `run` download missing model files into this folder."""
    if real_path(models) == real_path(MODELS):
        return ["--download"]
    return ["--download", "--models", str(models)]


def check_trigger(word: str) -> None:
    """Raise OptionError if a trigger word does not fit into one line of prompts.txt."""
    reason = bad_character(word)
    if reason is None and (escape_control_codes(word) != word or len(f"{word}.".splitlines()) > 1):
        reason = "a control code or a line break"
    if reason is None and "\t" in word:
        reason = "a tab"
    if reason is not None:
        raise OptionError(f"--trigger_word {word!r} holds {reason}. Pass a word of letters, such as mrsfluff")
    if not word.strip() or len(word) > MAX_WORD_LENGTH:
        raise OptionError(
            f"--trigger_word has {len(word.strip())} characters: pass 1 to {MAX_WORD_LENGTH}, such as "
            "mrsfluff"
        )


def script_family(words: Sequence[str]) -> str:
    """Return the model family whose latents a command caches.

    Raises:
        KeyError: If the command does not cache latents.
    """
    scripts = {f"{entry.cache}_latents.py": name for name, entry in with_scripts().items()}
    return scripts[words[1]]
