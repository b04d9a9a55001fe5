"""A feature of training: `--sample_rise 0.5` makes samples when the loss rises by more than that."""

from functools import partial

from reelsmith.modules.options import FREE, option
from reelsmith.training.features.contract import AT_LOGS, Feature, FeatureOptions
from reelsmith.training.features.phases import LOG, SAMPLE


class RiseOptions(FeatureOptions, title="samples of a rise", at=AT_LOGS, facts=FREE):
    """How much the loss has to rise."""

    sample_rise: float | None = option("sample when the loss of a step is this much above the last one's")


def compare_losses(options, losses, run, report):
    losses.append(report.loss)
    rise = losses[-1] - losses[-2] if len(losses) > 1 else 0.0
    if rise > options.sample_rise:
        run.note(f"the loss rose by {rise:.3f}", report.step)
        run.request(SAMPLE, "the loss has risen")


def join(run, options):
    run.after(LOG, partial(compare_losses, options, []))


RISE = Feature("rise", RiseOptions, is_on=lambda options: options.sample_rise is not None, join=join)
