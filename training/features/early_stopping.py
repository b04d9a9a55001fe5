"""End a run once its validation loss no longer falls: --early_stopping_patience.

The final files are saved as they would be after the last step. Their metadata records that the run ended
early, so that `reelsmith run` does not continue it. All processes have the same losses, so they make the same
decision.
"""

from dataclasses import dataclass
from functools import partial

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import HookedRun, PlannedRun, RunFeatures, RunInfo


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


def reason_to_stop(run: HookedRun, loss: float, patience: int, info: RunInfo) -> str:
    """Return why the run ends after a validation with this loss; "" if it continues.

    If it ends, the metadata of files in `info` gets the step of the lowest loss.
    """
    if run.progress.step == 0:  # the untrained model, of which there is no file to return to
        return ""
    progress = run.progress.feature_state(EarlyStoppingProgress)
    if loss < progress.lowest_loss:
        progress.lowest_loss, progress.lowest_step = loss, run.progress.step
        progress.measured_since = 0
        return ""
    progress.measured_since += 1
    if progress.measured_since < patience:
        return ""
    info.in_files["ended_early"] = progress.lowest_step
    return (
        f"the validation loss was lowest at step {progress.lowest_step} ({progress.lowest_loss:.5f}), and "
        f"not below it in {progress.measured_since} measurements since"
    )


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
    run.on.after_validation.append(partial(reason_to_stop, patience=patience, info=run.info))


EARLY_STOPPING = Feature(
    name="early_stopping",
    options=EarlyStoppingOptions,
    is_on=lambda options: options.early_stopping_patience is not None,
    join=_join,
)
