"""Keep an exponential moving average (EMA) of the trained weights: --ema_decay.

How it is computed is in `ema_weights.py`. It is saved next to each file, and in states.
"""

from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import FREE, OF_SAMPLES, Options, option
from training.features.contract import AT_WEIGHTS, Feature

if TYPE_CHECKING:
    from training.features.hooks import HookedModel, OptionsOfRun


class EmaOptions(Options, title="average of the weights (EMA)"):
    """How the average that a run keeps next to its weights is computed, and whether samples show it."""

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
        least=1,
        acts_if={"there is no --ema_decay": lambda options: options.ema_decay is not None},
    )
    sample_ema: bool = option(
        "make samples with the average", needs="ema_decay", hint="0.999 is usual", facts=OF_SAMPLES
    )


def _refuse(options: "OptionsOfRun") -> None:
    if options.whole_dit is not None and options.of(EmaOptions).sample_ema:
        raise OptionError(
            "--sample_ema: the average of a whole model is in host memory. Leave it out, and generate "
            "with the ...-ema.safetensors file"
        )


def _keep_average(model: "HookedModel") -> None:
    from training.features.ema_weights import make_average  # torch: only with --ema_decay

    options = model.options.of(EmaOptions)
    assert options.ema_decay is not None  # the feature is on
    average = make_average(
        options.ema_decay,
        options.ema_update_every,
        dits=model.networks,
        trainable=model.trainable,
        optimizer=model.optimizer,
        keeps=model.takes_part_in_saving,
    )
    if average is not None:
        model.average = average
        model.hooks.after_step.append(average.after_step)


EMA = Feature(
    name="ema",
    options=EmaOptions,
    place=AT_WEIGHTS,
    is_on=lambda options: options.ema_decay is not None,
    facts=FREE,
    refuse=_refuse,
    average="EMA",
    samples_average=lambda options: options.sample_ema,
    install=lambda hooks, options, progress: hooks.after_load.append(_keep_average),
)
