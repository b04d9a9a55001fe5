"""Steps of a denoising loop, as a rule of a step cache is asked about them."""

from torch import Tensor

from modules.contract.steps import Turn
from modules.step_cache import Rule


def turn(step: int, num_steps: int, which: str = "positive") -> Turn:
    return Turn(step, num_steps, 1000.0 * (1 - step / num_steps), which)


def nothing() -> Tensor:
    raise AssertionError("the rule looks at a tensor")


def answers(rule: Rule, num_steps: int) -> str:
    """One letter a step: c for computed, s for skipped."""
    return "".join("s" if rule.skips(turn(step, num_steps), nothing) else "c" for step in range(num_steps))
