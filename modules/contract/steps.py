"""One step of the denoising loop: the inputs of guidance and watchers, and the texts they need."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from modules.contract.generation import Predict, Section


@dataclass(frozen=True)
class Step:
    """A step of the denoising loop, before the network is called."""

    index: int  # from 0, of those that are made
    num_steps: int  # that are made
    sigma: float  # noise level of `noisy`
    timestep: float  # what the network is fed
    noisy: Tensor  # B C F H W, float32


@dataclass(frozen=True)
class StepDone:
    """A step whose velocity is known, after guidance."""

    step: Step
    velocity: Tensor  # B C F H W, float32
    section: Section

    @property
    def clean(self) -> Tensor:
        """Predict the clean latents from this step, B C F H W.

        On the straight path of flow matching, noisy = (1 - sigma) clean + sigma noise, the velocity is
        noise - clean. If data keep their full share under the noise, noisy = clean + sigma noise, a family's
        `predict` returns the noise itself. The formula is the same for both.
        """
        return self.step.noisy - self.step.sigma * self.velocity


# Makes the velocity of a step, B C F H W, of the passes that it asks for.
Guidance = Callable[[Step, Predict, Section], Tensor]

# Called with each step. True: enough, take `StepDone.clean` as the result of the section. Raising ends the
# loop without a result.
Watcher = Callable[[StepDone], bool]


@dataclass(frozen=True)
class Needs:
    """Which conditions a guidance asks for beside the positive ones."""

    negative: bool = False
    blank: bool = False  # those of the empty text
    away: bool = False  # those of the text that attention is steered away from
