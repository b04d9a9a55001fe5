"""The functions of `import reelsmith`: each runs a `reelsmith` command, with its options by name.

A command runs in a separate process, so its results are identical to the command line's, and its memory is
free when it has ended.
"""

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.report.diagnosis.finding import Finding
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
from training.saving.files import state_pattern
from training.saving.options import LATEST_ONLY

__all__ = [
    "CommandRun",
    "Event",
    "Finding",
    "LineEvent",
    "SampleEvent",
    "SavedEvent",
    "StepEvent",
    "UserError",
    "ValidationEvent",
    "cache",
    "command",
    "diagnose",
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
        **options: Options of the command by name; `reelsmith train MODEL --help` lists them. Usual ones are
            dit, dataset, output_dir, output_name, network_module, network_dim, learning_rate,
            max_train_steps and save_state. `dataset` is --dataset_config, `config` is --config_file. Pass
            True for a switch, a list for several values, and a dict for KEY=VALUE words.

    Raises:
        UserError: If an option is wrong, with the message of the command.
    """
    return _check_script(Path(f"{_find_entry(model).training_script}.py"), options).start()


def resume(run: CommandRun, **changes: Any) -> CommandRun:
    """Resume a training run from its last saved state, and return it while it runs.

    A run saves a state if it is stopped, and with the options `save_state` or `save_state_on_train_end`.

    Args:
        run: The training run.
        **changes: Options that change from now on, such as `learning_rate` or `max_train_steps`.

    Raises:
        UserError: If the run has not ended, has saved no state or no step is left, or if an option is wrong.
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
    checked = _check_script(run.script, options)
    _require_steps_and_state(run, checked.values)
    return checked.start()


def _require_steps_and_state(run: CommandRun, values: Mapping[str, Any]) -> None:
    """Raise UserError if a run has no steps left or no saved state, in the words of `train`."""
    steps = values.get("max_train_steps")
    last_step = max(run.losses, default=0)
    if not values.get("max_train_epochs") and steps is not None and last_step >= steps:
        raise UserError(
            f"the training has ended with all its {last_step} steps. To train longer, pass more, such as "
            f"resume(run, max_train_steps={2 * last_step})"
        )
    folder, name = values.get("output_dir"), values.get("output_name")
    if folder is None or name is None or values.get("resume_from_huggingface"):
        return
    pattern = state_pattern(str(name))
    if not any(pattern.fullmatch(path.name) for path in _list_modification_times(Path(folder))):
        weights = values.get("network_module") is not None and run.saved
        instead = ", or begin a new run with its weights: network_weights=run.saved[-1]" if weights else ""
        raise UserError(
            f"there is no state of {name} in {folder}: a run saves one if it is stopped, and with "
            f"save_state=True or save_state_on_train_end=True. Train again with one of these{instead}"
        )


def plan(model: str, **options: Any) -> str:
    """Return the table of the memory that a training run needs, as the command prints it with --plan.

    Args:
        model: Name of the model.
        **options: Options of the training command, as those of `train`. `plan="24"` plans for a 24 GB GPU,
            even on a machine without one.

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
        **options: Options of both commands, which `reelsmith cache latents MODEL --help` and
            `reelsmith cache text MODEL --help` list; each command gets the options that it has.

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
        **options: Options of the command, which `reelsmith generate MODEL --help` lists.

    Raises:
        UserError: If an option or file is wrong, with the message of the command.
    """
    checked = _check_script(Path(f"{_find_entry(model).generation_script}.py"), options)
    target = Path(checked.values["save_path"])  # a folder, or the file of a single result
    old_times = _list_modification_times(target)
    checked.start().wait(callback)
    changed = []
    for path, time in _list_modification_times(target).items():
        if old_times.get(path) == time:
            continue
        # the frames of a clip are in a folder, which is always a new one
        changed += [path] if path.is_file() else [*_list_modification_times(path)]
    return changed


def merge(*, callback: Callback | None = None, **options: Any) -> Path:
    """Merge LoRAs into a model file, as `reelsmith merge` does, and return the path of the new file.

    Args:
        callback: Called with each event.
        **options: Options of the command, such as `dit`, `lora_weight` and `save_merged_model`;
            `reelsmith merge --help` lists them.

    Raises:
        UserError: If an option or file is wrong, with the message of the command.
    """
    _check_script(Path("merge_lora.py"), options).start().wait(callback)
    return Path(options["save_merged_model"])


def diagnose(
    path: str | Path,
    *,
    with_lora: str | Path | None = None,
    lora_multiplier: Sequence[float] = (),
    dit: str | Path | None = None,
) -> list[Finding]:
    """Return what keeps a LoRA from working, as `reelsmith diagnose PATH` prints it.

    Args:
        path: A folder that `new` described, a dataset file, the folder or history of a run, or a LoRA file.
        with_lora: A second LoRA file that is used together with the first.
        lora_multiplier: Strengths of both LoRA files; 1 where none is given.
        dit: A transformer file with 16-bit weights, into which the LoRA files may be merged.

    Raises:
        UserError: If the path is anything else or cannot be read, with the message of the command.
    """
    given = {"with_lora": with_lora, "lora_multiplier": [*lora_multiplier] or None, "dit": dit}
    options = {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "findings.json"
        command("diagnose", path, json=target, **options).wait()
        content = json.loads(target.read_text(encoding="utf-8"))
    return [Finding(**values) for values in content["findings"]]


def command(words: str, *operands: object, **options: Any) -> CommandRun:
    """Start any `reelsmith` command, and return it while it runs.

    Args:
        words: Name of the command, such as "finetune wan", "new" or "download".
        *operands: Positional arguments, such as the folder of `new`.
        **options: Options of the command, which its `--help` lists.

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


def _list_modification_times(path: Path) -> dict[Path, int]:
    """Return the times in ns of the last change of a file, or of what is directly in a folder."""
    # what may not be read, and is no result, is left out
    with contextlib.suppress(OSError):
        entries = [path] if path.is_file() else sorted(path.iterdir())
        return {entry: entry.stat().st_mtime_ns for entry in entries if os.access(entry, os.R_OK)}
    return {}
