"""The passes of a training step: first passes without gradients for targets, then passes with gradients.

Passes without gradients come first, have the same noisy input, and draw no random numbers. So swapped blocks
keep their order, forward and backward, and all random numbers are those of a run without targets. If a target
does not apply to any sample of a batch, because of noise levels or masks, its pass is skipped. If processes
share a model (`LossRule.in_lockstep`), all run equal passes, and unneeded results are dropped.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modules.devices import tensor_on
from protocols.data import AUDIO_LATENTS, LOSS_MASK
from protocols.family import Trains
from training.learning_options import PRESERVE_OUTPUT
from training.loss import (
    MASK,
    PLAIN_LOSS,
    Autocast,
    LossRule,
    NoisyAudio,
    NoisyBatch,
    per_sample,
    predict,
    sample_errors,
)

# one tensor B for images, and a second one for audio if the batch has any
StreamErrors = tuple[Tensor, ...]
Measure = Callable[[Tensor, Tensor, NoisyBatch], StreamErrors]  # output, target, batch -> errors


@dataclass(frozen=True)
class TargetComparison:
    """A target tensor for the network's output, with its error function and loss weight."""

    target: Tensor  # has the shape of the output
    measure: Measure
    noisy_batch: NoisyBatch  # the batch whose given frames and masks are used
    weight: "float | Tensor"  # factor on the errors: one for the batch, or one for each sample, B


@dataclass(frozen=True)
class TrainingPasses:
    """Forward passes of a DiT on one batch, with or without the trained network (such as a LoRA)."""

    family: Trains
    dit: nn.Module
    latents: Tensor  # in model space
    autocast: Autocast
    rule: LossRule

    def predict_with_gradients(self, noisy_batch: NoisyBatch) -> Tensor:
        """Return the prediction of the trained network, with gradients."""
        predict_batch = self.rule.predict or TrainingPasses.predict
        return predict_batch(self, noisy_batch)

    def predict(self, noisy_batch: NoisyBatch) -> Tensor:
        """Return the prediction of the network with its current weights, with gradients if enabled."""
        return predict(
            self.family, self.dit, self.latents, noisy_batch, autocast=self.autocast, rule=self.rule
        )

    def predict_without_gradients(self, noisy_batch: NoisyBatch) -> Tensor:
        """Return the prediction of the network with its current weights, computed without gradients."""
        with torch.no_grad():
            return self.predict(noisy_batch)

    def predict_base_model(self, noisy_batch: NoisyBatch) -> Tensor:
        """Return the prediction of the base model, with the LoRA disabled and without gradients."""
        assert self.rule.as_base is not None  # full fine-tuning rejects options that need it
        with torch.no_grad(), self.rule.as_base():
            return self.predict(noisy_batch)

    def reset_network_seed(self, noisy_batch: NoisyBatch) -> None:
        """Reset the network's random generators, which an earlier pass of the batch may have advanced."""
        if self.rule.seed_networks is not None:
            self.rule.seed_networks(noisy_batch.number)


# functions of the phases TARGETS and LOSS
ListComparisons = Callable[[TrainingPasses, NoisyBatch], list[TargetComparison]]
RunPasses = Callable[[TrainingPasses, NoisyBatch], Iterator[StreamErrors]]


def training_loss(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, rule: LossRule = PLAIN_LOSS
) -> Tensor:
    """Return the weighted mean error of a batch over all passes, images and audio, as a scalar tensor.

    All samples of a batch have the same size, so the mean over samples is also the mean over elements.
    """
    losses = [
        functools.reduce(torch.add, streams)
        for streams in loss_passes(family, dit, noisy_batch, autocast=autocast, rule=rule)
    ]
    return functools.reduce(torch.add, losses)


def loss_passes(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, rule: LossRule = PLAIN_LOSS
) -> Iterator[StreamErrors]:
    """Yield the weighted mean errors of each pass with gradients: one for images, and one for audio if any.

    Run the backward pass of each before taking the next one: this frees the graph, and networks may change
    their state between two passes.
    """
    passes = _make_passes(family, dit, noisy_batch, autocast=autocast, rule=rule)
    if rule.run_passes is None:
        yield weigh_losses(measure_pass(passes, noisy_batch), noisy_batch)
        return
    for errors in rule.run_passes(passes, noisy_batch):
        yield weigh_losses(errors, noisy_batch)


