"""Step weights after the backward passes of a step, or during the backward pass (--fused_backward_pass).

If weights are stepped during the backward pass, the gradients never all exist at the same time. As soon as a
weight's gradient is complete (by then, nothing needs the old value of the weight anymore), the gradient is
clipped by itself, the weight is stepped, and the gradient is freed. In addition to weights and optimizer
states, only the largest gradient needs memory. Without clipping, the result equals that of the usual order,
bit for bit.

If a weight is split over processes, each process steps its rows. For an optimizer that needs whole weights,
such as Adafactor, all processes gather one weight after the other.

A step is often smaller than half the distance between two bf16 numbers, and rounding to the nearest would
undo it each time. So weights in bf16 are stepped in float32 and rounded up or down at random, the nearer
number being more likely, which is correct on average. The optimizer sees float32 weights, so its moments are
float32 too. The random bits depend only on seed, step and parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.errors import OptionError
from modules.seeds import derive_seed
from networks.adapter import TrainableNetwork
from runtime.offload.sharding import gather_rows, slice_local_rows
from training.optimizers.optimizer import find_optimizer
from training.steps import Progress

# package -> classes whose step of each element depends only on it, its gradient and its own moments
PER_ELEMENT: Mapping[str, frozenset[str]] = {
    "torch": frozenset(
        {
            # fmt: off
            "ASGD",
            "Adadelta",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
            # fmt: on
        }
    ),
    "lion_pytorch": frozenset({"Lion"}),
    "schedulefree": frozenset({"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"}),
}
# package -> classes whose step of a parameter depends on that parameter, its gradient and its own state alone
PER_PARAMETER: Mapping[str, frozenset[str]] = {
    "torch": PER_ELEMENT["torch"] | {"Adafactor", "Muon"},
    "transformers": frozenset({"Adafactor"}),
    "bitsandbytes": frozenset({"AdamW8bit", "PagedAdamW8bit", "Lion8bit"}),
    "lion_pytorch": frozenset({"Lion"}),
}
# our own optimizers that step each parameter alone, by module; they are imported only if they are selected
OWN_OPTIMIZERS = {"training.optimizers.muon": "MuonWithAdam", "training.optimizers.automagic": "Automagic"}
# end of the class name in lower case -> why it cannot step single weights
WHY_NOT_SINGLE: Mapping[str, str] = {
    "prodigy": "it finds one learning rate from the gradients of all weights together",
    "schedulefree": "it counts its steps for all weights together",
}
_LOW_16 = 1 << 16  # bf16 keeps the upper 16 bits of a float32


@dataclass(frozen=True)
class ParameterSteps:
    """Step parameters of an optimizer one by one; results are bitwise equal to a step of all at once."""

    optimizer: Optimizer
    names: Mapping[Tensor, str]  # of every parameter
    progress: Progress  # seed and step, for rounding
    # parameter with this process's rows -> the split weight
    sharded_weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    # states wait in host memory, except those of the parameter that is stepped
    offloads_states: bool = False

    @cached_property
    def _group_indices(self) -> dict[Parameter, int]:
        groups = enumerate(self.optimizer.param_groups)
        return {parameter: index for index, group in groups for parameter in group["params"]}

    @torch.no_grad()
    def step(self, parameter: Parameter) -> None:
        """Step one parameter with its gradient.

        1. If the optimizer needs whole weights, a sharded weight is gathered, stepped and sharded again.
        2. A bf16 weight is stepped in float32 and rounded stochastically.
        3. Any other weight is stepped directly.
        """
        value = parameter.detach()
        gradient = parameter.grad
        assert gradient is not None
        is_bfloat16 = parameter.dtype == torch.bfloat16
        sharded_weight = self.sharded_weights.get(parameter)  # None: it is not sharded
        needs_whole_weight = sharded_weight is not None and not is_elementwise(type(self.optimizer))
        if sharded_weight is not None and needs_whole_weight:
            value = gather_rows(value, sharded_weight)
            gradient = gather_rows(gradient, sharded_weight)
            value = self._step_in_float32(parameter, value, gradient)
            if is_bfloat16:
                value = self._round(parameter, value, None)
            parameter.copy_(slice_local_rows(sharded_weight, value))
        elif is_bfloat16:
            value = self._step_in_float32(parameter, value, gradient)
            parameter.copy_(self._round(parameter, value, sharded_weight))
        else:
            self._step(parameter, parameter)

    def _step_in_float32(self, parameter: Parameter, value: Tensor, gradient: Tensor) -> Tensor:
        """Run the optimizer on float32 copies of a parameter and its states; return the new values."""
        state = self.optimizer.state
        float32_parameter = Parameter(value.float())
        float32_parameter.grad = gradient.float()
        if parameter in state:
            state[float32_parameter] = state.pop(parameter)
        self._step(parameter, float32_parameter)
        if float32_parameter in state:
            state[parameter] = state.pop(float32_parameter)
        return float32_parameter.detach()

    def _round(self, parameter: Parameter, value: Tensor, weight: Tensor | None) -> Tensor:
        """Round a parameter's new values to bf16 stochastically."""
        seed = derive_seed(self.progress.seed, "rounding", self.progress.step, self.names[parameter])
        # on the parameter's device: bits for billions of weights take seconds on a CPU
        generator = torch.Generator(parameter.device).manual_seed(seed)
        return stochastic_bfloat16(value, generator, weight)

    def _step(self, parameter: Parameter, stepped_parameter: Parameter) -> None:
        """Run the optimizer's step on this parameter alone, with the settings of its parameter group."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group = groups[self._group_indices[parameter]]
        members = group["params"]
        optimizer.param_groups, group["params"] = [group], [stepped_parameter]
        host_tensors = _move_state_to_device(optimizer, stepped_parameter) if self.offloads_states else {}
        try:
            optimizer.step()
        finally:
            optimizer.param_groups, group["params"] = groups, members
        if self.offloads_states:
            # Move the moments of a parameter back to host memory
            state = optimizer.state.get(stepped_parameter, {})
            for name, value in state.items():
                if not _is_moment(value):
                    continue
                host_tensor = host_tensors.get(name)
                if (
                    host_tensor is None
                    or host_tensor.shape != value.shape
                    or host_tensor.dtype != value.dtype
                ):
                    state[name] = value.cpu()
                else:
                    state[name] = host_tensor.copy_(value)


def _move_state_to_device(optimizer: Optimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Move a parameter's states to its device; return the original host tensors by name."""
    state = optimizer.state.get(parameter, {})
    host_tensors = {name: value for name, value in state.items() if _is_moment(value)}
    host_tensors = {name: value for name, value in host_tensors.items() if value.device != parameter.device}
    for name, value in host_tensors.items():
        state[name] = value.to(parameter.device)
    return host_tensors


