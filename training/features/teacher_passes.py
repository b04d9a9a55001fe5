"""Compare the network with the prediction of a frozen model, which may know more than the network."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.devices import tensor_on
from protocols.data import FIRST_FRAME
from protocols.family import Trains
from protocols.steps import clean_fraction
from training.data.feed import NoiseSampler
from training.data.timesteps import find_shift
from training.features.hooks import RunFeatures
from training.features.phases import TARGETS
from training.features.teacher_balance import find_balance
from training.features.teacher_errors import EVEN_SPLIT, Split, magnitude_direction_errors
from training.features.teacher_options import TeacherOptions
from training.loss import NoisyBatch, mask_weights
from training.targets.passes import (
    ListComparisons,
    Measure,
    StreamErrors,
    TargetComparison,
    TrainingPasses,
    list_noise_fractions,
    measure_errors,
    samples_with_base_target,
)

THOUSAND = 1000
BALANCE = "anchor"  # key in `NoisyBatch.notes`: factor on the loss outside the teacher's band

PredictTarget = Callable[[TrainingPasses, NoisyBatch], Tensor]  # returns the teacher's prediction


def install_teacher(run: RunFeatures, options: TeacherOptions) -> "TeacherComparison":
    """Add the comparison with the teacher to a run.

    Until the teacher is loaded, and when memory is predicted, the trained model is used in its place.
    """
    comparison = TeacherComparison(
        make_target(options), run_change_passes_for_memory if options.teacher_delta else predict_as_base_model
    )
    run.around(TARGETS, comparison.compare)
    if options.band is not None:
        run.on.batch.append(functools.partial(balance_anchor, options.band))
    return comparison


@dataclass(frozen=True)
class Band:
    """Range of noise fractions, 0..1 and inclusive, in which the teacher gets additional inputs."""

    lowest: float
    highest: float

    def contains(self, level: float) -> bool:
        """Return whether a noise level lies in the band."""
        return self.lowest <= level <= self.highest


@dataclass(frozen=True)
class TeacherTarget:
    """Loss weights and noise levels of the comparison with a frozen teacher."""

    weight: float  # fraction of the loss, 0..1
    band: Band | None = None  # None: all levels
    anchor_weight: float = 1.0  # factor on the loss outside the band
    split: Split | None = None  # None: squared differences, or those of --loss_type
    condition_set: str = ""  # `Batch.condition_set` inside the band


def make_target(options: TeacherOptions) -> TeacherTarget:
    """Return the teacher's target for the options; timesteps become noise fractions, 0..1."""
    band = None
    if options.band is not None:
        low, high = options.band
        band = Band(low / THOUSAND, high / THOUSAND)
    split = None
    if options.teacher_split:
        split = Split(options.teacher_size_weight, options.teacher_colour_weight)
    return TeacherTarget(
        options.teacher_weight,
        band=band,
        anchor_weight=options.teacher_anchor_weight,
        split=split,
        condition_set=options.condition_set,
    )


@dataclass
class TeacherComparison:
    """Loss terms that compare the network's predictions with the teacher's."""

    target: TeacherTarget
    predict_target: PredictTarget

    def compare(
        self,
        list_comparisons: ListComparisons,
        passes: TrainingPasses,
        noisy_batch: NoisyBatch,
    ) -> list[TargetComparison]:
        """Add the loss terms of the teacher, and reduce the weight of the ordinary loss term by their weight.

        Inside its band of noise levels, the teacher gets all known inputs. Outside it, the teacher gets the
        network's inputs, as an anchor. Samples that learn the base model's prediction get no teacher term.
        """
        ordinary, *other_comparisons = list_comparisons(passes, noisy_batch)
        teacher_weights = [
            0.0 if is_preserved else self.target.weight
            for is_preserved in samples_with_base_target(noisy_batch)
        ]
        ordinary_weight = _as_sample_weights(
            [1 - weight for weight in teacher_weights], ordinary.target.device
        )
        return [
            replace(ordinary, weight=ordinary_weight),
            *other_comparisons,
            *self._compare_with_teacher(passes, noisy_batch),
        ]

    def _compare_with_teacher(
        self, passes: TrainingPasses, noisy_batch: NoisyBatch
    ) -> list[TargetComparison]:
        """Return the loss terms of samples inside and of samples outside the teacher's noise range (band)."""
        # For each sample whether its noise level is inside the band, and whether it is outside
        # Both are False for a sample whose target is the base model's prediction.
        band = self.target.band
        is_inside = []
        is_outside = []
        is_preserved = samples_with_base_target(noisy_batch)
        for level, preserved in zip(list_noise_fractions(noisy_batch), is_preserved, strict=True):
            in_band = band is None or band.contains(level)
            is_inside.append(in_band and not preserved)
            is_outside.append(not in_band and not preserved)
        # in lockstep the teacher always runs, because all processes have to run the same passes
        in_lockstep = passes.rule.in_lockstep
        comparisons = []
        if any(is_inside) or in_lockstep:
            # Compare with a teacher that gets all known inputs; samples outside its band have weight 0
            teacher_batch = with_teacher_inputs(passes.family, noisy_batch, self.target.condition_set)
            target = self.predict_target(passes, teacher_batch)
            weights = [self.target.weight * inside for inside in is_inside]
            comparisons.append(
                TargetComparison(
                    target,
                    _measure_for(passes, self.target.split),
                    teacher_batch,
                    _as_sample_weights(weights, target.device),
                )
            )
        if any(is_outside) or (in_lockstep and self.target.band is not None):
            comparisons.append(self._compare_outside(passes, noisy_batch, is_outside))
        return comparisons

    def _compare_outside(
        self, passes: TrainingPasses, noisy_batch: NoisyBatch, is_outside: Sequence[bool]
    ) -> TargetComparison:
        """Compare with a teacher that gets the network's inputs; samples inside its band have weight 0."""
        target = self.predict_target(passes, noisy_batch)
        teacher = self.target
        weight = teacher.weight * teacher.anchor_weight * noisy_batch.notes.get(BALANCE, 1.0)
        weights = [weight * outside for outside in is_outside]
        return TargetComparison(
            target,
            _measure_for(passes, None if teacher.split is None else EVEN_SPLIT),
            noisy_batch,
            _as_sample_weights(weights, target.device),
        )


