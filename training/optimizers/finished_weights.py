"""Use the network between two steps without changing the run."""

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
    """Put networks into evaluation mode with their final weights; then restore everything to the bit."""
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
    """Load the averaged weights of a schedule-free optimizer; others are unchanged.

    While training, this optimizer keeps other weights in their place. Its own way back rounds, so the
    training weights are kept aside: saving changes nothing in the run.
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
