"""Flow-matching loss: add noise, predict the velocity, compare it with the true one."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from modules.devices import send
from modules.flow.schedule import TRAIN_TIMESTEPS, add_noise
from networks.rank_masks import set_levels
from protocols.data import AUDIO_LATENTS, LOSS_MASK, AudioVideoShapes, Batch, Conditions
from protocols.family import NoiseSpec, Trains
from protocols.steps import NO_OVERRIDES, CleanTokens, Overrides, clean_fraction
from training.noise_options import ADDITIVE, L2, RAW, WITH_THRESHOLD, LossOptions

Autocast = Callable[[], AbstractContextManager[object]]  # mixed precision around the network only
GetDit = Callable[[int], nn.Module]  # index of an expert -> its network, ready to be called

# name of the loss weights of image positions, 0..1, B H W in any size; for clips see LOSS_MASK
MASK = "alpha_mask"
MASKS = frozenset((MASK, LOSS_MASK))


@dataclass(frozen=True)
class NoisyAudio:
    """Noise and timesteps of a batch's audio; a sample without audio has weight 0."""

    noise: Tensor  # B C T M float32
    sigmas: Tensor  # B
    timesteps: Tensor  # B
    weights: Tensor  # B, factors on the samples' audio losses
    levels: tuple[float, ...] = ()  # the sigmas on the host, as in `NoisyBatch`

    def moved(self, move: Callable[[Tensor], Tensor]) -> "NoisyAudio":
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
    """A micro-batch of B samples with its noise, timesteps and other random numbers."""

    batch: Batch
    noise: Tensor  # B C F H W float32
    sigmas: Tensor  # B, share of noise, 0..1
    timesteps: Tensor  # B, input of the network
    weights: Tensor  # B, factors on the samples' losses
    num_clean_frames: int = 0  # first latent frames that stay clean and have no loss; fewer than all frames
    clean_tokens: CleanTokens | None = None  # other latents that stay clean and have no loss, by sample
    expert: int = 0  # index of the expert that all samples go to
    perturbation: Tensor | None = None  # additional noise of the input, not predicted; shape of `noise`
    audio: NoisyAudio | None = None  # None: no sample has audio, and the network gets none
    number: int = 0  # index of the micro-batch in the whole run, over all processes
    levels: tuple[float, ...] = ()  # the sigmas on the host, for targets that depend on them
    notes: Mapping[str, float] = field(default_factory=dict)  # values that features pass to their own passes

    @property
    def joint(self) -> AudioVideoShapes:
        """Return the shapes of the video and audio latents, which the network gets as one tensor."""
        assert self.audio is not None
        _, *image = self.noise.shape
        _, *audio = self.audio.noise.shape
        return AudioVideoShapes(tuple(image), tuple(audio))  # type: ignore[arg-type]  # four and three numbers

    def moved(self, move: Callable[[Tensor], Tensor]) -> "NoisyBatch":
        """Return a copy with `move` applied to every tensor."""
        batch = self.batch
        moved_batch = replace(
            batch,
            tensors=_move_conditions(batch.tensors, move),
            undropped=_move_conditions(batch.undropped, move),
            empty_text=_move_conditions(batch.empty_text, move),
            rejected=None if batch.rejected is None else move(batch.rejected),
        )
        return replace(
            self,
            batch=moved_batch,
            noise=move(self.noise),
            sigmas=move(self.sigmas),
            timesteps=move(self.timesteps),
            weights=move(self.weights),
            perturbation=None if self.perturbation is None else move(self.perturbation),
            audio=None if self.audio is None else self.audio.moved(move),
            clean_tokens=None if self.clean_tokens is None else self.clean_tokens.map_tensors(move),
        )

    def to(self, device: torch.device) -> "NoisyBatch":
        """Copy to the device, asynchronously if pinned. Integer tensors stay on the host."""
        # its streams keep the source alive until it is read; other devices do not promise that
        is_ordered = device.type == "cuda"
        return self.moved(lambda tensor: send(tensor, device, is_ordered))