def run_usual_pass(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Iterator[StreamErrors]:
    """Yield the errors of the usual pass, for features that run passes before it."""
    yield measure_pass(passes, noisy_batch)


def weigh_losses(errors: StreamErrors, noisy_batch: NoisyBatch) -> StreamErrors:
    """Return the mean error of each stream, each sample weighted by the batch's loss weights: scalars."""
    weights = [noisy_batch.weights]
    if noisy_batch.audio is not None:
        weights.append(noisy_batch.audio.weights)
    # a pass may return one error for both streams; it gets the weight of the image
    return tuple((error * weight).mean() for error, weight in zip(errors, weights, strict=False))


def compute_target_velocity(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Return the target velocity, noise - latents, joined with the audio's velocity if there is audio."""
    family = passes.family
    target = family.noise.velocity(passes.latents, noisy_batch.noise, noisy_batch.sigmas)
    audio = noisy_batch.audio
    if audio is None:
        return target
    audio_latents = noisy_batch.batch.tensor(AUDIO_LATENTS).float()
    audio_target = family.noise.velocity(audio_latents, audio.noise, audio.sigmas)
    return noisy_batch.joint.join(target, audio_target)


def without_masks(noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return the batch without loss masks, so that all positions count equally."""
    tensors = dict(noisy_batch.batch.tensors)
    tensors.pop(MASK, None)
    tensors.pop(LOSS_MASK, None)
    return replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))


def _make_passes(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, rule: LossRule
) -> TrainingPasses:
    latents = family.latent.to_model(noisy_batch.batch.tensor("latents"))
    return TrainingPasses(family, dit, latents, autocast, rule)


def measure_streams(
    family: Trains, dit: nn.Module, noisy_batch: NoisyBatch, autocast: Autocast, rule: LossRule
) -> StreamErrors:
    """Return the error of each sample, B, between the prediction and the velocity or the rule's targets.

    For a batch with audio, a second tensor contains the errors of the audio.
    """
    return measure_pass(_make_passes(family, dit, noisy_batch, autocast=autocast, rule=rule), noisy_batch)


def compare_with_clip(passes: TrainingPasses, noisy_batch: NoisyBatch) -> list[TargetComparison]:
    """Return the comparison of the prediction with the velocity of the clip, which features may change."""
    velocity = compute_target_velocity(passes, noisy_batch)
    measure = functools.partial(measure_errors, passes)
    return [TargetComparison(velocity, measure, noisy_batch, weight=1.0)]


def measure_pass(passes: TrainingPasses, noisy_batch: NoisyBatch) -> StreamErrors:
    """Return the weighted sum of the errors of one forward pass against the velocity and other targets."""
    if passes.rule.list_comparisons is None:
        velocity = compute_target_velocity(passes, noisy_batch)
        output = passes.predict_with_gradients(noisy_batch)
        return sample_errors(passes.family.noise, output - velocity, noisy_batch, passes.rule)
    comparisons = passes.rule.list_comparisons(passes, noisy_batch)
    output = passes.predict_with_gradients(noisy_batch)
    errors: StreamErrors = ()
    for comparison in comparisons:
        measured_errors = comparison.measure(output, comparison.target, comparison.noisy_batch)
        errors = _add_weighted(errors, measured_errors, comparison.weight)
    return errors


def _add_weighted(sums: StreamErrors, errors: StreamErrors, weight: "float | Tensor") -> StreamErrors:
    """Add weighted errors to the sums of video and audio; a stream that `errors` lacks keeps its sum."""
    weighted = errors
    if not isinstance(weight, float) or weight != 1.0:
        weighted = tuple(weight * error for error in errors)
    if not sums:
        return weighted
    added = [before + more for before, more in zip(sums, weighted, strict=False)]
    return (*added, *sums[len(added) :])


def measure_errors(
    passes: TrainingPasses, output: Tensor, target: Tensor, noisy_batch: NoisyBatch
) -> StreamErrors:
    """Return the errors between an output and a target, computed with --loss_type and masks."""
    return sample_errors(passes.family.noise, output - target, noisy_batch, passes.rule)


def select_per_sample(is_selected: Sequence[bool], if_selected: Tensor, otherwise: Tensor) -> Tensor:
    """Return `if_selected` or `otherwise` for each sample; both have the shape B ..."""
    mask = tensor_on(otherwise.device, is_selected, torch.bool)
    return torch.where(per_sample(mask, otherwise), if_selected, otherwise)


def list_noise_fractions(noised: NoisyBatch | NoisyAudio) -> Sequence[float]:
    """Return the noise fraction (sigma) of each sample as Python floats."""
    return noised.levels or noised.sigmas.tolist()


def samples_with_base_target(noisy_batch: NoisyBatch) -> Sequence[bool]:
    """Return for each sample whether its dataset table sets the base model's prediction as the target."""
    batch = noisy_batch.batch
    if not batch.attributes:
        return [False] * len(batch)
    return [PRESERVE_OUTPUT in attributes for attributes in batch.attributes]


def has_mask(noisy_batch: NoisyBatch) -> bool:
    """Return whether any item of the batch has a clip mask or a loss mask."""
    return MASK in noisy_batch.batch.tensors or LOSS_MASK in noisy_batch.batch.tensors
