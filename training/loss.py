"""Flow-matching loss: add noise, predict the velocity, compare it with the true one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from contract.data import LOSS_MASK, SOUND, Batch, Conditions, Joint
from contract.family import NoiseSpec, Trains
from contract.steps import NO_TWEAKS, Tweaks
from modules.devices import send
from modules.flow.schedule import TRAIN_TIMESTEPS, add_noise
from networks.rank_masks import set_levels
from training.noise_options import ADDITIVE, L2, RAW, WITH_THRESHOLD, LossOptions

Autocast = Callable[[], AbstractContextManager[object]]  # mixed precision around the network only
DitOf = Callable[[int], nn.Module]  # index of an expert -> its network, ready to be called

# in a batch of pictures: how much each place counts, 0..1, B H W in any size; for clips see LOSS_MASK
MASK = "alpha_mask"


@dataclass(frozen=True)
class NoisySound:
    """Hold the random numbers of a batch's sound. Where a sample has none, its weight is 0."""

    noise: Tensor  # B C T M float32
    sigmas: Tensor  # B
    timesteps: Tensor  # B
    weights: Tensor  # B, factors on the samples' losses of the sound
    levels: tuple[float, ...] = ()  # the sigmas on the host, as in `NoisyBatch`

    def moved(self, move: Callable[[Tensor], Tensor]) -> "NoisySound":
        """Return a copy with `move` applied to every tensor."""
        return replace(
            self,
            noise=move(self.noise),
            sigmas=move(self.sigmas),
            timesteps=move(self.timesteps),
            weights=move(self.weights),
        )


@dataclass(frozen=True)
class NoisyBatch:
    """Hold a batch with all its random numbers drawn. B: samples."""

    batch: Batch
    noise: Tensor  # B C F H W float32
    sigmas: Tensor  # B, share of noise, 0..1
    timesteps: Tensor  # B, what the network is fed
    weights: Tensor  # B, factors on the samples' losses
    given_frames: int = 0  # latent frames in front that stay clean and are not learned, fewer than all
    expert: int = 0  # index of the expert that all samples go to
    perturbation: Tensor | None = None  # further noise of the input, which is not to be predicted; like noise
    sound: NoisySound | None = None  # None: no sample has sound, and the network is not given any
    number: int = 0  # of the micro-batch in the whole run, over all processes
    levels: tuple[float, ...] = ()  # the sigmas on the host, where targets depend on them
    notes: Mapping[str, float] = field(default_factory=dict)  # of features, for their passes

    @property
    def joint(self) -> Joint:
        """Return the shapes of picture and sound, whose latents the network gets as one tensor."""
        assert self.sound is not None
        _, *image = self.noise.shape
        _, *sound = self.sound.noise.shape
        return Joint(tuple(image), tuple(sound))  # type: ignore[arg-type]  # four and three numbers

    def moved(self, move: Callable[[Tensor], Tensor]) -> "NoisyBatch":
        """Return a copy with `move` applied to every tensor."""

        def moved_conditions(conditions: Conditions) -> Conditions:
            return {
                name: [move(item) for item in value] if isinstance(value, list) else move(value)
                for name, value in conditions.items()
            }

        tensors = moved_conditions(self.batch.tensors)
        undropped = moved_conditions(self.batch.undropped)
        empty_text = moved_conditions(self.batch.empty_text)
        rejected = None if self.batch.worse is None else move(self.batch.worse)
        batch = replace(
            self.batch, tensors=tensors, undropped=undropped, empty_text=empty_text, worse=rejected
        )
        return replace(
            self,
            batch=batch,
            noise=move(self.noise),
            sigmas=move(self.sigmas),
            timesteps=move(self.timesteps),
            weights=move(self.weights),
            perturbation=None if self.perturbation is None else move(self.perturbation),
            sound=None if self.sound is None else self.sound.moved(move),
        )

    def to(self, device: torch.device) -> "NoisyBatch":
        """Copy to the device, without waiting if pinned. Whole numbers stay on the host."""
        # its streams keep the source alive until it is read; other devices do not promise that
        is_ordered = device.type == "cuda"
        return self.moved(lambda tensor: send(tensor, device, is_ordered))