def _move_conditions(conditions: Conditions, move: Callable[[Tensor], Tensor]) -> Conditions:
    return {
        name: [move(item) for item in value] if isinstance(value, list) else move(value)
        for name, value in conditions.items()
    }


@dataclass(frozen=True)
class LossRule:
    """How the training loss is computed: loss function, targets, and forward passes."""

    options: LossOptions = L2
    prediction: str = RAW  # how the output is compared with the velocity
    # returns a context in which the DiT is the base model, without the trained network; None if not needed
    as_base: Autocast | None = None
    always_runs_base_model: bool = (
        False  # run the base model for every batch, so that all processes run equal passes
    )
    # the phases TARGETS, LOSS and PREDICT with what features put around them, given the `TrainingPasses` of
    # `targets/passes.py` and a batch; None: without features
    list_comparisons: Callable[[Any, NoisyBatch], list[Any]] | None = None
    run_passes: Callable[[Any, NoisyBatch], Iterator[tuple[Tensor, ...]]] | None = None
    predict: Callable[[Any, NoisyBatch], Tensor] | None = None
    in_lockstep: bool = False  # processes share a model, so that all run equal passes
    seed: int = 0  # seed of the run
    seed_networks: Callable[[int], None] | None = None  # seeds dropout by the number of a micro-batch


