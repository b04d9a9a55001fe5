"""The functions of `import reelsmith`: each runs a command of this program, with its options by name.

A command runs in a process of its own, so its results are those of the command line to the byte, and its
memory is free when it has ended.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.command import did_you_mean
from modules.errors import UserError
from modules.installation import ROOT
from package.reelsmith.command_run import CommandRun
from package.reelsmith.commands import find_commands
from package.reelsmith.events import (
    Event,
    HistoryEvents,
    LineEvent,
    SampleEvent,
    SavedEvent,
    StepEvent,
    ValidationEvent,
)
from package.reelsmith.typed_words import ScriptArguments
from protocols.families import FamilyEntry, with_scripts
from training.saving.options import LATEST_ONLY

__all__ = [
    "CommandRun",
    "Event",
    "LineEvent",
    "SampleEvent",
    "SavedEvent",
    "StepEvent",
    "UserError",
    "ValidationEvent",
    "cache",
    "command",
    "generate",
    "merge",
    "plan",
    "resume",
    "train",
]
Callback = Callable[[Event], None]


def train(model: str, **options: Any) -> CommandRun:
    """Start a training run of a LoRA, as `reelsmith train MODEL` does, and return it while it runs.

    Args:
        model: Name of the model as in commands, such as wan, sdxl or flux_2.
        **options: Options of the command by name. `dataset` is --dataset_config, `config` is --config_file; a
            switch is True, several values are a list, KEY=VALUE words are a dict.

    Raises:
        UserError: For a wrong option, with the message of the command.
    """
    return _prepare(Path(f"{_find_entry(model).training_script}.py"), options).start()


def resume(run: CommandRun, **changes: Any) -> CommandRun:
    """Continue a training run that was stopped, or has ended with a saved state, and return it while it runs.

    Args:
        run: The training.
        **changes: Options that are different from now on, such as `learning_rate` or `max_train_steps`.

    Raises:
        UserError: If the training still runs, or for a wrong option.
    """
    if not isinstance(run, CommandRun):
        raise UserError(
            f"resume takes the run that train has returned, not {run!r}. To continue one of an "
            f'earlier session, call train with its options and resume="{LATEST_ONLY}"'
        )
    if run.is_running:
        raise UserError("the training still runs: call its stop() or wait() before it is continued")
    # from the latest state; `resume_changed` permits options that differ from it
    options = {**run.options, "resume": LATEST_ONLY, "resume_changed": True, **changes}
    return _prepare(run.script, options).start()


def plan(model: str, **options: Any) -> str:
    """Return the table of the memory that a training run needs, as its option --plan prints it.

    Args:
        model: Name of the model.
        **options: Options of the training. `plan="24"` plans for a GPU of 24 GB that is not there.

    Raises:
        UserError: For what the user has to change.
    """
    run = train(model, **{"plan": True, **options}).wait()
    return "\n".join(run.lines)


def cache(model: str, *, callback: Callback | None = None, **options: Any) -> None:
    """Cache latents and texts of a dataset, as `reelsmith cache latents` and `reelsmith cache text` do.

    Args:
        model: Name of the model.
        callback: Called with each event.
        **options: Options of both commands; each gets those that it has.

    Raises:
        UserError: For what the user has to change; both commands are checked before the first one starts.
    """
    entry = _find_entry(model)
    parts = ("latents", "text_encoder_outputs")
    scripts = [ScriptArguments(Path(f"{entry.cache}_{part}.py")) for part in parts]
    for name in options.keys() - set().union(*(script.known for script in scripts)):
        # a mistyped name: the script with the most similar option rejects it and suggests that option
        nearest = [script for script in scripts if difflib.get_close_matches(name, script.known, 1)]
        (nearest or scripts)[0].known.add(name)
    commands = []
    for script in scripts:
        of_script = {name: value for name, value in options.items() if name in script.known}
        commands.append(_check(script, of_script))
    for checked in commands:
        checked.start().wait(callback)


def generate(model: str, *, callback: Callback | None = None, **options: Any) -> list[Path]:
    """Generate images or videos, as `reelsmith generate MODEL` does, and return the new and changed files.

    Args:
        model: Name of the model.
        callback: Called with each event.
        **options: Options of the command.

    Raises:
        UserError: For what the user has to change.
    """
    checked = _prepare(Path(f"{_find_entry(model).generation_script}.py"), options)
    folder = Path(checked.values["save_path"])
    before = _list_files(folder)
    checked.start().wait(callback)
    return [path for path, changed in _list_files(folder).items() if before.get(path) != changed]


def merge(*, callback: Callback | None = None, **options: Any) -> Path:
    """Merge LoRAs into a model file, as `reelsmith merge` does, and return the file.

    Args:
        callback: Called with each event.
        **options: Options of the command, such as `dit`, `lora_weight` and `save_merged_model`.

    Raises:
        UserError: For what the user has to change.
    """
    _prepare(Path("merge_lora.py"), options).start().wait(callback)
    return Path(options["save_merged_model"])


def command(words: str, *operands: object, **options: Any) -> CommandRun:
    """Start any command of this program, and return it while it runs.

    Args:
        words: Words of the command, such as "finetune wan", "new" or "download".
        *operands: Its words without an option, such as the folder of `new`.
        **options: Its options.

    Raises:
        UserError: If there is no such command, or for a wrong option.
    """
    scripts = {each.name: each.path.relative_to(ROOT) for each in find_commands(ROOT)}
    if words not in scripts:
        raise UserError(f"{words!r} is no command.{did_you_mean(words, scripts)}")
    return _prepare(scripts[words], options, operands).start()


@dataclass(frozen=True)
class CheckedCommand:
    """A command whose options were checked."""

    script: Path
    words: Sequence[str]  # that follow the script
    options: Mapping[str, Any]  # keyword arguments that became the words
    values: Mapping[str, Any]  # of all options of the script

    def start(self) -> CommandRun:
        """Start the command."""
        folder, name = self.values.get("output_dir"), self.values.get("output_name")
        history = None if folder is None or name is None else HistoryEvents(Path(folder), str(name))
        return CommandRun(self.script, self.words, self.options, history)


def _prepare(script: Path, options: Mapping[str, Any], operands: Sequence[object] = ()) -> CheckedCommand:
    return _check(ScriptArguments(script), options, operands)


def _check(
    arguments: ScriptArguments, options: Mapping[str, Any], operands: Sequence[object] = ()
) -> CheckedCommand:
    words = arguments.make_argv(operands, options)
    return CheckedCommand(arguments.script, words, options, arguments.check(words))


def _find_entry(model: str) -> FamilyEntry:
    """Return the family of a model by its name in the tree or in the commands: z_image, zimage, flux-2."""
    entries = {}
    for name, entry in with_scripts().items():
        entries[name] = entries[entry.script] = entry
    found = entries.get(str(model).replace("-", "_"))
    if found is None:
        raise UserError(
            f"{model!r} is no model.{did_you_mean(str(model), entries)} There are {', '.join(entries)}"
        )
    return found


def _list_files(folder: Path) -> dict[Path, int]:
    """Return the files in a folder with the times of their last change, in nanoseconds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    return {path: path.stat().st_mtime_ns for path in files}
