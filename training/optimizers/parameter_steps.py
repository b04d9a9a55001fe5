"""Step one parameter at a time: inside the backward pass, and for weights that are kept in bf16.

A step is often smaller than half the distance between two bf16 numbers, and rounding to the nearest would
undo it each time. So weights in bf16 are stepped in float32 and rounded up or down at random, the nearer
number being the more likely: right on average. The optimizer sees float32 weights, so its moments are float32
too. The random bits are a function of seed, step and parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.errors import OptionError
from modules.seeds import derive_seed
from training.optimizers.optimizer import find_optimizer
from training.steps import Progress

# package -> classes whose step of a parameter depends on that parameter, its gradient and its own state alone
ALONE: Mapping[str, frozenset[str]] = {
    "torch": frozenset(
        {
            "ASGD",
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "Muon",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        }
    ),
    "transformers": frozenset({"Adafactor"}),
    "bitsandbytes": frozenset({"AdamW8bit", "PagedAdamW8bit", "Lion8bit"}),
    "lion_pytorch": frozenset({"Lion"}),
}
# end of the class name in lower case -> why it cannot step single weights
TOGETHER: Mapping[str, str] = {
    "prodigy": "it finds one learning rate from the gradients of all weights together",
    "schedulefree": "it counts its steps for all weights together",
}
_LOW_16 = 1 << 16  # bf16 keeps the upper 16 bits of a float32


@dataclass(frozen=True)
class ParameterSteps:
    """Step single parameters of an optimizer that `steps_alone`, to the bit as its own step of all would."""

    optimizer: Optimizer
    names: Mapping[Tensor, str]  # of every parameter
    progress: Progress  # seed and step, for rounding

    @cached_property
    def _group_indices(self) -> dict[Parameter, int]:
        groups = enumerate(self.optimizer.param_groups)
        return {parameter: index for index, group in groups for parameter in group["params"]}

    def step_all(self, parameters: Sequence[Parameter]) -> None:
        """Step the parameters one after the other. Each needs a gradient."""
        for parameter in parameters:
            self.step(parameter)

    @torch.no_grad()
    def step(self, parameter: Parameter) -> None:
        """Step one parameter by its gradient."""
        if parameter.dtype != torch.bfloat16:
            self._step(parameter, parameter)
            return
        assert parameter.grad is not None
        precise, state = Parameter(parameter.float()), self.optimizer.state
        precise.grad = parameter.grad.float()
        if parameter in state:
            state[precise] = state.pop(parameter)
        self._step(parameter, precise)
        if precise in state:
            state[parameter] = state.pop(precise)
        parameter.copy_(stochastic_bfloat16(precise.detach(), self._generator(parameter)))

    def _step(self, parameter: Parameter, stand_in: Parameter) -> None:
        """Step the optimizer as if it had only this parameter, with the settings of the parameter's group."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group = groups[self._group_indices[parameter]]
        members = group["params"]
        optimizer.param_groups, group["params"] = [group], [stand_in]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups, group["params"] = groups, members

    def _generator(self, parameter: Parameter) -> torch.Generator:
        # on the parameter's device: bits for billions of weights take seconds on a CPU
        seed = derive_seed(self.progress.seed, "rounding", self.progress.step, self.names[parameter])
        return torch.Generator(parameter.device).manual_seed(seed)


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values at random to one of their two bf16 neighbours, so that the mean is the value.

    The bits that bf16 has no room for count as a fraction; a random fraction is added to it, and the sum is
    cut off. NaN stays NaN. generator: on the device of the values.
    """
    noise = torch.randint(_LOW_16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # all bits of a GPU's NaN are set: a sum would run over, into a zero
    noise.masked_fill_(values.isnan(), 0)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-_LOW_16).view(torch.float32).to(torch.bfloat16)


def steps_alone(kind: Callable[..., Optimizer]) -> bool:
    """Return whether the optimizer class steps each parameter without looking at the others.

    False if that is not known.
    """
    return kind.__name__ in ALONE.get(kind.__module__.partition(".")[0], frozenset())


def require_alone(option: str, optimizer_type: str) -> None:
    """Raise OptionError if `option` cannot be used with the optimizer of that name."""
    kind = find_optimizer(optimizer_type)
    if steps_alone(kind):
        return
    known = (reason for ending, reason in TOGETHER.items() if kind.__name__.lower().endswith(ending))
    reason = next(known, "it is not known to step each weight by itself")
    raise OptionError(
        f"{option} with --optimizer_type {optimizer_type}: {reason}. Use Adafactor, AdamW, AdamW8bit or "
        f"Lion, or leave {option} out"
    )