PLAIN_LOSS = LossRule()


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per sample, B, to B 1 1 ... for broadcasting with `like`."""
    return numbers.view(-1, *([1] * (like.ndim - 1)))


def sample_errors_outside(
    spec: NoiseSpec, differences: Tensor, noisy_batch: NoisyBatch, rule: LossRule
) -> tuple[Tensor]:
    """Return the mean error of each sample's images outside of its mask, B.

    Errors are multiplied by 1 - mask before the mean over all elements. The batch must have masks.

    Args:
        spec: Noise conventions of the family.
        differences: Differences between prediction and target, B C F H W; with audio, both in one tensor B N.
        noisy_batch: The batch, with noise and timesteps.
        rule: How predictions are compared.

    Returns:
        A tuple with one entry: functions of this kind return one for images and one for audio.
    """
    if noisy_batch.audio is not None:
        differences, _ = noisy_batch.joint.split(differences)
    errors = element_errors(
        rule.options, spec, differences, sigmas=noisy_batch.sigmas, timesteps=noisy_batch.timesteps
    )
    weights = mask_weights(noisy_batch.batch, errors)
    assert weights is not None  # the batch has masks
    errors = errors * (1 - weights)
    return (_mean_over_noisy_frames(errors, noisy_batch),)


def _mean_over_noisy_frames(errors: Tensor, noisy_batch: NoisyBatch) -> Tensor:
    """Return the mean error of each sample, B, over its noisy latents, excluding clean condition frames."""
    # errors: Error of each element, B C F H W.
    errors = errors[:, :, noisy_batch.num_clean_frames :]
    clean_tokens = noisy_batch.clean_tokens
    if clean_tokens is None or clean_tokens.image is None:
        return errors.flatten(1).mean(1)
    return mean_over_noisy_latents(errors, clean_tokens.image[:, :, noisy_batch.num_clean_frames :])


def mean_over_noisy_latents(errors: Tensor, cleanness: Tensor) -> Tensor:
    """Return the mean error of each sample, B, over its fully noisy latents; 0 if it has none.

    Args:
        errors: Error of each element, B C F H W, or B C T M of audio.
        cleanness: How clean each position is, from 0 (noisy) to FULLY_CLEAN (clean), B 1 F H W or B 1 T 1.
    """
    is_noisy = (clean_fraction(cleanness, errors) == 0).expand_as(errors).flatten(1)
    sums = torch.where(is_noisy, errors.flatten(1), 0).sum(1)
    return sums / is_noisy.sum(1).clamp(min=1)


def sample_errors(
    spec: NoiseSpec, differences: Tensor, noisy_batch: NoisyBatch, rule: LossRule
) -> tuple[Tensor, ...]:
    """Return the mean error of each sample, B float32; if the batch has audio, a second tensor for its audio.

    If the batch has a mask (`MASK`, `LOSS_MASK`), errors of the image or video latents are multiplied by it
    before the mean over all elements. The mean includes masked elements, so a smaller mask gives a smaller
    loss. Conditioning frames are excluded from the mean.

    Args:
        spec: Noise conventions of the family.
        differences: Differences from the target, B C F H W, or B N for video with audio.
        noisy_batch: Batch with noise and timesteps.
        rule: How losses are reduced.
    """
    audio, options = noisy_batch.audio, rule.options
    if audio is not None:
        differences, audio_differences = noisy_batch.joint.split(differences)
    errors = element_errors(
        options, spec, differences, sigmas=noisy_batch.sigmas, timesteps=noisy_batch.timesteps
    )
    if not MASKS.isdisjoint(noisy_batch.batch.tensors):  # the batch has a mask
        weights = mask_weights(noisy_batch.batch, errors)
        errors = errors if weights is None else errors * weights
    image_errors = _mean_over_noisy_frames(errors, noisy_batch)
    if audio is None:
        return (image_errors,)
    audio_errors = element_errors(
        options, spec, audio_differences, sigmas=audio.sigmas, timesteps=audio.timesteps
    )
    if noisy_batch.clean_tokens is not None and noisy_batch.clean_tokens.audio is not None:
        return image_errors, mean_over_noisy_latents(audio_errors, noisy_batch.clean_tokens.audio)
    return image_errors, audio_errors.flatten(1).mean(1)


def mask_weights(batch: Batch, errors: Tensor) -> Tensor | None:
    """Return the weight of each position in the loss, B 1 F H W or B 1 1 H W; None without masks.

    Args:
        batch: The batch, with masks of images (B H W, in pixels), or of clips (B F H W, in latents).
        errors: Error of each element, B C F H W.
    """
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
    """Return the DiT's prediction for a noisy batch, which the loss compares with the target velocity.

    1. Add the noise, except to latents that stay clean.
    2. With audio, join it and the images into one tensor.
    3. Run the DiT, and convert the velocity for --model_prediction_type.

    The result is float32, B C F H W, or B N if the images and the audio of a sample are one vector.

    Args:
        family: The model family.
        dit: The transformer.
        latents: Clean latents of the batch, in model space.
        noisy_batch: Batch with noise and timesteps.
        autocast: Opens the autocast context of a pass.
        rule: How the prediction is compared.
    """
    clean_tokens = noisy_batch.clean_tokens  # how clean each latent stays
    num_clean_frames = noisy_batch.num_clean_frames
    conditions = family.batch_conditions(latents, noisy_batch.batch)
    noise = noisy_batch.noise
    if noisy_batch.perturbation is not None:
        noise = noise + noisy_batch.perturbation
    noisy = add_noise(latents, noise, noisy_batch.sigmas, family.noise.signal_scale(noisy_batch.sigmas))
    if num_clean_frames:  # the first frames are conditions and stay without noise
        noisy = torch.cat([latents[:, :, :num_clean_frames], noisy[:, :, num_clean_frames:]], dim=2)
    if clean_tokens is not None:
        noisy = blend_clean_latents(noisy, latents, clean_tokens.image)
    timesteps = noisy_batch.timesteps
    overrides = NO_OVERRIDES
    if num_clean_frames or clean_tokens is not None:
        overrides = Overrides(num_clean_frames=num_clean_frames, clean_tokens=clean_tokens)
    if noisy_batch.audio is not None:  # images and audio go through the network as one tensor, B N
        noisy = noisy_batch.joint.join(noisy, _noise_audio(family, noisy_batch, noisy_batch.audio))
        timesteps = torch.stack([timesteps, noisy_batch.audio.timesteps], dim=1)  # B 2
        overrides = replace(overrides, audio_video_shapes=noisy_batch.joint)
    set_levels(dit, noisy_batch.sigmas)  # for networks whose active ranks depend on the noise level
    with autocast():
        velocity = family.predict(dit, noisy, timesteps, conditions, overrides=overrides)
    if rule.prediction == RAW:  # the loss compares the velocity itself
        return velocity.float()
    return convert_velocity(
        velocity.float(),
        noisy,
        noisy_batch.sigmas,
        prediction=rule.prediction,
        sign=family.noise.output_sign,
    )


def _noise_audio(family: Trains, noisy_batch: NoisyBatch, audio: NoisyAudio) -> Tensor:
    """Return the noisy audio latents; latents used as conditions stay clean."""
    clean = noisy_batch.batch.tensor(AUDIO_LATENTS).float()
    noisy = add_noise(clean, audio.noise, audio.sigmas, family.noise.signal_scale(audio.sigmas))
    return (
        noisy
        if noisy_batch.clean_tokens is None
        else blend_clean_latents(noisy, clean, noisy_batch.clean_tokens.audio)
    )


def blend_clean_latents(noisy: Tensor, clean: Tensor, cleanness: Tensor | None) -> Tensor:
    """Blend clean latents into noisy ones, in proportion to the cleanness of each position.

    Args:
        noisy: Noisy latents of a stream, B C ....
        clean: Latents without noise, of the same shape.
        cleanness: How clean each position is, from 0 (noisy) to FULLY_CLEAN; None if all are noisy.
    """
    if cleanness is None:
        return noisy
    fraction = clean_fraction(cleanness, noisy)
    return fraction * clean + (1 - fraction) * noisy


def convert_velocity(velocity: Tensor, noisy: Tensor, sigmas: Tensor, prediction: str, sign: float) -> Tensor:
    """Return the value to compare with the velocity for --model_prediction_type, B C F H W.

    For `additive` it is the network's output plus the noisy latents; for `sigma_scaled` it is the noisy
    latents minus sigma times the output. Neither estimates the velocity; both are defined as in other
    trainers.

    Args:
        velocity: The predicted velocity.
        noisy: Noisy latents.
        sigmas: Fraction of noise of each sample, B.
        prediction: Value of --model_prediction_type.
        sign: Sign of the velocity in the output (`NoiseSpec.output_sign`). If it is -1, output and target are
            both negated, which does not change the loss.
    """
    if prediction == ADDITIVE:
        return velocity + sign * noisy.float()
    return sign * noisy.float() - per_sample(sigmas.float(), noisy) * velocity


def element_errors(
    options: LossOptions, spec: NoiseSpec, differences: Tensor, sigmas: Tensor, timesteps: Tensor
) -> Tensor:
    """Return the error of each element.

    For small differences d, huber is d^2 and smooth_l1 is d^2 / c; for large ones, 2 c |d| and 2 |d|.

    Args:
        options: Options of the run.
        spec: Noise conventions of the family.
        differences: Differences from the target, B C F H W.
        sigmas: Fraction of noise of each sample, B, 0..1.
        timesteps: Timestep of each sample, B, as the network takes it.

    Raises:
        ValueError: If the loss type is unknown.
    """
    if spec.clean_loss_scale:  # the differences of clean latents instead of velocities
        differences = differences * per_sample(spec.clean_loss_scale * sigmas.float(), differences)
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
    """Return the threshold c of each sample for --huber_schedule, B float32.

    With `snr` it is (1 - huber_c) / (1 + r)^2 + huber_c, where r is the ratio of noise to signal: sigma
    divided by the factor of the clean latents. Other trainers define this only for models that predict noise;
    for a flow, c also falls from 1 to huber_c.

    Args:
        options: Options of the loss.
        spec: Noise conventions of the family.
        sigmas: Fraction of noise of each sample, B.
        timesteps: Input of the network, B, 0..1000.
    """
    if options.huber_schedule == "constant":
        return torch.full_like(sigmas.float(), options.huber_c * options.huber_scale)
    if options.huber_schedule == "exponential":
        progress = timesteps.float().clamp(0, TRAIN_TIMESTEPS) / TRAIN_TIMESTEPS
        return (progress * math.log(options.huber_c)).exp() * options.huber_scale
    # snr; --huber_scale applies to the other two schedules only
    signal_scales = spec.signal_scale(sigmas)  # factors of the clean latents in the noisy ones
    # 1 / (1 + r)^2, written to avoid a division by zero at a scale of 0
    factors = (signal_scales / (signal_scales + sigmas.float())).square()
    return (1 - options.huber_c) * factors + options.huber_c
