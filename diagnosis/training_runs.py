"""Findings about trainings: losses that rise, break or stop falling, from the history that a run writes."""

import math
from collections.abc import Iterator, Sequence

from data_tools.report.diagnosis.finding import Finding
from training.scoring.run import ScoredRun

MIN_STEPS = 50  # fewer losses are mostly the noise of single steps
RISE = 1.15  # last losses / first losses
VALIDATION_RISE = 1.05  # last validation loss / lowest one
MIN_VALIDATIONS = 4
BROKEN = 1  # losses that are not finite


def find_run_findings(run: ScoredRun) -> Iterator[Finding]:
    """Yield findings about a recorded run."""
    losses = [loss for _, loss in sorted(run.run_history.loss.items())]
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if len(losses) - len(finite) >= BROKEN:
        yield _describe_broken_losses(run)
    elif len(finite) >= MIN_STEPS:
        yield from _find_rising_losses(finite, run)
    yield from _find_overfitting(run)


def _describe_broken_losses(run: ScoredRun) -> Finding:
    broken = [step for step, loss in run.run_history.loss.items() if loss is None or not math.isfinite(loss)]
    return Finding(
        "loss-broken",
        run.history.name,
        figure=len(broken),
        limit=BROKEN,
        text=f"The loss of {len(broken)} of {len(run.run_history.loss)} steps is NaN or infinite, first at "
        f"step {min(broken)}.",
        meaning="Every file that was saved after that step is worthless.",
        remedy="Take an earlier file, or train again with a learning rate of a tenth, --max_grad_norm 1 and "
        "bf16.",
    )


def _find_rising_losses(losses: Sequence[float], run: ScoredRun) -> Iterator[Finding]:
    """Yield a finding if the mean loss of the last fifth is well above that of the first."""
    fifth = len(losses) // 5
    first, last = _mean(losses[:fifth]), _mean(losses[-fifth:])
    if last < RISE * first:
        return
    rates = [rate for points in run.run_history.rates.values() for rate in points.values() if rate]
    highest = f" The highest learning rate is {max(rates):g}." if rates else ""
    yield Finding(
        "loss-rises",
        run.history.name,
        figure=last / first,
        limit=RISE,
        text=f"The loss rises from {first:.4g} (first fifth of the steps) to {last:.4g} (last "
        f"fifth).{highest}",
        meaning="Steps are too large: each overwrites what the ones before have learned.",
        remedy="Train again with --learning_rate a tenth as high.",
    )


def _find_overfitting(run: ScoredRun) -> Iterator[Finding]:
    """Yield a finding if the validation loss had its lowest value well before the end."""
    validations = {step: loss for step, loss in run.run_history.validations.items() if step > 0}
    lowest = min(validations.items(), key=lambda item: (item[1], item[0]), default=None)
    if lowest is None or len(validations) < MIN_VALIDATIONS:
        return
    best_step, best_loss = lowest
    last_step = max(validations)
    ratio = validations[last_step] / best_loss if best_loss else 1.0
    if ratio < VALIDATION_RISE:
        return
    best_file = run.run_history.best_file(run.folder)
    take = f"Take {best_file}." if best_file else f"Train again for {best_step} steps."
    yield Finding(
        "validation-rises",
        run.history.name,
        figure=ratio,
        limit=VALIDATION_RISE,
        text=f"The validation loss is lowest at step {best_step} ({best_loss:.4g}) and {ratio - 1:.0%} "
        f"higher at step {last_step}.",
        meaning="After that step the images are learned by heart.",
        remedy=take,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