def _is_moment(value: object) -> TypeGuard[Tensor]:
    """Return whether an entry of an optimizer state is a moment tensor, not a step counter."""
    return isinstance(value, Tensor) and value.ndim > 0


def stochastic_bfloat16(values: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
    """Round float32 values stochastically to a neighboring bf16 value, so that the expected value is exact.

    A random number is added to the lower 16 bits, which bf16 drops; then these are cut off. NaN stays NaN.

    Args:
        values: The values, float32.
        generator: Random generator on the device of the values.
        weight: Sharded weight whose local rows the values are; they are rounded like rows of the full
            weight. None for a weight that is not sharded.
    """
    full_shape = values.shape if weight is None else weight.shape
    noise = torch.randint(_LOW_16, full_shape, dtype=torch.int32, device=values.device, generator=generator)
    if weight is not None:
        noise = slice_local_rows(weight, noise)
    # a GPU's NaN has all bits set: adding noise would overflow to zero
    noise.masked_fill_(values.isnan(), 0)
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-_LOW_16)
    return bits.view(torch.float32).to(torch.bfloat16)


def can_step_one_parameter(kind: Callable[..., Optimizer]) -> bool:
    """Return whether the optimizer class is known to update each parameter independently of the others."""
    is_own = any(
        kind.__name__ == name and kind.__module__.endswith(module) for module, name in OWN_OPTIMIZERS.items()
    )
    return is_own or kind.__name__ in PER_PARAMETER.get(kind.__module__.partition(".")[0], frozenset())


def is_elementwise(kind: Callable[..., Optimizer]) -> bool:
    """Return whether this optimizer class is known to update each weight element independently."""
    return kind.__name__ in PER_ELEMENT.get(kind.__module__.partition(".")[0], frozenset())


@dataclass(frozen=True)
class StepAfterBackward:
    """Clip gradients by their total norm and step all weights, once a step's gradients are accumulated."""

    optimizer: Optimizer
    parameters: Sequence[Parameter]
    max_norm: float  # 0 turns clipping off
    scaler: torch.amp.GradScaler
    networks: Sequence[TrainableNetwork] = ()  # are notified once gradients are clipped
    parameter_steps: ParameterSteps | None = None  # steps the weights one by one; None: the optimizer itself

    @property
    def can_scale(self) -> bool:
        """Whether fp16 gradients are scaled, and there are any in this step."""
        # a gradient scaler cannot step without gradients (an audio-only network, for clips without audio)
        return self.scaler.is_enabled() and any(parameter.grad is not None for parameter in self.parameters)

    def step(self, norm: Tensor) -> None:
        """Clip the gradients, and step the optimizer, or each parameter with `parameter_steps`.

        Args:
            norm: The norm of all gradients, which are not scaled any more.
        """
        if self.scaler.is_enabled() and not self.can_scale:
            return
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        for network in self.networks:
            network.before_optimizer_step()
        if self.parameter_steps is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:  # None: the training of this part has ended
                    self.parameter_steps.step(parameter)
        else:  # as the optimizer itself does, if the scaler is off
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def skip(self) -> None:
        """Leave the weights as they are, and keep the scale of fp16 gradients for the next step."""
        if self.can_scale:
            self.scaler.update(self.scaler.get_scale())