@dataclass(frozen=True)
class LossRule:
    """Hold how a prediction is judged."""

    options: LossOptions = L2
    prediction: str = RAW  # how the output is compared with the velocity
    # inside it the DiT is the base model, without what learns; None: no batch asks for that
    as_base: Autocast | None = None
    always_as_base: bool = False  # the base model is run for every batch: processes have to run equal passes
    kept_attributes: frozenset[str] = frozenset()  # of tables whose samples stay as the base model predicts
    # change what predictions are compared with, the clip first: from `targets.passes.TrainingPasses`, a batch
    # and the comparisons so far
    targets: Sequence[Callable[[Any, NoisyBatch, list[Any]], list[Any]]] = ()
    # likewise, further passes with gradients: errors of each stream
    passes: Sequence[Callable[[Any, NoisyBatch], Iterator[tuple[Tensor, ...]]]] = ()
    has_own_pass: bool = False  # `passes` are in place of the usual one
    in_lockstep: bool = False  # processes share a model, so that all run equal passes
    # what passes that learn run in, given the DiT, their batch and `seed`
    learning_pass: Sequence[Callable[[nn.Module, NoisyBatch, int], AbstractContextManager[None]]] = ()
    seed: int = 0  # of the run
    seed_networks: Callable[[int], None] | None = None  # begins random numbers of networks: of a micro-batch


