"""Preferences between two pictures or clips: --preference.

The network learns to predict the better one of a pair more exactly than the model without it does, and the
worse one less exactly. Source: Diffusion-DPO, Wallace et al. 2023, arXiv 2311.12908, for a flow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contract.data import HAS_SOUND
from training.loss import NoisyBatch, NoisySound
from training.target_rules import Preference

# what a tally counts, by the names in logs
PAIR_NUMBERS = "preference/better", "preference/worse", "preference/right"


@dataclass
class PairTally:
    """The numbers of the pairs of micro-batches, until a row takes them."""

    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, numbers: Tensor) -> None:
        """Add the means over the pairs of a micro-batch, in the order of PAIR_NUMBERS."""
        self._waiting.append(numbers)

    def take(self) -> Tensor | None:
        """Return the numbers added last and forget all; None if there are none."""
        numbers = self._waiting[-1] if self._waiting else None
        self._waiting.clear()
        return numbers


def join_pairs(noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return a batch of twice the size: the better ones, then the worse ones with all else equal."""
    batch = noisy_batch.batch
    assert batch.worse is not None  # the feed reads it for this target
    tensors = {name: _repeat(value) for name, value in batch.tensors.items()}
    tensors["latents"] = torch.cat([batch.tensor("latents"), batch.worse])
    doubled = replace(
        batch,
        tensors=tensors,
        captions=batch.captions * 2,
        keys=batch.keys * 2,
        loss_weights=batch.loss_weights * 2,
        undropped={},
        empty_text={},
        has_empty_text=batch.has_empty_text * 2,
        worse=None,
    )
    perturbation = noisy_batch.perturbation
    return replace(
        noisy_batch,
        batch=doubled,
        noise=_twice(noisy_batch.noise),
        sigmas=_twice(noisy_batch.sigmas),
        timesteps=_twice(noisy_batch.timesteps),
        weights=_twice(noisy_batch.weights),
        perturbation=None if perturbation is None else _twice(perturbation),
        sound=None if noisy_batch.sound is None else _repeat_sound(noisy_batch.sound),
        levels=noisy_batch.levels * 2,
    )


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _repeat(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [*value, *value] if isinstance(value, list) else _twice(value)


def _repeat_sound(sound: NoisySound) -> NoisySound:
    return NoisySound(
        noise=_twice(sound.noise),
        sigmas=_twice(sound.sigmas),
        timesteps=_twice(sound.timesteps),
        weights=_twice(sound.weights),
        levels=sound.levels * 2,
    )


def add_streams(streams: Sequence[Tensor], pairs: NoisyBatch) -> Tensor:
    """Return the error of each sample, B: of its picture, and of its sound if it has any."""
    picture, *sounds = streams
    if not sounds:
        return picture
    has_sound = pairs.batch.tensor(HAS_SOUND).to(picture)
    return picture + sounds[0] * has_sound


def compare_pairs(errors: Tensor, base_errors: Tensor, preference: Preference) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair, B, and the means in the order of PAIR_NUMBERS, without gradients.

    errors, base_errors: of the network and of the model without it, 2B each, the better ones first. With the
    margin m = (base_better - better) + (worse - base_worse), the loss is

        -log sigmoid(beta / 2 * m) + data_weight * better

    and a pair is right if its margin is above 0.
    """
    better, worse = errors.chunk(2)
    base_better, base_worse = base_errors.chunk(2)
    margin = (base_better - better) + (worse - base_worse)
    losses = -logsigmoid(preference.beta / 2 * margin)
    if preference.data_weight:
        losses = losses + preference.data_weight * better
    numbers = torch.stack([better.mean(), worse.mean(), (margin > 0).float().mean()])
    return losses, numbers.detach()
