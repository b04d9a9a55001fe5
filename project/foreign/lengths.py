"""Determine the length of a run in steps, from a project's steps or epochs, and its intervals."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from project.foreign import contract
from project.foreign.project import FileEpochs, ForeignProject
from project.new_options import NewOptions

_SCHEDULES_WITHOUT_WARMUP = {"constant": "constant_with_warmup"}
_OVERRIDDEN = "--max_train_steps sets another value"


@dataclass(frozen=True)
class Epoch:
    """Number of training steps and of media files in one epoch."""

    steps: int
    num_files: int


def select_length(
    project: ForeignProject, options: NewOptions, steps_per_epoch: int, num_files: int
) -> NewOptions:
    """Return the options with the number of training steps that a project file sets.

    Epochs are converted to steps. `steps_per_epoch` is for the new dataset.toml, with all of its files.
    """
    epoch = Epoch(_count_steps_per_epoch(project, steps_per_epoch), num_files)
    # the steps that the file sets; 0 has no effect there, as if the key were missing
    file_steps: int | None = project.new_options.get("max_train_steps") or None
    if file_steps is None and "max_train_steps" in project.new_options:
        key = project.get_file_key("max_train_steps")
        project.remove_from_report(key)
        project.ineffective_keys.append(key)
    # settings of 0 epochs have no effect
    epochs = [setting for setting in project.epoch_settings if setting.number]
    project.ineffective_keys += [setting.key for setting in project.epoch_settings if not setting.number]
    default_steps = NewOptions(folder=options.folder).max_train_steps
    if options.max_train_steps != default_steps:
        # the command line sets the length, so that the project's has no effect
        for file_epochs in epochs:
            project.report_omitted_value(file_epochs.key, file_epochs.number, _OVERRIDDEN)
        if file_steps is not None and file_steps != options.max_train_steps:
            _report_unused_steps(project, file_steps, _OVERRIDDEN)
        steps = options.max_train_steps
    else:
        steps = _select_steps(project, epochs, file_steps, epoch) or options.max_train_steps
    _resolve_intervals(project, epoch)
    _resolve_warmup(project, steps)
    return dataclasses.replace(options, max_train_steps=steps)


def _count_steps_per_epoch(project: ForeignProject, steps_per_epoch: int) -> int:
    """Return the steps per epoch, even if the project draws a fixed number of files from each dataset."""
    if project.program.draws_one_size:  # dataset.toml has a table for each size
        num_sizes = len(project.general_keys.get("resolution", [None]))
        steps_per_epoch = math.ceil(steps_per_epoch / num_sizes)
    files_per_epoch = [dataset.files_per_epoch for dataset in project.datasets.values()]
    if files_per_epoch and all(count is not None for count in files_per_epoch):
        batch = project.general_keys.get("batch_size", 1) * project.training_options.get(
            "gradient_accumulation_steps", 1
        )
        steps_per_epoch = math.ceil(sum(count or 0 for count in files_per_epoch) / batch)
    return max(steps_per_epoch, 1)


def _select_steps(
    project: ForeignProject, epochs: Sequence[FileEpochs], file_steps: int | None, epoch: Epoch
) -> int | None:
    """Return the training length that a project sets: its number of steps, or the steps of its epochs."""
    # `epochs` are keys of the file that give a number of epochs, and `file_steps` is the file's number of
    # steps. Returns None if neither is set. Unused keys are reported.
    chosen = _select_epochs(epochs, file_steps, epoch.steps)
    deciding_key = project.get_file_key("max_train_steps") if chosen is None else chosen.key
    reason = f"{deciding_key} counts, as in {project.title}"
    for file_epochs in epochs:
        if file_epochs is not chosen:
            project.report_omitted_value(file_epochs.key, file_epochs.number, reason)
    if chosen is None:
        return file_steps
    if file_steps is not None:
        _report_unused_steps(project, file_steps, reason)
    steps = min(chosen.number * epoch.steps, contract.MAX_STEPS)
    default_note = f", as {project.title} has it" if chosen.key in project.assumed_defaults else ""
    project.change_lines.append(
        f"{chosen.key} = {chosen.number}{default_note}: max_train_steps = {steps}, with {epoch.steps} in an "
        f"epoch of {epoch.num_files} files here"
    )
    return steps


def _select_epochs(
    epochs: Sequence[FileEpochs], file_steps: int | None, steps_per_epoch: int
) -> FileEpochs | None:
    """Return the number of epochs that sets the training length; None if a number of steps sets it."""
    for file_epochs in epochs:
        if file_epochs.precedence == contract.FIRST:
            return file_epochs
    if file_steps is None:
        return next(iter(epochs), None)
    for file_epochs in epochs:
        if file_epochs.precedence == contract.SOONEST and file_epochs.number * steps_per_epoch < file_steps:
            return file_epochs
    return None


def _report_unused_steps(project: ForeignProject, steps: int, reason: str) -> None:
    """Report that the project's number of steps is not used."""
    key = project.get_file_key("max_train_steps")
    project.remove_from_report(key)
    project.assumed_defaults.pop(key, None)
    project.report_omitted_value(key, steps, reason)


