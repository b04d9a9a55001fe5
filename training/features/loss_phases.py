"""The loss of a run, with what features put around its phases."""

from dataclasses import replace

from training.features.hooks import RunFeatures
from training.features.phases import LOSS, PREDICT, TARGETS
from training.loss import LossRule
from training.targets.passes import TrainingPasses, compare_with_clip, run_usual_pass


def add_phases(rule: LossRule, features: RunFeatures) -> LossRule:
    """Return a loss rule with the phases TARGETS, LOSS and PREDICT; without features they stay None."""
    if TARGETS in features.added:
        rule = replace(rule, list_comparisons=features.wrap(TARGETS, compare_with_clip))
    if LOSS in features.added:
        rule = replace(rule, run_passes=features.wrap(LOSS, run_usual_pass))
    if PREDICT in features.added:
        rule = replace(rule, predict=features.wrap(PREDICT, TrainingPasses.predict))
    return rule
