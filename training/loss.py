"""Flow-matching loss: add noise, predict the velocity, compare it with the true one."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from modules.contract.data import LOSS_MASK, Batch, Conditions
from modules.contract.family import Described, Predicts
from modules.contract.generation import NO_TWEAKS, Tweaks
from modules.contract.noise import NoiseSpec
from modules.devices import send
from modules.flow.schedule import TRAIN_TIMESTEPS, add_noise
from training.loss_options import L2, LossOptions

Autocast = Callable[[], AbstractContextManager[object]]  # mixed precision around the network only
DitOf = Callable[[int], nn.Module]  # index of an expert -> its network, ready to be called

# in a batch of pictures: how much each place counts, 0..1, B H W in any size; for clips see LOSS_MASK
MASK = "alpha_mask"


class Trains(Described, Predicts, Protocol):
    """What a training step asks of a family."""


@dataclass(frozen=True)
class NoisyBatch:
    """Hold a batch with all its random numbers drawn. B: samples."""

    batch: Batch
    noise: Tensor  # B C F H W float32
    sigmas: Tensor  # B, share of noise, 0..1
    timesteps: Tensor  # B, what the network is fed
    weights: Tensor  # B, factors on the samples' losses
    given_frames: int = 0  # latent frames in front that stay clean and are not learned, fewer than all
    expert: int = 0  # index of the one that they all go to

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
            self.given_frames,
            self.expert,
        )

    def to(self, device: torch.device) -> "NoisyBatch":
        """Copy to the device, without waiting if pinned. Whole numbers stay on the host."""
        # its streams keep the source alive until it is read; other devices do not promise that
        is_ordered = device.type == "cuda"
        return self.moved(lambda tensor: send(tensor, device, is_ordered))


def measure_errors(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, options: LossOptions = L2
) -> Tensor:
    """Return the mean error of the predicted velocity for each sample: B, float32, on the device of the
    batch.

    If the batch has a mask (`MASK`, `LOSS_MASK`), errors are multiplied by it before the mean over all
    elements: the mean is over the masked ones too, so the smaller a mask, the smaller the loss. Given frames
    are left out: the mean is over the others.
    """
    given = noisy_batch.given_frames
    latents = family.latent.to_model(noisy_batch.batch.tensor("latents"))
    noise, sigmas, spec = noisy_batch.noise, noisy_batch.sigmas, family.noise
    conditions = family.batch_conditions(latents, noisy_batch.batch)
    with autocast():
        noisy = add_noise(latents, noise, sigmas, spec.data_shares(sigmas))
        if given:
            noisy = torch.cat([latents[:, :, :given], noisy[:, :, given:]], dim=2)
        velocity = family.predict(
            dit, noisy, noisy_batch.timesteps, conditions, Tweaks(given_frames=given) if given else NO_TWEAKS
        )
    differences = velocity.float() - spec.velocity(latents, noise)
    thresholds = (
        find_thresholds(options, spec, sigmas, noisy_batch.timesteps) if options.has_threshold else None
    )
    errors = element_errors(options, differences, thresholds)
    mask = noisy_batch.batch.tensors.get(MASK)
    if isinstance(mask, Tensor):
        errors = errors * resize_mask(mask, errors)
    mask = noisy_batch.batch.tensors.get(LOSS_MASK)
    if isinstance(mask, Tensor):
        errors = errors * mask.float().unsqueeze(1)  # B 1 F H W
    if given:
        errors = errors[:, :, given:]
    return errors.flatten(1).mean(1)


def training_loss(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, options: LossOptions = L2
) -> Tensor:
    """Return the weighted mean over the batch: one number.

    All samples of a batch have one size, so it is the mean over all elements too.
    """
    return (measure_errors(family, dit, noisy_batch, autocast, options) * noisy_batch.weights).mean()


def element_errors(options: LossOptions, differences: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Return the error of each element. differences: B C F H W. thresholds: B, of huber and smooth_l1.

    For small differences d huber is d^2 and smooth_l1 is d^2 / c; for large ones they are 2 c |d| and 2 |d|.
    """
    if options.loss_type == "l2":
        return differences.square()
    if options.loss_type == "l1":
        return differences.abs()
    assert thresholds is not None
    c = thresholds.view(-1, *([1] * (differences.ndim - 1)))
    factor = 2 * c if options.loss_type == "huber" else 2
    return factor * ((differences.square() + c.square()).sqrt() - c)


def find_thresholds(options: LossOptions, spec: NoiseSpec, sigmas: Tensor, timesteps: Tensor) -> Tensor:
    """Return the threshold c of each sample for --huber_schedule: B, float32.

    timesteps: B, what the network is fed, 0..1000. snr: (1 - huber_c) / (1 + r)^2 + huber_c, where r is the
    ratio of noise to data, sigma over the share of the latents. Known trainers define it only for models that
    predict noise; for a flow it falls from 1 to huber_c too.
    """
    if options.huber_schedule == "constant":
        return torch.full_like(sigmas.float(), options.huber_c * options.huber_scale)
    if options.huber_schedule == "exponential":
        progress = timesteps.float().clamp(0, TRAIN_TIMESTEPS) / TRAIN_TIMESTEPS
        return (progress * math.log(options.huber_c)).exp() * options.huber_scale
    shares = spec.data_shares(sigmas)
    return (1 - options.huber_c) * (shares / (shares + sigmas.float())).square() + options.huber_c


def resize_mask(mask: Tensor, errors: Tensor) -> Tensor:
    """Return a mask B H W averaged over the area of each latent: B 1 1 H W, a factor of errors B C F H W."""
    resized = interpolate(mask.float().unsqueeze(1), size=errors.shape[-2:], mode="area")
    return resized.unsqueeze(2)
