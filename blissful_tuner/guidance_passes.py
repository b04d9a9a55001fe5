"""Passes of the network in a step of guidance, and the stages that combine their velocities.

A kind of guidance is a `GuidanceStage`: it declares the passes that it needs and changes the velocity by
theirs. All passes of a step's stages are requested together, each once, however many stages need it.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modules.contract.data import Conditions
from modules.contract.steps import NO_TWEAKS, Predict, Section, Tweaks

JoinTweaks = Callable[[Tweaks, Tweaks], Tweaks]  # those of a pass, those of all passes -> both together


@dataclass(frozen=True)
class Pass:
    """A pass of the network: which of a section's conditions it takes, with which tweaks.

    Tweaks are equal only to themselves: stages that share a pass must share its tweaks.
    """

    text: Literal["positive", "negative", "blank"]
    tweaks: Tweaks = NO_TWEAKS


POSITIVE, NEGATIVE, BLANK = Pass("positive"), Pass("negative"), Pass("blank")
Velocities = Mapping[Pass, Tensor]  # of a step's passes, each B C F H W float32


@dataclass(frozen=True)
class GuidanceStage:
    """One guidance idea at one step."""

    passes: tuple[Pass, ...]
    # the velocity so far, which begins as that of the positive pass, and those of the passes -> the next one
    change: Callable[[Tensor, Velocities], Tensor]


@dataclass(frozen=True)
class PassPlan:
    """Passes and stages of one step; without stages it is the positive pass alone."""

    stages: tuple[GuidanceStage, ...] = ()
    factor: float = 1.0  # of the velocity in the end; 0: no pass is made
    tweaks: Tweaks = NO_TWEAKS  # of all passes

    @functools.cached_property
    def passes(self) -> tuple[Pass, ...]:
        """Return the passes of all stages, each once, the positive one first."""
        if self.factor == 0:
            return ()
        return tuple(dict.fromkeys([POSITIVE, *(one for stage in self.stages for one in stage.passes)]))

    @property
    def most_together(self) -> int:
        """Return how many passes can be one batch at most: those with the same tweaks."""
        return max(Counter(one.tweaks for one in self.passes).values(), default=0)

    def combine(self, velocities: Velocities) -> Tensor:
        """Return the velocity that the solver follows. There is at least one pass."""
        velocity = velocities[POSITIVE]
        for stage in self.stages:
            velocity = stage.change(velocity, velocities)
        return velocity if self.factor == 1 else velocity * self.factor


def make_passes(
    plan: PassPlan, predict: Predict, section: Section, of_positive: Tweaks, join: JoinTweaks
) -> Velocities:
    """Run the passes of a step and return their velocities.

    Passes with the same tweaks are one call of `predict`, which may batch them; two passes with the same
    conditions and tweaks are one. of_positive: further tweaks of the passes that take the positive
    conditions. join: returns the same object whenever it is given the same ones, as `Tweaks.turn` requires.
    """
    calls: dict[Tweaks, dict[int, Conditions]] = {}  # the conditions of each by their identity
    place: dict[Pass, tuple[Tweaks, int]] = {}
    for one in plan.passes:
        conditions = getattr(section, one.text)
        assert conditions is not None, f"the section has no {one.text} conditions"
        tweaks = join(one.tweaks, plan.tweaks)
        if one.text == "positive":
            tweaks = join(tweaks, of_positive)
        calls.setdefault(tweaks, {})[id(conditions)] = conditions
        place[one] = tweaks, id(conditions)
    made = {
        (tweaks, key): velocity
        for tweaks, together in calls.items()
        for key, velocity in zip(together, predict(*together.values(), tweaks=tweaks), strict=True)
    }
    return {one: made[where] for one, where in place.items()}
