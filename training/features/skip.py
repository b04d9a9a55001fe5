"""Skip bad steps: --skip_bad_steps and --skip_spikes.

The decision needs the loss and the gradient norm on the host before the weights are stepped, so each step
waits for the device. A run without these options does not wait.
"""

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import (
    AGAINST_BAD_STEPS,
    AT_WEIGHTS,
    SKIPPED_STEPS,
    Feature,
    FeatureOptions,
)
from training.features.hooks import RunFeatures
from training.features.phases import STEP

if TYPE_CHECKING:
    from training.training_run import GradientStep, TrainingRun

logger = logging.getLogger(__name__)

MAX_FACTOR = 1_000_000.0  # beyond any spike
TAKEN, BAD, SPIKE, FATAL = 0, 1, 2, 3  # outcomes; the largest one among the processes counts
OUTCOME_NAMES = {BAD: "bad", SPIKE: "spike"}  # names in the history
WINDOW = 100  # number of norms of taken steps in the median
MIN_NORMS = 20  # number of norms that are needed before a step can be a spike
MAX_SPIKES = 20  # after this many spikes in a row, their size is accepted as normal
REMEDY = "--skip_bad_steps 3 leaves out up to three such steps in a row."  # in the error without the option


class SkipOptions(FeatureOptions, title="steps that go wrong", at=AT_WEIGHTS, facts=HABIT):
    """Options that skip optimizer steps with unusual gradient norms or non-finite losses."""

    skip_bad_steps: int | None = option(
        "skip steps whose loss or gradient norm is NaN or infinite, at most N in a row; the next one "
        "ends the run, as the first one does without this option",
        minimum=1,
        maximum=1_000_000,
        metavar="N",
        hint="omit it to end the run at the first one",
        facts={AGAINST_BAD_STEPS: REMEDY},
    )
    skip_spikes: float | None = option(
        "skip steps whose gradient norm is above FACTOR times the median of the last 100 taken steps, "
        "from the 21st step on",
        above=1,
        maximum=MAX_FACTOR,
        metavar="FACTOR",
        hint="5 to 10 are usual",
        known_as=("skip_grad_norm",),
    )


@dataclass
class SkipProgress:
    """State of step skipping; gradient norms and counts of spikes are kept for each kind of step."""

    bad_in_a_row: int = 0  # number of bad steps immediately before
    spikes_in_a_row: dict[str, int] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)  # norms of the last taken steps


@dataclass(frozen=True)
class Skipping:
    """Decide which steps of a run are skipped.

    Only steps of the same kind are compared, because gradient norms differ between transformers, and between
    steps with and without audio.
    """

    options: SkipOptions
    progress: SkipProgress
    has_scaler: bool  # fp16: the gradient scaler handles norms that are not finite

    def judge(self, loss: float, norm: float, kind: str) -> int:
        """Return the outcome of a step: TAKEN, SPIKE, BAD or FATAL. Counters change only in `record`.

        Args:
            loss: Mean loss of the step.
            norm: Norm of the gradients before clipping.
            kind: Kind of the step; only norms of the same kind are compared.
        """
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or self.has_scaler)
        if not is_finite:
            is_allowed = self.progress.bad_in_a_row < (self.options.skip_bad_steps or 0)
            return BAD if is_allowed else FATAL
        limit = self.limit(kind)
        return SPIKE if limit is not None and math.isfinite(norm) and norm > limit else TAKEN

    def limit(self, kind: str) -> float | None:
        """Return the gradient norm above which a step of this kind is a spike; None without enough steps."""
        from statistics import median  # not needed for --help

        factor = self.options.skip_spikes
        norms = self.progress.norms.get(kind, [])
        if factor is None or len(norms) < MIN_NORMS:
            return None
        return factor * median(norms)

    def record(self, outcome: int, norm: float, kind: str) -> bool:
        """Record the outcome of a step: TAKEN, BAD or SPIKE.

        Returns:
            Whether the step is the last of MAX_SPIKES spikes in a row. That many spikes mean a new level of
            norms: the median starts over with the next step.
        """
        progress = self.progress
        progress.bad_in_a_row = progress.bad_in_a_row + 1 if outcome == BAD else 0
        # norms are compared only with --skip_spikes, and a bad step has no usable norm
        records_norms = self.options.skip_spikes is not None and math.isfinite(norm)
        if outcome == BAD or not records_norms:
            return False
        if outcome == TAKEN:
            progress.spikes_in_a_row[kind] = 0
            norms = progress.norms.setdefault(kind, [])
            norms.append(norm)
            del norms[:-WINDOW]
            return False
        num_spikes = progress.spikes_in_a_row.get(kind, 0) + 1
        if num_spikes < MAX_SPIKES:
            progress.spikes_in_a_row[kind] = num_spikes
            return False
        progress.spikes_in_a_row[kind] = 0
        progress.norms[kind] = []  # the next norms form a new median
        return True


