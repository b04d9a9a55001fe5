"""Keep the model's output for the captions of some tables: diff_output_preservation of a table.

The target of such a table's samples is the prediction of the model without the network, also in validation
and with other targets: see `samples_with_base_target` in `training/targets/passes.py`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from modules.errors import OptionError
from training.features.contract import AT_NETWORK, BASE_MODEL, Feature, FeatureOptions
from training.features.hooks import RunFeatures
from training.features.phases import TARGETS, VALIDATION_TARGETS
from training.learning_options import PRESERVE_OUTPUT

if TYPE_CHECKING:
    from torch import Tensor

    from training.loss import NoisyBatch
    from training.targets.passes import ListComparisons, TargetComparison, TrainingPasses


class OutputPreservationOptions(FeatureOptions, at=AT_NETWORK, attribute=PRESERVE_OUTPUT):
    """Output preservation, a feature without options: an attribute of a dataset table turns it on."""


def velocity_or_base_prediction(
    passes: "TrainingPasses", noisy_batch: "NoisyBatch", velocity: "Tensor"
) -> "Tensor":
    """Replace the velocity by the base model's prediction for samples whose dataset table asks for it.

    In lockstep, the base model runs for every batch, because all processes have to run the same passes.
    """
    from training.targets.passes import (  # torch: only in a training run
        samples_with_base_target,
        select_per_sample,
    )

    is_preserved = samples_with_base_target(noisy_batch)
    if any(is_preserved):
        base_output = passes.predict_base_model(noisy_batch)
        return select_per_sample(is_preserved, base_output, velocity)
    if passes.rule.always_runs_base_model:
        passes.predict_base_model(noisy_batch)
    return velocity


def preserve(
    list_comparisons: "ListComparisons",
    passes: "TrainingPasses",
    noisy_batch: "NoisyBatch",
) -> "list[TargetComparison]":
    """Use the base model's prediction as the target of samples whose dataset table asks for preservation."""
    clip, *others = list_comparisons(passes, noisy_batch)
    return [replace(clip, target=velocity_or_base_prediction(passes, noisy_batch, clip.target)), *others]


def _join(run: RunFeatures, options: OutputPreservationOptions) -> None:
    if run.options.full_dit is not None:
        name = next(table.name for table in run.tables if PRESERVE_OUTPUT in table.learning.attributes)
        raise OptionError(
            f"{name}: {PRESERVE_OUTPUT} compares a LoRA with the model without it, and here the model "
            "itself is trained. Omit it"
        )
    run.needs.add(BASE_MODEL)
    run.around(TARGETS, preserve)
    run.around(VALIDATION_TARGETS, preserve)


OUTPUT_PRESERVATION = Feature(
    name="output_preservation",
    options=OutputPreservationOptions,
    is_on=lambda options: False,  # only a table's attribute turns it on
    join=_join,
)
