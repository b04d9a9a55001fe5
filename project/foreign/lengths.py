"""Determine the length of a run in steps, from a project's steps or epochs, and its intervals."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from project.foreign import contract
from project.foreign.project import FileEpochs, ForeignProject
from project.new_options import NewOptions

_SCHEDULES_WITHOUT_WARMUP = {"constant": "constant_with_warmup"}
_OVERRIDDEN = "--max_train_steps says otherwise"


@dataclass(frozen=True)
class Epoch:
    """Number of training steps and media files in one epoch of the dataset."""

    steps: int
    num_files: int


def select_length(
    project: ForeignProject, options: NewOptions, steps_per_epoch: int, num_files: int
) -> NewOptions:
    """Return the options with the number of training steps that a project file asks for.

    A number of epochs is converted to steps. `in_epoch` is the number of steps per epoch with the
    dataset.toml that is written.
    """
    epoch = Epoch(_count_steps_per_epoch(project, steps_per_epoch), num_files)
    file_steps = _read_file_steps(project)
    # settings of 0 epochs decide nothing
    epochs = [setting for setting in project.epoch_settings if setting.number]
    project.ineffective_keys += [setting.key for setting in project.epoch_settings if not setting.number]
    if _has_typed_steps(options):
        _report_unused_length(project, epochs, file_steps, options.max_train_steps)
        steps = options.max_train_steps
    else:
        steps = _select_steps(project, epochs, file_steps, epoch) or options.max_train_steps
    _resolve_intervals(project, epoch)
    _resolve_warmup(project, steps)
    return dataclasses.replace(options, max_train_steps=steps)


def _count_steps_per_epoch(project: ForeignProject, steps_per_epoch: int) -> int:
    """Return the steps per epoch, also if the project draws a fixed number of files from each dataset."""
    files_per_epoch = [dataset.files_per_epoch for dataset in project.datasets.values()]
    if files_per_epoch and all(count is not None for count in files_per_epoch):
        batch = project.general_keys.get("batch_size", 1) * project.training_options.get(
            "gradient_accumulation_steps", 1
        )
        steps_per_epoch = math.ceil(sum(count or 0 for count in files_per_epoch) / batch)
    return max(steps_per_epoch, 1)


def _has_typed_steps(options: NewOptions) -> bool:
    return options.max_train_steps != NewOptions(folder=options.folder).max_train_steps


def _read_file_steps(project: ForeignProject) -> int | None:
    """Return the number of steps that a project sets; None if the number is missing or 0."""
    steps: int | None = project.new_options.get("max_train_steps") or None
    if steps is None and "max_train_steps" in project.new_options:
        key = project.file_key_of("max_train_steps")
        project.remove_from_report(key)
        project.ineffective_keys.append(key)
    return steps


def _report_unused_length(
    project: ForeignProject, epochs: Sequence[FileEpochs], file_steps: int | None, typed: int
) -> None:
    """Report that the project's training length is not used, because another one was typed."""
    for file_epochs in epochs:
        project.report_omitted_value(file_epochs.key, file_epochs.number, _OVERRIDDEN)
    if file_steps is not None and file_steps != typed:
        _report_unused_steps(project, file_steps, _OVERRIDDEN)


def _select_steps(
    project: ForeignProject, epochs: Sequence[FileEpochs], file_steps: int | None, epoch: Epoch
) -> int | None:
    """Return the training length that a project sets: its number of steps, or the steps of its epochs.

    `epochs` are keys of the file that give a number of epochs, and `file_steps` is the file's number of
    steps, None if it has none. Keys that do not decide are reported.
    """
    chosen = _select_epochs(epochs, file_steps, epoch.steps)
    deciding_key = project.file_key_of("max_train_steps") if chosen is None else chosen.key
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
        "epoch "
        f"of {epoch.num_files} files here"
    )
    return steps


def _select_epochs(
    epochs: Sequence[FileEpochs], file_steps: int | None, steps_per_epoch: int
) -> FileEpochs | None:
    """Return the number of epochs that decides the length; None if a number of steps does."""
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
    key = project.file_key_of("max_train_steps")
    project.remove_from_report(key)
    project.assumed_defaults.pop(key, None)
    project.report_omitted_value(key, steps, reason)


def _resolve_intervals(project: ForeignProject, epoch: Epoch) -> None:
    """Convert a project's save and sample intervals, given in epochs or steps, to steps of this run."""
    training = project.training_options
    for name, interval in project.epoch_intervals.items():
        if not interval.number:
            project.ineffective_keys.append(interval.key)
        elif training.get(name):
            project.report_omitted_value(
                interval.key, interval.number, f"{project.source_keys[name]} says it"
            )
        else:
            if name in training:  # 0 steps means never: use the interval in epochs
                project.remove_option(name, "")
            training[name] = min(interval.number * epoch.steps, contract.MAX_STEPS)
            project.report_change(interval.key, interval.number, f"{name} = {training[name]}")
    for name in ("save_every_n_steps", "sample_every_n_steps"):
        if training.get(name) == 0:  # never: the option is omitted
            project.remove_option(name, "")
    saved = training.get("save_every_n_steps")
    if saved is not None:  # as `new` does, keep each state until the next one is saved
        training["save_last_n_steps_state"] = saved
    # of large files, only the latest save is kept, too
    if saved is not None and project.keeps_only_latest:
        training["save_last_n_steps"] = saved


def _resolve_warmup(project: ForeignProject, steps: int) -> None:
    """Convert a project's warm-up to steps, and choose a schedule that has a warm-up.

    `steps` is the number of steps of the run.
    """
    training = project.training_options
    # a warm-up given as a fraction of the run; a number of steps has precedence
    if project.warmup_fraction is not None:
        key, share = project.warmup_fraction
        if training.get("lr_warmup_steps"):
            project.omission_lines.append(f"{key}: {project.source_keys['lr_warmup_steps']} says it")
        elif share:
            training["lr_warmup_steps"] = round(share * steps)
            project.report_change(
                key,
                f"{share * 100:g}",
                f"percent of the steps, so lr_warmup_steps = {training['lr_warmup_steps']}",
            )
        else:  # remove the warm-up that `new` sets for full training
            training["lr_warmup_steps"] = 0
            project.adopted_keys.append(key)
    scheduler = training.get("lr_scheduler", "constant")
    if training.get("lr_warmup_steps") and scheduler in _SCHEDULES_WITHOUT_WARMUP:
        training["lr_scheduler"] = _SCHEDULES_WITHOUT_WARMUP[scheduler]
        project.report_change("lr_scheduler", training["lr_scheduler"], f"{scheduler}, behind the warm-up")