PLAIN_LOSS = LossRule()


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers of samples, B, in a shape that goes with a tensor whose first dimension is B."""
    return numbers.view(-1, *([1] * (like.ndim - 1)))


def sample_errors_outside(
    spec: NoiseSpec, differences: Tensor, noisy_batch: NoisyBatch, rule: LossRule
) -> tuple[Tensor]:
    """Return the mean error of each sample's picture, B, as far as masks leave places out.

    Errors are multiplied by 1 - mask before the mean over all elements. differences, given frames: as of
    `sample_errors`; the batch has masks.
    """
    if noisy_batch.sound is not None:
        differences, _ = noisy_batch.joint.split(differences)
    errors = element_errors(
        rule.options, spec, differences, sigmas=noisy_batch.sigmas, timesteps=noisy_batch.timesteps
    )
    weights = place_weights(noisy_batch.batch, errors)
    assert weights is not None
    errors = errors * (1 - weights)
    return (_mean_of_learned(errors, noisy_batch),)


def _mean_of_learned(errors: Tensor, noisy_batch: NoisyBatch) -> Tensor:
    """Return the mean of each sample, B, over the frames that are not given. errors: B C F H W."""
    return errors[:, :, noisy_batch.given_frames :].flatten(1).mean(1)


def split_streams(prediction: Tensor, noisy_batch: NoisyBatch) -> tuple[Tensor, ...]:
    """Return the picture of a prediction, B C F H W, and its sound if the batch has any.

    Given frames are left out, and the picture is multiplied by the root of its masks: so the squared norm of
    a difference counts places as `sample_errors` does.
    """
    sounds = []
    if noisy_batch.sound is not None:
        prediction, sound = noisy_batch.joint.split(prediction)
        sounds.append(sound)
    weights = place_weights(noisy_batch.batch, prediction)
    if weights is not None:
        prediction = prediction * weights.sqrt()
    return (prediction[:, :, noisy_batch.given_frames :], *sounds)


def sample_errors(
    spec: NoiseSpec, differences: Tensor, noisy_batch: NoisyBatch, rule: LossRule
) -> tuple[Tensor, ...]:
    """Return the mean error of each sample: B, float32; if the batch has sound, a second one of its sound.

    differences: B C F H W, or B N of a picture and its sound. If the batch has a mask (`MASK`, `LOSS_MASK`),
    errors of the picture are multiplied by it before the mean over all elements: the mean is over the masked
    ones too, so the smaller a mask, the smaller the loss. Given frames are left out: the mean is over the
    others.
    """
    sound, options = noisy_batch.sound, rule.options
    if sound is not None:
        differences, sound_differences = noisy_batch.joint.split(differences)
    errors = element_errors(
        options, spec, differences, sigmas=noisy_batch.sigmas, timesteps=noisy_batch.timesteps
    )
    weights = place_weights(noisy_batch.batch, errors)
    if weights is not None:
        errors = errors * weights
    image_errors = _mean_of_learned(errors, noisy_batch)
    if sound is None:
        return (image_errors,)
    sound_errors = element_errors(
        options, spec, sound_differences, sigmas=sound.sigmas, timesteps=sound.timesteps
    )
    return image_errors, sound_errors.flatten(1).mean(1)


def place_weights(batch: Batch, errors: Tensor) -> Tensor | None:
    """Return the weight of each place, B 1 F H W or B 1 1 H W; None without masks. errors: B C F H W."""
    image_mask, clip_mask = batch.tensors.get(MASK), batch.tensors.get(LOSS_MASK)
    weights: Tensor | None = None
    if isinstance(image_mask, Tensor):  # averaged over the area of each latent
        resized = interpolate(image_mask.float().unsqueeze(1), size=errors.shape[-2:], mode="area")
        weights = resized.unsqueeze(2)
    if isinstance(clip_mask, Tensor):
        clip_weights = clip_mask.float().unsqueeze(1)
        weights = clip_weights if weights is None else weights * clip_weights
    return weights


def predict(
    family: Trains,
    dit: nn.Module,
    latents: Tensor,
    noisy_batch: NoisyBatch,
    autocast: Autocast,
    rule: LossRule,
) -> Tensor:
    """Return the network's prediction in the form of the target: B C F H W float32, with sound B N.

    latents: of the batch, in model space.
    """
    given_frames, noise, sound = noisy_batch.given_frames, noisy_batch.noise, noisy_batch.sound
    conditions = family.batch_conditions(latents, noisy_batch.batch)
    if noisy_batch.perturbation is not None:
        noise = noise + noisy_batch.perturbation
    noisy = add_noise(latents, noise, noisy_batch.sigmas, family.noise.data_shares(noisy_batch.sigmas))
    timesteps = noisy_batch.timesteps
    tweaks = NO_TWEAKS
    if given_frames:
        noisy = torch.cat([latents[:, :, :given_frames], noisy[:, :, given_frames:]], dim=2)
        tweaks = Tweaks(given_frames=given_frames)
    if sound is not None:
        shares = family.noise.data_shares(sound.sigmas)
        sound_latents = noisy_batch.batch.tensor(SOUND).float()
        noisy_sound = add_noise(sound_latents, sound.noise, sound.sigmas, shares)
        noisy = noisy_batch.joint.join(noisy, noisy_sound)
        timesteps = torch.stack([timesteps, sound.timesteps], dim=1)
        tweaks = replace(tweaks, joint=noisy_batch.joint)
    set_levels(dit, noisy_batch.sigmas)
    with autocast():
        velocity = family.predict(dit, noisy, timesteps, conditions, tweaks=tweaks)
    if rule.prediction == RAW:
        return velocity.float()
    return compared(
        velocity.float(),
        noisy,
        noisy_batch.sigmas,
        prediction=rule.prediction,
        sign=family.noise.output_sign,
    )


def compared(velocity: Tensor, noisy: Tensor, sigmas: Tensor, prediction: str, sign: float) -> Tensor:
    """Return the value to compare with the velocity for --model_prediction_type, B C F H W.

    additive: the network's output plus the noisy latents; sigma_scaled: the noisy latents minus sigma times
    the output. Neither estimates the velocity; known trainers compare so. sign: of the velocity in the
    output (`NoiseSpec.output_sign`); where it is -1, output and target are both negated, which
    changes no loss.
    """
    if prediction == ADDITIVE:
        return velocity + sign * noisy.float()
    return sign * noisy.float() - per_sample(sigmas.float(), noisy) * velocity


def element_errors(
    options: LossOptions, spec: NoiseSpec, differences: Tensor, sigmas: Tensor, timesteps: Tensor
) -> Tensor:
    """Return the error of each element. differences: B C F H W. sigmas, timesteps: B, as in `NoisyBatch`.

    For small differences d huber is d^2 and smooth_l1 is d^2 / c; for large ones they are 2 c |d| and 2 |d|.
    Raises ValueError for a loss that it does not know.
    """
    if options.loss_type == "l2":
        return differences.square()
    if options.loss_type == "l1":
        return differences.abs()
    if options.loss_type in WITH_THRESHOLD:
        thresholds = find_thresholds(options, spec, sigmas, timesteps)
        c = per_sample(thresholds, differences)
        factor = 2 * c if options.loss_type == "huber" else 2
        return factor * ((differences.square() + c.square()).sqrt() - c)
    raise ValueError(f"unknown loss {options.loss_type!r}: l2, l1, huber and smooth_l1 are known")


def find_thresholds(options: LossOptions, spec: NoiseSpec, sigmas: Tensor, timesteps: Tensor) -> Tensor:
    """Return the threshold c of each sample for --huber_schedule: B, float32.

    timesteps: B, the network's input, 0..1000. snr: (1 - huber_c) / (1 + r)^2 + huber_c, where r is the ratio
    of noise to data, sigma over the share of the latents. Known trainers define it only for models that
    predict noise; for a flow it falls from 1 to huber_c too.
    """
    if options.huber_schedule == "constant":
        return torch.full_like(sigmas.float(), options.huber_c * options.huber_scale)
    if options.huber_schedule == "exponential":
        progress = timesteps.float().clamp(0, TRAIN_TIMESTEPS) / TRAIN_TIMESTEPS
        return (progress * math.log(options.huber_c)).exp() * options.huber_scale
    shares = spec.data_shares(sigmas)
    return (1 - options.huber_c) * (shares / (shares + sigmas.float())).square() + options.huber_c