class FusedBackward:
    """Step each parameter during the backward pass, as soon as its gradient is complete.

    Creating the object installs the hooks; call `finish` after each backward pass.
    """

    def __init__(self, steps: ParameterSteps, parameters: Sequence[Parameter], max_norm: float) -> None:
        """Prepare to step each parameter as soon as its gradient is complete.

        Args:
            steps: Runs the optimizer's step on one parameter at a time.
            parameters: The trained parameters.
            max_norm: Maximum norm of each parameter's gradient, clipped separately; 0 turns clipping off.
        """
        self._steps, self._parameters, self._max_norm = steps, parameters, max_norm
        self._norms: dict[Parameter, Tensor] = {}  # norms of the gradients of this pass, before clipping
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    @torch.no_grad()
    def finish(self, updated_parameters: Sequence[Parameter]) -> Tensor:
        """Step the remaining parameters of a step, which have no gradient, with a gradient of zero.

        Args:
            updated_parameters: Parameters that this step changes. Without a gradient, all others keep their
                values: parts whose training has ended, and audio parameters in a step without audio.

        Returns:
            The norm of all gradients before clipping.
        """
        for parameter in updated_parameters:
            if parameter not in self._norms:
                parameter.grad = torch.zeros_like(parameter)
                self._complete(parameter)
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        self._norms = {}
        if not norms:
            return self._parameters[0].new_zeros(())
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def _complete(self, parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        if parameter.grad is None:  # this pass skipped its layer; `finish` steps it
            return
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameter, self._max_norm, norm)
        self._steps.step(parameter)
        parameter.grad = None
        self._norms[parameter] = norm


def check_fused_backward(optimizer_type: str, processes: int) -> None:
    """Raise OptionError if --fused_backward_pass is impossible with this optimizer or several processes."""
    if processes > 1:
        raise OptionError(
            f"--fused_backward_pass with {processes} processes: their gradients would have to be summed "
            "before any weight is stepped. Use one process, or omit it"
        )
    if not can_step_one_parameter(find_optimizer(optimizer_type)):
        _reject_optimizer("--fused_backward_pass", optimizer_type)


def check_offload(optimizer_type: str) -> None:
    """Raise OptionError if this optimizer's states cannot be offloaded to host memory."""
    option = "--offload_optimizer_device"
    kind = find_optimizer(optimizer_type)
    if kind.__name__.startswith("Paged"):
        raise OptionError(
            f"{option} with --optimizer_type {optimizer_type}: its states are in host memory already, and "
            f"come to the GPU page by page. Omit {option}"
        )
    if not can_step_one_parameter(kind):
        _reject_optimizer(option, optimizer_type)


def check_sharded_optimizer(option: str, optimizer_type: str) -> None:
    """Reject optimizers that cannot train a transformer whose weights FSDP shards over processes.

    Args:
        option: The option that shards the transformer, for the message.
        optimizer_type: Value of --optimizer_type.

    Raises:
        OptionError: If the optimizer needs full matrices and cannot step single parameters, or if this torch
            can only average gradients.
    """
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise OptionError(
            f"{option} with a whole transformer: torch {torch.__version__} only averages its gradients. "
            "Update torch"
        )
    kind = find_optimizer(optimizer_type)
    if not (is_elementwise(kind) or can_step_one_parameter(kind)):
        _reject_optimizer(option, optimizer_type)


def _reject_optimizer(option: str, optimizer_type: str) -> None:
    """Raise OptionError: the optimizer cannot update weights one at a time, which `option` requires."""
    name = find_optimizer(optimizer_type).__name__.lower()
    reasons = (reason for ending, reason in WHY_NOT_SINGLE.items() if name.endswith(ending))
    reason = next(reasons, "it is not known to step each weight by itself")
    raise OptionError(
        f"{option} with --optimizer_type {optimizer_type}: {reason}. Use Adafactor, AdamW, AdamW8bit or "
        f"Lion, or omit {option}"
    )
