"""Keep predictions for the empty prompt close to those of the base model: --blank_prior_weight."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_NETWORK, EMPTY_PROMPT, Feature, FeatureOptions
from training.features.hooks import RunFeatures
from training.features.phases import LOSS
from training.features.step_targets import PassCounts, StepTarget

if TYPE_CHECKING:
    from training.loss import NoisyBatch
    from training.targets.passes import RunPasses, StreamErrors, TrainingPasses


class BlankPriorOptions(FeatureOptions, title="what the model keeps", at=AT_NETWORK, facts=HABIT):
    """Weight of a loss term that keeps predictions for the empty prompt close to the base model."""

    blank_prior_weight: float | None = option(
        "keep the prediction for the empty prompt close to that of the model without the network, with "
        "this weight. Adds two passes to each step, one of them with gradients",
        above=0,
        maximum=100,
        hint="0.5 to 1 are usual",
        known_as=("blank_prompt_preservation", "blank_prompt_preservation_multiplier"),
    )

    @property
    def weight(self) -> float:
        """Loss weight of the error for the empty prompt; 0 if the option is not given."""
        return self.blank_prior_weight or 0.0


def run_blank_pass(
    weight: float,
    run_others: "RunPasses",
    passes: "TrainingPasses",
    noisy_batch: "NoisyBatch",
) -> "Iterator[StreamErrors]":
    """Yield the weighted error between the network and the base model with the empty prompt, then the others.

    Masks apply only to the comparison with the clip, so all positions count here.
    """
    from training.targets.passes import measure_errors, without_masks  # torch: only with this target

    blank = replace(noisy_batch, batch=noisy_batch.batch.with_empty_text())
    target = passes.predict_base_model(blank)
    passes.reset_network_seed(noisy_batch)
    errors = measure_errors(passes, passes.predict_with_gradients(blank), target, without_masks(blank))
    passes.reset_network_seed(noisy_batch)  # for the next pass of this batch
    yield tuple(weight * error for error in errors)
    yield from run_others(passes, noisy_batch)


def _join(run: RunFeatures, options: BlankPriorOptions) -> None:
    """Register --blank_prior_weight: a second pass keeps the base model's prediction for the empty prompt."""
    if run.options.is_fused:
        raise OptionError(
            "--blank_prior_weight with --fused_backward_pass: the gradients of its two passes are added up, "
            "but fused gradients are freed immediately. Omit one of the two"
        )
    target = StepTarget(
        option=f"--blank_prior_weight {options.weight:g}",
        description=f"for the empty prompt as the model without the network, weight {options.weight:g}",
        passes=PassCounts(with_gradients=1, without_gradients=1),
    )
    run.targets.append(target)
    run.needs.add(EMPTY_PROMPT)
    run.info.in_files |= asdict(options)
    run.around(LOSS, partial(run_blank_pass, options.weight))


BLANK_PRIOR = Feature(
    name="blank_prior",
    options=BlankPriorOptions,
    is_on=lambda options: options.blank_prior_weight is not None,
    join=_join,
)
