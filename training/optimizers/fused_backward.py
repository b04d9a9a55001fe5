"""Step weights after the backward passes of a step, or inside the only one (--fused_backward_pass).

Inside it, gradients never exist all at once. As soon as a weight's gradient is complete (all its uses are
differentiated by then, so nothing needs the old value any more) the gradient is clipped by itself, the weight
stepped, the gradient freed. Besides weights and optimizer state only the largest gradient needs memory.
Without clipping the result equals that of the usual order, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.errors import OptionError
from training.optimizers.parameter_steps import ParameterSteps, require_alone
from training.processes.gradients import fill_missing_gradients, norm_of_gradients

OPTION = "--fused_backward_pass"


@dataclass(frozen=True)
class StepAfterBackward:
    """Clip all gradients together and step all weights, once a step's gradients are summed."""

    optimizer: Optimizer
    parameters: Sequence[Parameter]
    max_norm: float  # 0 turns clipping off
    scaler: torch.amp.GradScaler
    before: Callable[[], None]  # called once gradients are clipped
    alone: ParameterSteps | None = None  # steps the weights one after the other

    def begin(self, reached: Sequence[Parameter]) -> None:
        """Set missing gradients of the weights that a step changes to zero."""
        fill_missing_gradients(reached)

    def finish(self) -> Tensor:
        """Clip and step. Returns the norm of all gradients before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = norm_of_gradients(self.parameters)
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        self.before()
        if self.alone is not None:
            self.alone.step_all(self.parameters)
        else:  # as the optimizer itself does, if the scaler is off
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm


class FusedBackward:
    """Step `parameters` in every backward pass from now on. Call `finish` after each."""

    def __init__(self, steps: ParameterSteps, parameters: Sequence[Parameter], max_norm: float) -> None:
        """max_norm: of each gradient by itself; 0 turns clipping off."""
        self._steps, self._parameters, self._max_norm = steps, parameters, max_norm
        self._norms: dict[Parameter, Tensor] = {}  # of the gradients of this pass, before clipping
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    def begin(self, reached: Sequence[Parameter]) -> None:
        """Do nothing: most weights are stepped already."""

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Step the weights without a gradient as if it were zero.

        Returns the norm of all gradients before clipping.
        """
        for parameter in self._parameters:
            if parameter not in self._norms:
                parameter.grad = torch.zeros_like(parameter)
                self._complete(parameter)
        norms = [self._norms[parameter] for parameter in self._parameters]
        self._norms = {}
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def _complete(self, parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameter, self._max_norm, norm)
        self._steps.step(parameter)
        parameter.grad = None
        self._norms[parameter] = norm


def check_fused_backward(optimizer_type: str, processes: int) -> None:
    """Raise OptionError if --fused_backward_pass cannot be used, before anything large is loaded."""
    if processes > 1:
        raise OptionError(
            f"{OPTION} with {processes} processes: their gradients would have to be summed before any weight "
            "is stepped. Use one process, or leave it out"
        )
    require_alone(OPTION, optimizer_type)
