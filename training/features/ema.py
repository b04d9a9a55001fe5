"""Keep an exponential moving average (EMA) of the trained weights: --ema_decay.

`ema_weights.py` computes it. It is saved next to each file, and in states.
"""

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import FREE, SAMPLES_ONLY, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import AverageInfo, HookedModel, RunFeatures
from training.features.phases import SAMPLE, STEP

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.training_run import GradientStep, TrainingRun


class EmaOptions(FeatureOptions, title="average of the weights (EMA)", at=AT_WEIGHTS, facts=FREE):
    """Options of the exponential moving average (EMA) of the trained weights."""

    ema_decay: float | None = option(
        "keep an exponential moving average of the trained weights with this decay per step (0.999) and "
        "save it as OUTPUT_NAME...-ema.safetensors next to each file",
        above=0,
        below=1,
        hint="such as 0.999",
    )
    ema_update_every: int = option(
        "update the average every N steps, with the decay of N steps: for a whole model, whose average "
        "is in host memory",
        default=1,
        minimum=1,
        acts_if={"there is no --ema_decay": lambda options: options.ema_decay is not None},
    )
    sample_ema: bool = option(
        "generate samples with the average", needs="ema_decay", hint="0.999 is usual", facts=SAMPLES_ONLY
    )


def _start_average(options: EmaOptions, model: HookedModel) -> None:
    """Start the moving average of the trained weights."""
    from training.features.ema_weights import make_average  # torch: only with --ema_decay

    assert options.ema_decay is not None  # the feature is on
    average = make_average(
        options.ema_decay,
        options.ema_update_every,
        dits=model.networks,
        trainable=model.trainable,
        optimizer=model.optimizer,
        is_needed=model.takes_part_in_saving,
    )
    if average is not None:
        model.average = average


def _update_average(run: "TrainingRun", step: "GradientStep") -> None:
    """Update the average after a step that was taken; some processes keep none."""
    if run.model.average is not None and not step.skipped:
        run.model.average.after_step()


def _sample_average(sample: "Callable[[TrainingRun], None]", run: "TrainingRun") -> None:
    """Generate samples with the average in place of the trained weights (--sample_ema)."""
    average = run.model.average
    with contextlib.nullcontext() if average is None else average.in_place():
        sample(run)


def _join(run: RunFeatures, options: EmaOptions) -> None:
    if run.options.full_dit is not None and options.sample_ema:
        raise OptionError(
            "--sample_ema: the average of a whole model is in host memory. Omit it, and generate "
            "with the ...-ema.safetensors file"
        )
    run.average = AverageInfo("EMA", is_sampled=options.sample_ema)
    run.on.after_load.append(partial(_start_average, options))
    run.after(STEP, _update_average)
    if options.sample_ema:
        run.around(SAMPLE, _sample_average)


EMA = Feature(
    name="ema",
    options=EmaOptions,
    is_on=lambda options: options.ema_decay is not None,
    join=_join,
)
