"""Using the network between two steps and leaving no trace of it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from training.optimizers.optimizer import is_schedule_free, set_training


@contextlib.contextmanager
def evaluation(
    modules: Sequence[nn.Module], optimizer: Optimizer, parameters: Sequence[Parameter]
) -> Iterator[None]:
    """Networks in evaluation mode, with the weights that are to be used; afterwards everything is as it was,
    to the bit.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with finished_weights(optimizer, parameters):
            yield
    finally:
        for part, is_training in modes:
            part.training = is_training


@contextlib.contextmanager
@torch.no_grad()
def finished_weights(optimizer: Optimizer, parameters: Sequence[Parameter]) -> Iterator[None]:
    """The weights that a schedule-free optimizer stands for, where it is one: while training it keeps others
    in their place.

    Its own way back rounds; the training weights are kept aside instead, so that saving changes nothing in
    the run.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]
    set_training(optimizer, False)
    try:
        yield
    finally:
        set_training(optimizer, True)
        for parameter, weights in zip(parameters, kept, strict=True):
            parameter.copy_(weights)