def judge_step(run: "TrainingRun", step: "GradientStep") -> None:
    """Let a step be skipped, and log why; the reason for the history is a name of `OUTCOME_NAMES`.

    All processes call this and get the same answer.

    Raises:
        UserError: If the loss or the norm is not finite in too many steps in a row.
    """
    from training.processes import reduce_max  # loads torch, which --help does not need

    progress = run.progress.feature_state(SkipProgress)
    skipping = Skipping(run.options.of(SkipOptions), progress, run.has_scaler)
    assert step.norm is not None  # --fused_backward_pass is rejected
    loss = float(step.loss)
    norm = float(step.norm)
    kind = run.name_kind(step.batches)
    limit = skipping.limit(kind)
    # GPUs of different kinds may differ in the last digits, but all processes must make the same decision
    outcome = reduce_max(skipping.judge(loss, norm, kind), run.steps.num_processes, run.device)
    if outcome == FATAL:
        from training.bad_steps import explain_bad_step  # only when the run ends

        num_skipped = progress.bad_in_a_row
        remedy = "" if num_skipped else REMEDY  # not if --skip_bad_steps is in use
        number = run.progress.step + 1
        raise explain_bad_step(number, loss, norm, step.keys, remedy=remedy, before=num_skipped)
    is_new_level = skipping.record(outcome, norm, kind)
    if outcome == TAKEN:
        return
    # Warn why a step is skipped, listing its items from all processes; all processes must call this
    reason = describe_skip(outcome, loss, norm=norm, limit=limit, is_new_level=is_new_level)
    keys = step.keys
    if run.steps.num_processes > 1:
        from accelerate.utils import gather_object  # only of several processes

        keys = gather_object([*step.keys])
    if run.is_main:
        items = ", ".join(dict.fromkeys(keys))
        logger.warning("Step %d is skipped: %s Its items: %s", run.progress.step + 1, reason, items)
    step.skipped = OUTCOME_NAMES[outcome]


def _count_skipped(run: "TrainingRun", step: "GradientStep") -> None:
    run.features.info.in_files[SKIPPED_STEPS] = run.progress.skipped


def describe_skip(
    outcome: int, loss: float, norm: float, limit: float | None, is_new_level: bool = False
) -> str:
    """Return the reason why a step is skipped, in complete sentences.

    Args:
        outcome: SPIKE or BAD.
        loss: Mean loss of the step.
        norm: Norm of the gradients before clipping.
        limit: Norm above which a step is a spike; None if there is no limit yet.
        is_new_level: Whether this spike was one too many in a row, so that norms of its size are accepted
            from now on.
    """
    if outcome == BAD:
        return f"the loss is {loss:.4g}, the gradient norm {norm:.4g}."
    text = f"the gradient norm is {norm:.4g}"
    if limit is not None:
        text += f", above the limit of {limit:.4g} that --skip_spikes sets"
    if is_new_level:
        text += f". {MAX_SPIKES} in a row are not spikes: steps are taken again, and the median starts over"
    return f"{text}."


def _join(run: RunFeatures, options: SkipOptions) -> None:
    if run.options.is_fused:
        flag = "--skip_spikes" if options.skip_bad_steps is None else "--skip_bad_steps"
        raise OptionError(
            f"{flag} with --fused_backward_pass: weights are stepped inside the backward pass, before the "
            "norm of all gradients is known. Omit one of the two"
        )
    run.progress_records.append(SkipProgress)
    run.info.in_files |= asdict(options)
    run.before(STEP, judge_step)
    run.after(STEP, _count_skipped)


SKIP = Feature(
    name="skip",
    options=SkipOptions,
    is_on=lambda options: options.skip_bad_steps is not None or options.skip_spikes is not None,
    join=_join,
)
