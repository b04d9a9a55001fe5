"""Keep predictions outside masks close to those of the base model: --mask_prior_weight."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_NETWORK, Feature, FeatureOptions
from training.features.hooks import PlannedRun, RunFeatures
from training.features.phases import TARGETS
from training.features.step_targets import PassCounts, StepTarget

if TYPE_CHECKING:
    from torch import Tensor

    from dataset.batches.items import TrainingItem
    from dataset.cache.store import Stores
    from training.loss import NoisyBatch
    from training.targets.passes import ListComparisons, StreamErrors, TargetComparison, TrainingPasses


class MaskPriorOptions(FeatureOptions, title="what the model keeps", at=AT_NETWORK, facts=HABIT):
    """Weight of a loss term that keeps predictions outside masks close to the base model."""

    mask_prior_weight: float | None = option(
        "outside masks, keep the prediction close to that of the model without the network, with this "
        "weight. Adds one pass without gradients to steps with masks",
        above=0,
        maximum=100,
        hint="0.5 to 1 are usual",
        known_as=(
            "masked_prior_preservation_weight",
            "inverted_mask_prior",
            "inverted_mask_prior_multiplier",
        ),
    )

    @property
    def weight(self) -> float:
        """Loss weight of the error outside masks; 0 if the option is not given."""
        return self.mask_prior_weight or 0.0


def _require_masks(run: RunFeatures, options: MaskPriorOptions, plan: PlannedRun) -> None:
    """Raise OptionError if no training item has a loss mask."""
    if run.mask_input_option and not any(item.table.source.alpha_mask for item in plan.training):
        raise OptionError(
            f"--mask_prior_weight {options.weight:g} with {run.mask_input_option}: masks are inputs of the "
            "model there and do not weight the loss, so nothing is outside a mask. Omit one of the two, "
            "or let masks weight the loss: --masked_loss, or alpha_mask = true"
        )
    if not _has_masks(plan.training, plan.sources.stores):
        raise OptionError(
            f"--mask_prior_weight {options.weight:g}: no item has a mask, so nothing is outside of "
            "one. Set mask_directory or alpha_mask = true in a table and cache again, or omit the option"
        )


def _has_masks(items: "Sequence[TrainingItem]", stores: "Stores") -> bool:
    """Return whether any training item has a loss mask, reading cache headers up to the first mask."""
    if any(item.table.source.mask_directory is not None or item.table.source.alpha_mask for item in items):
        return True
    from protocols.data import LOSS_MASK  # torch: only with this target

    for item in items:  # in lists, each line may name a mask
        if (
            item.cache_info.on_the_fly_buckets is None
            and LOSS_MASK in stores.latent_store(item.table).read(item.file_name, False).keys
        ):
            return True
    return False


def compare_outside_masks(
    weight: float,
    list_others: "ListComparisons",
    passes: "TrainingPasses",
    noisy_batch: "NoisyBatch",
) -> "list[TargetComparison]":
    """Add the comparison with the base model outside masks; return only the others without masks."""
    from training.targets.passes import TargetComparison, has_mask  # torch: only with --mask_prior_weight

    comparisons = list_others(passes, noisy_batch)
    if not has_mask(noisy_batch):
        if passes.rule.in_lockstep:  # processes that share the model have to run the same passes
            passes.predict_base_model(noisy_batch)
        return comparisons
    target = passes.predict_base_model(noisy_batch)  # the prediction of the model without the network
    outside_masks = TargetComparison(target, partial(_measure_outside, passes), noisy_batch, weight)
    return [*comparisons, outside_masks]


def _measure_outside(
    passes: "TrainingPasses", output: "Tensor", target: "Tensor", noisy_batch: "NoisyBatch"
) -> "StreamErrors":
    from training.loss import sample_errors_outside  # torch, as above

    return sample_errors_outside(passes.family.noise, output - target, noisy_batch, passes.rule)


def _join(run: RunFeatures, options: MaskPriorOptions) -> None:
    target = StepTarget(
        option=f"--mask_prior_weight {options.weight:g}",
        description=f"outside masks as the model without the network, weight {options.weight:g}",
        passes=PassCounts(with_gradients=0, without_gradients=1),
    )
    run.targets.append(target)
    run.info.in_files |= asdict(options)
    run.on.plan.append(partial(_require_masks, run, options))
    run.around(TARGETS, partial(compare_outside_masks, options.weight))


MASK_PRIOR = Feature(
    name="mask_prior",
    options=MaskPriorOptions,
    is_on=lambda options: options.mask_prior_weight is not None,
    join=_join,
)
