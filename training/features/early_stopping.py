"""End a run once its validation loss no longer falls: --early_stopping_patience.

The final files are saved as they would be after the last step. Their metadata records that the run ended
early, so that `reelsmith run` does not continue it. All processes have the same losses, so they make the same
decision.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import PlannedRun, RunFeatures
from training.features.phases import END, VALIDATE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training.training_run import TrainingRun


class EarlyStoppingOptions(FeatureOptions, title="early stopping", at=AT_WEIGHTS, facts=HABIT):
    """Options that end a run early if its validation loss no longer improves."""

    early_stopping_patience: int | None = option(
        "end the run if the validation loss has not been below its lowest value in N measurements",
        minimum=1,
        maximum=1_000_000,
        metavar="N",
        hint="3 is usual",
    )


@dataclass
class EarlyStoppingProgress:
    """Lowest validation loss of a run, in saved states; field names are part of the state format."""

    lowest_loss: float = float("inf")
    lowest_step: int = 0
    measured_since: int = 0


def end_if_no_lower(run: "TrainingRun", losses: "Mapping[str, float]", *, patience: int) -> None:
    """End the run if the loss of a validation was not the lowest one for `patience` times in a row.

    If it ends, the metadata of its files gets the step of the lowest loss.
    """
    from training.reports.history import LOSS  # not needed for --help

    if run.progress.step == 0:  # the untrained model, of which there is no file to return to
        return
    progress = run.progress.feature_state(EarlyStoppingProgress)
    if losses[LOSS] < progress.lowest_loss:
        progress.lowest_loss, progress.lowest_step = losses[LOSS], run.progress.step
        progress.measured_since = 0
        return
    progress.measured_since += 1
    if progress.measured_since < patience:
        return
    run.features.info.in_files["ended_early"] = progress.lowest_step
    reason = (
        f"the validation loss was lowest at step {progress.lowest_step} ({progress.lowest_loss:.5f}), and "
        f"not below it in {progress.measured_since} measurements since"
    )
    run.request(END, reason)


def _require_validation(planned: PlannedRun) -> None:
    if not planned.validation:
        raise OptionError(
            "--early_stopping_patience needs a validation loss: pass --validation_split 0.1, or a table with "
            "validation = true"
        )


def _join(run: RunFeatures, options: EarlyStoppingOptions) -> None:
    patience = options.early_stopping_patience
    assert patience is not None  # the feature is on
    run.progress_records.append(EarlyStoppingProgress)
    run.on.plan.append(_require_validation)
    run.after(VALIDATE, partial(end_if_no_lower, patience=patience))


EARLY_STOPPING = Feature(
    name="early_stopping",
    options=EarlyStoppingOptions,
    is_on=lambda options: options.early_stopping_patience is not None,
    join=_join,
)
