"""Measure the states of an optimizer that cannot be rehearsed, on small copies of the weights on the CPU."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.private_torch import disable_modes

logger = logging.getLogger(__name__)

REHEARSABLE = {
    "torch",
    "transformers",
    "prodigyopt",
    "lion_pytorch",
    "schedulefree",
}  # packages written in torch's operations alone
EDGE = 512  # most rows and columns of a copy; 8-bit states begin at 4096 elements
# Bytes of states for each element of a weight, for classes that do not run on a CPU. 8-bit states: one
# byte a moment, and a float32 scale for every 256 elements of it. Source: bitsandbytes' documentation of
# block-wise quantisation. paged states lie in host memory
BYTES = {"AdamW8bit": 2 * (1 + 4 / 256), "PagedAdamW8bit": 0.0, "Lion8bit": 1 + 4 / 256}
GUESS = 8.0  # two float32 moments


def is_rehearsable(optimizer: Optimizer) -> bool:
    """Return whether its step can be rehearsed on tensors without content.

    Custom kernels would write to memory that does not exist.
    """
    return type(optimizer).__module__.partition(".")[0] in REHEARSABLE


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the states of all its weights on the device."""
    kind = type(optimizer)
    if kind.__name__ in BYTES:
        per_element = BYTES[kind.__name__]
    else:
        try:
            per_element = measure_states(optimizer)
        except Exception as error:  # a plan is made, whatever a foreign class raises
            logger.warning(
                "The states of %s cannot be measured (%s); assuming %g bytes per element.",
                kind.__name__,
                error,
                GUESS,
            )
            per_element = GUESS
    return round(
        per_element
        * sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    )


def measure_states(optimizer: Optimizer) -> float:
    """Return the bytes of states per element, from one step of a second optimizer on small copies."""
    with disable_modes():  # a real step, also during a rehearsal
        copies = [_cut_down(parameter) for parameter in optimizer.param_groups[0]["params"][:2]]
        settings: dict[str, Any] = {
            key: value for key, value in optimizer.defaults.items() if value is not None
        }
        second = type(optimizer)(copies, **settings)
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        second.step()
        held = [
            value for state in second.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return sum(tensor.nbytes for tensor in held) / sum(copy.numel() for copy in copies)


def _cut_down(parameter: Tensor) -> Parameter:
    return Parameter(torch.ones([min(size, EDGE) for size in parameter.shape], dtype=parameter.dtype))
