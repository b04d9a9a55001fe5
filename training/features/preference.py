"""Learn from pairs of a preferred and a rejected image or clip: --preference.

Caches contain the rejected ones, which a table names with worse_directory. The passes are in
`preference_pairs.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import (
    AT_NETWORK,
    REJECTED_ONES,
    Feature,
    FeatureOptions,
    given_values,
)
from training.features.hooks import PlannedRun, RunFeatures, Tally
from training.features.phases import LOSS
from training.features.step_targets import PassCounts, StepTarget
from training.learning_options import PRESERVE_OUTPUT
from training.reports.metric_charts import MetricChart, MetricTile

if TYPE_CHECKING:
    from protocols.family import Family

# logged values of each step: errors of preferred and rejected items, fraction of pairs in the right order
CHOSEN_ERROR, REJECTED_ERROR, RIGHT_ORDER = "preference/better", "preference/worse", "preference/right"


class PreferenceOptions(FeatureOptions, title="preferences", at=AT_NETWORK, facts=HABIT):
    """How strongly the chosen item of each pair is preferred (Diffusion-DPO)."""

    preference: float | None = option(
        "learn from pairs of a chosen and a rejected image or clip (worse_directory in the dataset): "
        "predict the chosen one more accurately than the model without the network, the rejected one "
        "less accurately. BETA controls how soon a pair counts as learned. Each step runs two passes, "
        "one of them without gradients, over batches of twice the size",
        above=0,
        maximum=1_000_000,
        metavar="BETA",
        hint="2000 to 5000 are usual",
        known_as=("dpo", "flow_dpo", "dpo_beta", "beta_dpo"),
    )
    preference_data_weight: float = option(
        "add the default loss of the chosen one with this weight",
        default=0.0,
        minimum=0,
        maximum=1000,
        needs="preference",
        metavar="W",
    )

    @property
    def beta(self) -> float:
        """Value of --preference, for code that runs only if the option is set."""
        assert self.preference is not None  # the feature is on
        return self.preference


def _check(options: PreferenceOptions, family: "Family", counts: Sequence[int]) -> None:
    from protocols.family import get_audio_spec, trains_audio  # loads torch, which --help does not need

    audio = get_audio_spec(family)
    if audio is not None and (
        audio.audio_only or (trains_audio(family) and family.audio_learning.clean_stream)
    ):
        raise OptionError(
            f"--preference {options.beta:g}: pairs consist of images, but only one stream is trained here. "
            "Omit it"
        )


def _check_tables(run: RunFeatures) -> None:
    """Raise OptionError if a dataset table asks for output preservation, which has its own target."""
    preserving = next(
        (table.name for table in run.tables if PRESERVE_OUTPUT in table.learning.attributes), None
    )
    if preserving is not None:
        raise OptionError(
            f"{preserving}: {PRESERVE_OUTPUT} cannot be used with --preference, whose loss has no "
            "place for another target. Omit one of the two"
        )


def _require_pairs(plan: PlannedRun) -> None:
    from training.features.preference_pairs import require_pairs  # torch: only with --preference

    require_pairs(plan.training, plan.sources.stores, plan.sources.encoders.commands)


def _start(options: PreferenceOptions, logged_metrics: Tally, run: RunFeatures) -> None:
    from training.features.preference_pairs import Preference, pair_passes  # torch: only with --preference

    preference = Preference(options.beta, options.preference_data_weight)
    run.around(LOSS, partial(pair_passes, preference, logged_metrics))


def _join(run: RunFeatures, options: PreferenceOptions) -> None:
    """Register --preference: a run learns from pairs of a chosen and a rejected item (Diffusion-DPO)."""
    _check_tables(run)
    target = StepTarget(
        option=f"--preference {options.beta:g}",
        description=f"the better one of each pair, beta {options.beta:g}",
        # both the pass with gradients and the base model's pass run on both items of a pair
        passes=PassCounts(with_gradients=0, without_gradients=1, batch_factor=2),
        reason_to_exclude_others="the loss of a pair has no place for another target",
        has_joint_audio_loss=True,
    )
    run.targets.append(target)
    run.needs.add(REJECTED_ONES)
    run.info.in_files |= given_values(options)
    logged_metrics = Tally(
        (CHOSEN_ERROR, REJECTED_ERROR, RIGHT_ORDER),
        charts=[
            MetricChart(
                "Error at both of a pair", "error", {"better one": CHOSEN_ERROR, "worse one": REJECTED_ERROR}
            ),
            MetricChart("Share of pairs that are right", "share", {"right": RIGHT_ORDER}),
        ],
        tiles=[MetricTile("Pairs that are right", RIGHT_ORDER, "the better one is learned more")],
    )
    run.tallies.append(logged_metrics)
    run.on.check.append(partial(_check, options))
    run.on.plan.append(_require_pairs)
    run.on.start.append(partial(_start, options, logged_metrics))


PREFERENCE = Feature(
    name="preference",
    options=PreferenceOptions,
    is_on=lambda options: options.preference is not None,
    join=_join,
)
