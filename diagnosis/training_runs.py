"""Findings about trainings: losses that rise, break or stop falling, from the history that a run writes."""

import math
import os
from collections.abc import Iterator, Sequence

from data_tools.report.diagnosis.finding import Finding
from modules.command import quote_for_shell
from training.reports.history import THIS_RUN, history_name
from training.scoring.run import ScoredRun

MIN_STEPS = 50  # fewer losses are mostly the noise of single steps
RISE = 1.15  # last losses / first losses
# first validation loss of the training / that of the untrained model, of equal noise and timesteps: in sound
# trainings it falls
WORSE = 1.1
VALIDATION_RISE = 1.05  # last validation loss / lowest one
MIN_VALIDATIONS = 4
BROKEN = 1  # losses that are not finite


def find_run_findings(run: ScoredRun) -> Iterator[Finding]:
    """Yield findings about a recorded run."""
    losses = [loss for _, loss in sorted(run.run_history.loss.items())]
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if len(losses) - len(finite) >= BROKEN:
        yield _describe_broken_losses(run)
        return
    rises = list(_find_worse_model(run))
    if not rises and len(finite) >= MIN_STEPS:
        rises = list(_find_rising_losses(finite, run))
    # a rate that is too high explains a validation loss that rises
    yield from rises or _find_overfitting(run)


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
        remedy="Take an earlier file, or train again with --max_grad_norm 1, bf16 and a tenth of the rate"
        + _describe_slower_run(run),
    )


def _find_worse_model(run: ScoredRun) -> Iterator[Finding]:
    """Yield a finding if the first steps have made the model worse on held-out items."""
    validations = sorted(run.run_history.validations.items())
    if len(validations) < 2 or validations[0][0] != 0 or not validations[0][1]:
        return
    (_, untrained), (step, loss), *_ = validations
    if loss < WORSE * untrained:
        return
    yield Finding(
        "loss-rises",
        run.history.name,
        figure=loss / untrained,
        limit=WORSE,
        text=f"The validation loss rises from {untrained:.4g} before the training to {loss:.4g} at step "
        f"{step}.{_describe_highest_rate(run)}",
        meaning="Steps are too large: they destroy what the model knows before the LoRA has learned.",
        remedy=f"Train again with a tenth of the rate{_describe_slower_run(run)}",
    )


def _find_rising_losses(losses: Sequence[float], run: ScoredRun) -> Iterator[Finding]:
    """Yield a finding if the mean loss of the last fifth is well above that of the first."""
    fifth = len(losses) // 5
    first, last = _mean(losses[:fifth]), _mean(losses[-fifth:])
    if last < RISE * first:
        return
    yield Finding(
        "loss-rises",
        run.history.name,
        figure=last / first,
        limit=RISE,
        text=f"The loss rises from {first:.4g} (first fifth of the steps) to {last:.4g} (last "
        f"fifth).{_describe_highest_rate(run)}",
        meaning="Steps are too large: each overwrites what the ones before have learned.",
        remedy=f"Train again with a tenth of the rate{_describe_slower_run(run)}",
    )


def _list_rates(run: ScoredRun) -> list[float]:
    return [rate for points in run.run_history.rates.values() for rate in points.values() if rate]


def _describe_highest_rate(run: ScoredRun) -> str:
    rates = _list_rates(run)
    return f" The highest learning rate is {max(rates):g}." if rates else ""


def _describe_slower_run(run: ScoredRun) -> str:
    """Return ": " and the command of the run with a tenth of its learning rate, or as much as is known."""
    rates = _list_rates(run)
    if not rates:
        return ": --learning_rate"
    words = ["--learning_rate", f"{max(rates) / 10:g}"]
    command = next((command for command in run.run_history.commands if command.title == THIS_RUN), None)
    if command is None:
        return f": {' '.join(words)}"
    text = command.powershell if os.name == "nt" else command.bash
    # under another name, so that the files of this run stay
    words += ["--output_name", f"{history_name(run.history)}-slower"]
    return f": {text} {quote_for_shell(words)}"


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
