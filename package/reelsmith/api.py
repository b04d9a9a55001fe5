"""The functions of `import reelsmith`: each runs a `reelsmith` command, with its options by name.

A command runs in a separate process, so its results are identical to the command line's, and its memory is
free when it has ended.
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
        **options: Options of the command by name. `dataset` is --dataset_config, `config` is --config_file.
            Pass True for a switch, a list for several values, and a dict for KEY=VALUE words.

    Raises:
        UserError: If an option is wrong, with the message of the command.
    """
    return _check_script(Path(f"{_find_entry(model).training_script}.py"), options).start()


def resume(run: CommandRun, **changes: Any) -> CommandRun:
    """Resume a training run that was stopped or has ended with a saved state, and return it while it runs.

    Args:
        run: The training run.
        **changes: Options that change from now on, such as `learning_rate` or `max_train_steps`.

    Raises:
        UserError: If the run has not ended, or if an option is wrong.
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
    return _check_script(run.script, options).start()


def plan(model: str, **options: Any) -> str:
    """Return the table of the memory that a training run needs, as the command prints it with --plan.

    Args:
        model: Name of the model.
        **options: Options of the training command. `plan="24"` plans for a 24 GB GPU, even on a machine
            without one.

    Raises:
        UserError: If an option or file is wrong, with the message of the command.
    """
    run = train(model, **{"plan": True, **options}).wait()
    return "\n".join(run.lines)


def cache(model: str, *, callback: Callback | None = None, **options: Any) -> None:
    """Cache latents and text embeddings, as `reelsmith cache latents` and `reelsmith cache text` do.

    Args:
        model: Name of the model.
        callback: Called with each event.
        **options: Options of both commands; each command gets the options that it has.

    Raises:
        UserError: If an option is wrong or a command fails; both are checked before the first one starts.
    """
    entry = _find_entry(model)
    scripts = [
        ScriptArguments(Path(f"{entry.cache}_{part}.py")) for part in ("latents", "text_encoder_outputs")
    ]
    # an unknown option is passed to one of the two scripts, which rejects it
    unknown_names = options.keys() - scripts[0].known - scripts[1].known
    rejecting_scripts = {name: _find_most_similar(scripts, name) for name in unknown_names}
    commands = []
    for script in scripts:
        script_options = {
            name: value
            for name, value in options.items()
            if name in script.known or rejecting_scripts.get(name) is script
        }
        commands.append(_check(script, script_options))
    for command in commands:
        command.start().wait(callback)


def _find_most_similar(scripts: Sequence[ScriptArguments], name: str) -> ScriptArguments:
    """Return the first script with an option similar to the unknown `name`; else the first script."""
    for script in scripts:
        if difflib.get_close_matches(name, script.known, 1):
            return script
    return scripts[0]


def generate(model: str, *, callback: Callback | None = None, **options: Any) -> list[Path]:
    """Generate images or videos, as `reelsmith generate MODEL` does, and return the new and changed files.

    Args:
        model: Name of the model.
        callback: Called with each event.
        **options: Options of the command.

    Raises:
        UserError: If an option or file is wrong, with the message of the command.
    """
    checked = _check_script(Path(f"{_find_entry(model).generation_script}.py"), options)
    folder = Path(checked.values["save_path"])
    old_times = _list_modification_times(folder)
    checked.start().wait(callback)
    new_times = _list_modification_times(folder)
    return [path for path, time in new_times.items() if old_times.get(path) != time]


def merge(*, callback: Callback | None = None, **options: Any) -> Path:
    """Merge LoRAs into a model file, as `reelsmith merge` does, and return the path of the new file.

    Args:
        callback: Called with each event.
        **options: Options of the command, such as `dit`, `lora_weight` and `save_merged_model`.

    Raises:
        UserError: If an option or file is wrong, with the message of the command.
    """
    _check_script(Path("merge_lora.py"), options).start().wait(callback)
    return Path(options["save_merged_model"])


def command(words: str, *operands: object, **options: Any) -> CommandRun:
    """Start any `reelsmith` command, and return it while it runs.

    Args:
        words: Name of the command, such as "finetune wan", "new" or "download".
        *operands: Positional arguments, such as the folder of `new`.
        **options: Options of the command.

    Raises:
        UserError: If the command does not exist, or if an option is wrong.
    """
    scripts = {each.name: each.path.relative_to(ROOT) for each in find_commands(ROOT)}
    if words not in scripts:
        raise UserError(f"{words!r} is not a command.{did_you_mean(words, scripts)}")
    return _check_script(scripts[words], options, operands).start()


@dataclass(frozen=True)
class CheckedCommand:
    """A command whose options were checked, ready to `start`."""

    script: Path
    argv: Sequence[str]  # arguments that follow the script
    options: Mapping[str, Any]  # keyword arguments that became `argv`
    values: Mapping[str, Any]  # of all options of the script

    def start(self) -> CommandRun:
        """Start the command in a process of its own, and return it while it runs."""
        folder, name = self.values.get("output_dir"), self.values.get("output_name")
        history = None if folder is None or name is None else HistoryEvents(Path(folder), str(name))
        return CommandRun(self.script, self.argv, self.options, history)


def _check_script(
    script: Path, options: Mapping[str, Any], operands: Sequence[object] = ()
) -> CheckedCommand:
    """Check the options of a script as the script itself does, without starting it."""
    return _check(ScriptArguments(script), options, operands)


def _check(
    arguments: ScriptArguments, options: Mapping[str, Any], operands: Sequence[object] = ()
) -> CheckedCommand:
    argv = arguments.make_argv(operands, options)
    return CheckedCommand(arguments.script, argv, options, arguments.check(argv))


def _find_entry(model: str) -> FamilyEntry:
    """Return the family of a model by its folder or command name, such as z_image, zimage or flux-2."""
    entries = {}
    for name, entry in with_scripts().items():
        entries[name] = entries[entry.script] = entry
    found = entries.get(str(model).replace("-", "_"))
    if found is None:
        raise UserError(
            f"{model!r} is not a model.{did_you_mean(str(model), entries)} There are {', '.join(entries)}"
        )
    return found


def _list_modification_times(folder: Path) -> dict[Path, int]:
    """Return the files in a folder with the times of their last change, in nanoseconds."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    return {path: path.stat().st_mtime_ns for path in files}
