"""The exponential moving average (EMA) of the trained weights.

average <- decay * average + (1 - decay) * weights, in float32. The decay rises with the number of steps n, as
min(--ema_decay, (1 + n) / (10 + n)). So the average forgets the untrained weights it begins with, and covers
about the last ninth of the steps until --ema_decay is reached.
Source of the rising decay: tf.train.ExponentialMovingAverage, `num_updates`.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.errors import OptionError
from modules.private_torch import lerp_each
from runtime.offload.block_swap import write_back_all
from runtime.offload.sharding import as_sharded
from training.optimizers.optimizer import find_averaging_optimizer
from training.saving.states import AVERAGE, SavedState
from training.trainable import Trainable

logger = logging.getLogger(__name__)


class WeightAverage:
    """The moving average of a run's trained weights."""

    def __init__(
        self, decay: float, every: int, *, dits: Sequence[nn.Module], trainable: Trainable, on_host: bool
    ) -> None:
        """Start the average with a copy of the current weights.

        Args:
            decay: Decay of the average, from --ema_decay.
            every: Number of optimizer steps between two updates, from --ema_update_every.
            dits: Fully fine-tuned transformers, whose weights may be swapped out.
            trainable: The trained parameters and their names.
            on_host: Whether to keep the average in host memory, as for a full model.
        """
        self.decay, self.every = decay, every
        self.on_host = on_host
        self._dits = dits
        self._parameters = trainable.parameters
        self._sharded_weights = trainable.sharded_weights
        names = trainable.names
        self._names = [names[parameter] for parameter in self._parameters]
        self.steps = 0
        self.values = list[Tensor]()
        self.begin()

    def begin(self) -> None:
        """Restart the average from the current weights, as float32 copies."""
        self.steps = 0  # number of averaged steps
        self.values.clear()  # first, so that memory never contains two averages
        write_back_all(self._dits)
        for weight in self._parameters:
            device = "cpu" if self.on_host else weight.device
            self.values.append(weight.detach().to(device, torch.float32, copy=True))

    @torch.no_grad()
    def after_step(self) -> None:
        """Count a step, and update the average every `every` steps."""
        self.steps += 1
        if self.steps % self.every:
            return
        write_back_all(self._dits)
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        share = 1 - decay**self.every
        if not self.on_host:
            lerp_each(self.values, self._parameters, share)
            return
        for value, weight in zip(self.values, self._parameters, strict=True):  # one copy at a time
            value.lerp_(weight.detach().to(value.device, torch.float32), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Set the parameters to the average during the block, as float32 on the device of the average."""
        write_back_all(self._dits)
        trained = [weight.data for weight in self._parameters]
        try:
            for weight, value in zip(self._parameters, self.values, strict=True):
                weight.data = value
            yield
        finally:
            for weight, data in zip(self._parameters, trained, strict=True):
                weight.data = data

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by weight name, without copying it, for a saved state."""
        sharded_weights = (self._sharded_weights.get(weight) for weight in self._parameters)
        return {
            name: value if weight is None else as_sharded(weight, value)
            for name, value, weight in zip(self._names, self.values, sharded_weights, strict=True)
        }

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of files with averaged weights: the decay and the number of averaged steps."""
        return {"ss_ema_decay": str(self.decay), "ss_ema_steps": str(self.steps)}

    def restore(self, saved: SavedState) -> None:
        """Load the average from a saved state; if the state has none, start from the current weights."""
        if AVERAGE not in saved.parts:
            logger.info("The state contains no average (EMA): it begins at step %d.", saved.progress.step)
            self.begin()
            return
        tensors = saved.parts[AVERAGE]
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.steps = int((saved.average or {})["steps"])


def make_average(
    decay: float,
    every: int,
    *,
    dits: Sequence[nn.Module],
    trainable: Trainable,
    optimizer: Optimizer,
    is_needed: bool,
) -> WeightAverage | None:
    """Start the average of --ema_decay, in host memory if a full model is trained.

    Args:
        decay: Decay of the average, from --ema_decay.
        every: Number of steps between two updates.
        dits: The trained transformers.
        trainable: The trained parameters.
        optimizer: The optimizer.
        is_needed: Whether this process writes files or samples with the average.

    Returns:
        The average; None for a full model in a process that does not need it.

    Raises:
        OptionError: If the optimizer computes an average itself.
    """
    if find_averaging_optimizer(optimizer) is not None:
        raise OptionError(
            f"--ema_decay {decay}: {type(optimizer).__name__} saves an average already. Omit it"
        )
    is_full = any(module in dits for module in trainable.modules.values())
    if is_full and not is_needed:
        return None
    # swapped weights must be in place before they are averaged. A LoRA is never swapped, so it needs no
    # `dits`: writing back the base model's blocks would only empty the swap's slots after each step
    return WeightAverage(decay, every, dits=dits if is_full else (), trainable=trainable, on_host=is_full)