def balance_anchor(band: tuple[int, int], drawn: NoiseSampler, noisy_batch: NoisyBatch) -> NoisyBatch:
    """Store in the batch a factor for the loss outside the band, which compensates for --timestep_focus."""
    balance = find_balance(
        drawn.timesteps,
        *band,
        noise_spec=drawn.noise_spec,
        flow_shift=find_shift(drawn.timesteps, drawn.noise_spec, noisy_batch.noise.shape),
        expert=drawn.experts[noisy_batch.expert],
    )
    return replace(noisy_batch, notes={**noisy_batch.notes, BALANCE: balance.outside})


def _as_sample_weights(weights: Sequence[float], device: torch.device) -> "float | Tensor":
    """Return the weight of each sample as a tensor of shape B, or as one number if all are equal."""
    if len(set(weights)) == 1:
        return weights[0]
    return tensor_on(device, weights, torch.float32)


def _measure_for(passes: TrainingPasses, split: Split | None) -> Measure:
    """Return the error function: magnitude and direction errors with a `split`, else the run's usual loss."""
    if split is None:
        return functools.partial(measure_errors, passes)
    return functools.partial(_measure_split, split)


def _measure_split(split: Split, output: Tensor, target: Tensor, noisy_batch: NoisyBatch) -> StreamErrors:
    """Return the error of each sample as a sum of errors of magnitude and direction, weighted by masks."""
    outputs = _weighted_streams(output, noisy_batch)
    targets = _weighted_streams(target, noisy_batch)
    errors = [magnitude_direction_errors(outputs[0], targets[0], split, has_channels=True)]
    for audio_output, audio_target in zip(outputs[1:], targets[1:], strict=True):
        errors.append(magnitude_direction_errors(audio_output, audio_target, split, has_channels=False))
    return tuple(errors)


def _weighted_streams(prediction: Tensor, noisy_batch: NoisyBatch) -> tuple[Tensor, ...]:
    """Split a prediction into images, B C F H W, and audio if the batch has any, weighted for a comparison.

    The squared norm of the difference of two results then weights positions as the ordinary loss does: frames
    and latents that are clean in the input have no weight, and others the weight of the loss mask.
    """
    audios = []
    if noisy_batch.audio is not None:
        prediction, audio = noisy_batch.joint.split(prediction)  # the network gets both as one tensor
        audios.append(audio)
    clean_tokens = noisy_batch.clean_tokens  # how clean each latent of the input is; None: all are noisy
    if clean_tokens is not None and clean_tokens.image is not None:
        prediction = prediction * (clean_fraction(clean_tokens.image, prediction) == 0)
    if clean_tokens is not None and clean_tokens.audio is not None:
        audios = [audio * (clean_fraction(clean_tokens.audio, audio) == 0) for audio in audios]
    weights = mask_weights(noisy_batch.batch, prediction)
    if weights is not None:
        prediction = prediction * weights.sqrt()  # the root, because the norm squares it
    # the first `num_clean_frames` latent frames are clean
    return (prediction[:, :, noisy_batch.num_clean_frames :], *audios)


def with_teacher_inputs(family: Trains, noisy_batch: NoisyBatch, condition_set: str) -> NoisyBatch:
    """Return the batch with all inputs, including the ones that only the teacher gets.

    Args:
        family: The model family.
        noisy_batch: Batch with noise and timesteps.
        condition_set: Name of the additional conditions that the teacher gets; "" for none.
    """
    has_first = FIRST_FRAME in family.teacher_only_conditions and noisy_batch.noise.shape[2] > 1
    num_clean_frames = max(noisy_batch.num_clean_frames, int(has_first))
    batch = replace(
        noisy_batch.batch.restore_dropped(family.teacher_only_conditions), condition_set=condition_set
    )
    return replace(noisy_batch, batch=batch, num_clean_frames=num_clean_frames)


def predict_as_base_model(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Return the prediction of the base model, for runs that use it as the teacher."""
    return passes.predict_base_model(noisy_batch)


def run_change_passes_for_memory(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Run the three forward passes of --teacher_delta with a single model, to predict their peak memory."""
    with torch.no_grad():
        return passes.predict_base_model(noisy_batch) + (
            passes.predict_without_gradients(noisy_batch) - passes.predict_without_gradients(noisy_batch)
        )
