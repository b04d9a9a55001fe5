"""Say what the targets of a run are, and what their passes cost: for the box at its start and for --check."""

from collections.abc import Iterator

from modules.console import count_of
from networks.teacher_options import BASE, TeacherOptions
from training.features.composing import add_passes, describe_features
from training.features.contract import StepPasses
from training.options import TrainingOptions


def count_passes(options: TrainingOptions) -> StepPasses:
    """Return the passes that the options ask for. Raises OptionError for a file of them with faults."""
    frozen = 0
    if options.teacher.teacher is not None:
        frozen += 3 if options.teacher.teacher_delta else 1
    return add_passes(StepPasses(without=frozen), options)


def describe_targets(options: TrainingOptions) -> list[str]:
    """Return a line for each target of a run, and one on its passes; nothing without targets."""
    lines = [*_list_targets(options)]
    passes = count_passes(options)
    if passes != StepPasses():
        lines.append(f"passes in a step: {passes.words}")
    return lines + describe_features(options, are_targets=False)


def _list_targets(options: TrainingOptions) -> Iterator[str]:
    if options.teacher.teacher is not None:
        yield _describe_teacher(options.teacher)
    yield from describe_features(options, are_targets=True)


def _describe_teacher(teacher: TeacherOptions) -> str:
    """Return whom the network learns from, how much of the loss that is, and at which noise."""
    name = "the model without the network"
    if teacher.teacher != BASE:
        model = teacher.teacher_dit.name if teacher.teacher_dit is not None else "the model itself"
        loras = count_of(len(teacher.loras()), "LoRA")
        name = f"{model} with {loras}" if teacher.loras() else model
        if teacher.teacher_delta:
            name = f"the change by {loras} in {model}"
    band = ""
    if teacher.band is not None:
        low, high = teacher.band
        band = f", which knows more from {low} to {high} thousandths of noise"
    return f"{teacher.teacher_weight:g} of the loss from {name}{band}"
