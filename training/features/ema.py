"""Keep an exponential moving average (EMA) of the trained weights: --ema_decay.

`ema_weights.py` computes it. It is saved next to each file, and in states.
"""

from functools import partial

from modules.errors import OptionError
from modules.options import FREE, SAMPLES_ONLY, option
from training.features.contract import AT_WEIGHTS, Feature, FeatureOptions
from training.features.hooks import AverageInfo, HookedModel, RunFeatures


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


def _keep_average(run: RunFeatures, options: EmaOptions, model: HookedModel) -> None:
    """Start the moving average of the trained weights, and update it after each step."""
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
        run.on.after_step.append(average.after_step)


def _join(run: RunFeatures, options: EmaOptions) -> None:
    if run.options.full_dit is not None and options.sample_ema:
        raise OptionError(
            "--sample_ema: the average of a whole model is in host memory. Omit it, and generate "
            "with the ...-ema.safetensors file"
        )
    run.average = AverageInfo("EMA", is_sampled=options.sample_ema)
    run.on.after_load.append(partial(_keep_average, run, options))


EMA = Feature(
    name="ema",
    options=EmaOptions,
    is_on=lambda options: options.ema_decay is not None,
    join=_join,
)
