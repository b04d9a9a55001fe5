"""Say what the targets of a run are, and what their passes cost: for the box at its start and for --check."""

from collections.abc import Iterator
from dataclasses import dataclass

from modules.console import count_of
from networks.teacher_options import BASE, TeacherOptions
from training.features.composing import describe_features
from training.options import TrainingOptions

# time of a pass without gradients as a share of one with: a LoRA's backward pass takes as long as the forward
# pass; with checkpointed blocks, or if the model itself learns, twice as long
SHARES = 1 / 3, 1 / 2


@dataclass(frozen=True)
class StepPasses:
    """Count the passes of a micro-batch, at most."""

    with_gradients: int = 1
    without: int = 0
    size: int = 1  # of a pass, in micro-batches

    @property
    def words(self) -> str:
        """Return the numbers, and the time of a step as a multiple of that of a plain one."""
        low, high = (self.size * (self.with_gradients + share * self.without) for share in SHARES)
        size = " of batches twice as large" if self.size > 1 else ""
        counts = f"{self.with_gradients} with gradients, {self.without} without{size}"
        return f"{counts}: about {low:.1f} to {high:.1f} times a plain step"


def count_passes(options: TrainingOptions) -> StepPasses:
    """Return the passes that the options ask for. Raises OptionError for a file of --slider with faults."""
    if options.slider is not None:
        from training.targets.sliders import read_sliders  # only with --slider

        file = read_sliders(options.slider)
        return StepPasses(4, 4) if file.has_anchors else StepPasses(2, 3)
    if options.preference.preference is not None:
        return StepPasses(1, 1, size=2)
    learning, frozen = 1, 0
    if options.guided.guided_target is not None:
        frozen += 1
    if options.teacher.teacher is not None:
        frozen += 3 if options.teacher.teacher_delta else 1
    if options.prior.mask_prior_weight is not None:
        frozen += 1
    if options.prior.blank_prior_weight is not None:
        learning, frozen = learning + 1, frozen + 1
    return StepPasses(learning, frozen)


def describe_targets(options: TrainingOptions) -> list[str]:
    """Return a line for each target of a run, and one on its passes; nothing without targets."""
    lines = [*_list_targets(options)]
    passes = count_passes(options)
    if passes != StepPasses():
        lines.append(f"passes in a step: {passes.words}")
    return lines + describe_features(options)


def _list_targets(options: TrainingOptions) -> Iterator[str]:
    guided, prior, preference = options.guided, options.prior, options.preference
    if guided.guided_target is not None:
        lowest = guided.guided_target_min_timestep
        above = f", from {lowest} thousandths of noise on" if lowest else ""
        yield f"away from the prediction for the empty prompt, {guided.guided_target:g} times as far{above}"
    if options.teacher.teacher is not None:
        yield _describe_teacher(options.teacher)
    if prior.mask_prior_weight is not None:
        yield f"outside masks as the model without the network, weight {prior.mask_prior_weight:g}"
    if prior.blank_prior_weight is not None:
        weight = prior.blank_prior_weight
        yield f"for the empty prompt as the model without the network, weight {weight:g}"
    if options.slider is not None:
        yield f"captions of {options.slider} at strength 1 and -1"
    if preference.preference is not None:
        yield f"the better one of each pair, beta {preference.preference:g}"


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