def _resolve_intervals(project: ForeignProject, epoch: Epoch) -> None:
    """Set how often to save and sample, in steps; intervals in epochs are converted."""
    training = project.training_options
    for option, interval in project.epoch_intervals.items():
        # an interval in epochs counts only if the file gives none in steps
        if not interval.number:
            project.ineffective_keys.append(interval.key)
        elif training.get(option):
            reason = f"{project.source_keys[option]} says it"
            project.report_omitted_value(interval.key, interval.number, reason)
        else:
            if option in training:  # 0 steps means never: use the interval in epochs
                project.remove_option(option, "")
            training[option] = min(interval.number * epoch.steps, contract.MAX_STEPS)
            project.report_change(interval.key, interval.number, f"{option} = {training[option]}")
    for option in ("save_every_n_steps", "sample_every_n_steps"):
        if training.get(option) == 0:  # never: the option is omitted
            project.remove_option(option, "")
    save_interval = training.get("save_every_n_steps")
    if save_interval is None:
        if project.kept_files is not None:
            key, count = project.kept_files
            project.report_omitted_value(key, count, "the file does not say how often files are saved")
        return
    # as `new` does, keep each state, and each large file, until the next one is saved
    training.setdefault("save_last_n_steps_state", save_interval)
    if project.kept_files is not None:
        key, count = project.kept_files
        # older files than this are removed: 1 step keeps the newest alone
        training["save_last_n_steps"] = max((count - 1) * save_interval, 1)
        project.report_change(key, count, f"save_last_n_steps = {training['save_last_n_steps']}")
    elif project.keeps_only_latest:
        training.setdefault("save_last_n_steps", save_interval)


def _resolve_warmup(project: ForeignProject, steps: int) -> None:
    """Convert a project's warm-up to steps, and select a learning rate schedule with warm-up."""
    # `steps` is the number of training steps.
    training = project.training_options
    if project.warmup_fraction is not None:
        key, fraction = project.warmup_fraction
        # a fraction of the run counts only if the file gives no steps
        if training.get("lr_warmup_steps"):
            project.omission_lines.append(f"{key}: {project.source_keys['lr_warmup_steps']} says it")
        elif fraction:
            warmup_steps = round(fraction * steps)
            training["lr_warmup_steps"] = warmup_steps
            result = f"percent of the steps, so lr_warmup_steps = {warmup_steps}"
            project.report_change(key, f"{fraction * 100:g}", result)
        else:
            training["lr_warmup_steps"] = 0  # instead of the warm-up that `new` sets for full training
            project.adopted_keys.append(key)
    scheduler = training.get("lr_scheduler", "constant")
    if training.get("lr_warmup_steps") and scheduler in _SCHEDULES_WITHOUT_WARMUP:
        training["lr_scheduler"] = _SCHEDULES_WITHOUT_WARMUP[scheduler]
        project.report_change("lr_scheduler", training["lr_scheduler"], f"{scheduler}, after the warm-up")
