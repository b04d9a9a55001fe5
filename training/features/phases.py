"""The phases of a run, and how features stand before, around and after them.

A phase is one function of a run, such as the step of the optimizer. `RunFeatures` (`hooks.py`) collects what
features add to phases; its `wrap` returns a phase's function together with these additions, or the function
itself if there are none. So a feature that is off costs no call.

The first argument of a phase is the object that it works on: the run, or the passes of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:  # the types of what phases hand to features; this file itself is light
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from training.loss import NoisyBatch
    from training.reports.logs import StepReport
    from training.saving.files import Saver
    from training.targets.passes import StreamErrors, TargetComparison, TrainingPasses
    from training.training_run import GradientStep, TrainingRun
    from training.validation import Validation

Subject = TypeVar("Subject")
Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)  # compared as objects
class RunPhase(Generic[Subject, Given, Result]):
    """A part of a run that features can stand before, around and after."""

    name: str


@dataclass(frozen=True)
class Additions:
    """Functions that features put at one phase."""

    before: list[Callable[..., object]] = field(default_factory=list)
    around: list[Callable[..., Any]] = field(default_factory=list)
    after: list[Callable[..., object]] = field(default_factory=list)


def call_between(
    before: Sequence[Callable[..., object]],
    phase: Callable[..., Result],
    after: Sequence[Callable[..., object]],
    subject: Any,
    *given: Any,
) -> Result:
    """Call a phase between the functions of features; those after it get its result."""
    for act in before:
        act(subject, *given)
    result = phase(subject, *given)
    for act in after:
        act(subject, result)
    return result


# The passes of a micro-batch. What the network's prediction is compared with: first the velocity of the clip.
# TARGETS is for training, VALIDATION_TARGETS for the validation loss, which otherwise compares with the clip
TARGETS: "RunPhase[TrainingPasses, [NoisyBatch], list[TargetComparison]]" = RunPhase("targets")
VALIDATION_TARGETS: "RunPhase[TrainingPasses, [NoisyBatch], list[TargetComparison]]" = RunPhase("validation")
# yields the errors of each pass with gradients; a feature that does not call it replaces the usual pass
LOSS: "RunPhase[TrainingPasses, [NoisyBatch], Iterator[StreamErrors]]" = RunPhase("loss")
# a pass with gradients; returns the prediction
PREDICT: "RunPhase[TrainingPasses, [NoisyBatch], Tensor]" = RunPhase("predict")

# The training loop, in its order. After GRADIENTS, gradients are summed over processes, and not clipped yet;
# before STEP, a feature can set `GradientStep.skipped`
GRADIENTS: "RunPhase[TrainingRun, [range, Iterator[NoisyBatch]], GradientStep]" = RunPhase("gradients")
STEP: "RunPhase[TrainingRun, [GradientStep], GradientStep]" = RunPhase("step")
# logs the report of a step, whose values have arrived on the host: one step later, or before a pause
LOG: "RunPhase[TrainingRun, [StepReport], StepReport]" = RunPhase("log")
# measures the losses, by name, at the end of a step or an epoch (STEP or EPOCH of `validation.py`)
VALIDATE: "RunPhase[TrainingRun, [Validation, str], Mapping[str, float]]" = RunPhase("validate")
# generates the samples that `Progress.sample_pending` names
SAMPLE: "RunPhase[TrainingRun, [], None]" = RunPhase("sample")
# writes the files of the model under a name, in processes that take part in saving; returns their paths
SAVE: "RunPhase[Saver, [str], list[Path]]" = RunPhase("save")
END: "RunPhase[Any, [], None]" = RunPhase("end")
