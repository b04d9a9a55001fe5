"""The loss: noise is mixed in, the network says which way it lies, the squared error counts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modules.contract.data import Batch, Conditions
from modules.contract.family import Family
from modules.devices import sent
from modules.flow.schedule import add_noise

Autocast = Callable[[], AbstractContextManager[object]]  # mixed precision around the network only


@dataclass(frozen=True)
class NoisyBatch:
    """Hold a batch with all its random numbers drawn. B: samples."""

    batch: Batch
    noise: Tensor  # B C F H W float32
    sigmas: Tensor  # B, share of noise, 0..1
    timesteps: Tensor  # B, what the network is fed
    weights: Tensor  # B, factors on the samples' losses

    def moved(self, move: Callable[[Tensor], Tensor]) -> "NoisyBatch":
        """Return a copy with `move` applied to every tensor."""

        def moved_value(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
            return [move(item) for item in value] if isinstance(value, list) else move(value)

        tensors: Conditions = {name: moved_value(value) for name, value in self.batch.tensors.items()}
        return NoisyBatch(
            replace(self.batch, tensors=tensors),
            move(self.noise),
            move(self.sigmas),
            move(self.timesteps),
            move(self.weights),
        )

    def to(self, device: torch.device) -> "NoisyBatch":
        """Copy to the device, without waiting if pinned. Whole numbers stay on the host."""
        # its streams keep the source alive until it is read; other devices do not promise that
        is_ordered = device.type == "cuda"
        return self.moved(lambda tensor: sent(tensor, device, is_ordered))


def squared_errors(family: Family, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast) -> Tensor:
    """The mean squared error of the predicted velocity for each sample: B, float32. All lies where `to` sends
    it.
    """
    latents = family.latent.to_model(noisy_batch.batch.tensor("latents"))
    noise = noisy_batch.noise
    conditions = family.batch_conditions(latents, noisy_batch.batch)
    with autocast():
        velocity = family.predict(
            dit, add_noise(latents, noise, noisy_batch.sigmas), noisy_batch.timesteps, conditions
        )
    return (velocity.float() - (noise - latents)).square().flatten(1).mean(1)


def training_loss(family: Family, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast) -> Tensor:
    """The weighted mean over the batch: one number. Samples of a batch have one size, so this is the mean
    over all elements too.
    """
    return (squared_errors(family, dit, noisy_batch, autocast) * noisy_batch.weights).mean()
