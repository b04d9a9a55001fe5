"""The passes of the network that a step of guidance consists of, and what is made of their velocities.

A guidance idea is a `Stage`: it declares the passes that it needs and changes the velocity by theirs. All
passes of a step's stages are requested together, each once, however many stages need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modules.contract.data import Conditions
from modules.contract.generation import NO_TWEAKS, Predict, Section, Tweaks

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
class Stage:
    """One guidance idea at one step."""

    passes: tuple[Pass, ...]
    # the velocity so far, which begins as that of the positive pass, and those of the passes -> the next one
    change: Callable[[Tensor, Velocities], Tensor]


@dataclass(frozen=True)
class StepPlan:
    """What one step consists of; without stages it is the positive pass alone."""

    stages: tuple[Stage, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Return the passes of all stages, each once, the positive one first."""
        return tuple(dict.fromkeys([POSITIVE, *(one for stage in self.stages for one in stage.passes)]))

    def combine(self, velocities: Velocities) -> Tensor:
        """Return the velocity that the solver follows."""
        velocity = velocities[POSITIVE]
        for stage in self.stages:
            velocity = stage.change(velocity, velocities)
        return velocity


def make_passes(
    plan: StepPlan, predict: Predict, section: Section, of_positive: Tweaks, join: JoinTweaks
) -> Velocities:
    """Run the passes of a step and return their velocities.

    Passes with the same tweaks are one call of `predict`, which may batch them; two passes with the same
    conditions and tweaks are one. of_positive: further tweaks of the passes that take the positive
    conditions. join: returns the same object whenever it is given the same ones, as `Tweaks.turn` requires.
    """
    calls: dict[Tweaks, list[Conditions]] = {}
    wanted: list[tuple[Pass, Tweaks, Conditions]] = []
    for one in plan.passes:
        conditions = getattr(section, one.text)
        assert conditions is not None, f"the section has no {one.text} conditions"
        tweaks = join(one.tweaks, of_positive) if one.text == "positive" else one.tweaks
        wanted.append((one, tweaks, conditions))
        together = calls.setdefault(tweaks, [])
        if not any(other is conditions for other in together):
            together.append(conditions)
    made = {
        (id(conditions), tweaks): velocity
        for tweaks, together in calls.items()
        for conditions, velocity in zip(together, _call(predict, together, tweaks), strict=True)
    }
    return {one: made[id(conditions), tweaks] for one, tweaks, conditions in wanted}


def _call(predict: Predict, conditions: Sequence[Conditions], tweaks: Tweaks) -> tuple[Tensor, ...]:
    return predict(*conditions, tweaks=tweaks)
