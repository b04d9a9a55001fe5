"""Sliders of captions: at strength 1 a network acts like the positive caption, at -1 like the negative one.

Source of the target: LECO, after Gandikota et al. 2023 (Concept Sliders), arXiv 2311.12092.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protocols.data import Batch, Conditions
from protocols.family import Family
from training.data.live import stack_texts
from training.features.encoded_captions import encode_captions
from training.features.slider_file import Slider, SliderFile
from training.loss import NoisyBatch
from training.targets.passes import RunPasses, StreamErrors, TrainingPasses, measure_errors


@dataclass(frozen=True)
class SliderTarget:
    """The sliders of a --slider file with their encoded captions."""

    file: SliderFile
    encoded: Mapping[str, Conditions]  # by caption, without batch dimension, on the CPU
    variable_length: frozenset[str]  # names of outputs that are lists in batches

    def get_slider(self, number: int) -> Slider:
        """Return the slider that micro-batch `number` trains: the sliders alternate."""
        return self.file.sliders[number % len(self.file.sliders)]

    def with_caption(self, batch: Batch, caption: str, device: torch.device) -> Batch:
        """Return the batch with `caption`, and its text encoder outputs, in place of each caption."""
        tensors = dict(batch.tensors)
        for name, value in self.encoded[caption].items():
            stacked = stack_texts([value] * len(batch), name in self.variable_length)
            if isinstance(stacked, list):
                tensors[name] = [item.to(device) for item in stacked]
            else:
                tensors[name] = stacked.to(device)
        return replace(batch, tensors=tensors, captions=(caption,) * len(batch))


def slider_passes(
    target: SliderTarget,
    at_strength: Callable[[float], AbstractContextManager[None]],
    _: RunPasses,
    passes: TrainingPasses,
    noisy_batch: NoisyBatch,
) -> Iterator[StreamErrors]:
    """Yield the errors of each pass with gradients: at strength 1, then at -1.

    b is the base model, f the model with the trained network at that strength, and G the guidance:

    1. 1/2 |f(neutral) - (b(neutral) + strength * G * (b(positive) - b(negative)))|^2 * weight
    2. |f(anchor) - b(anchor)|^2 * weight * anchor_weight, for a slider with an anchor: a caption that
       the slider must not affect.

    The strength remains set until the caller has computed the gradients, because checkpointed blocks run
    their forward pass again.
    """
    slider = target.get_slider(noisy_batch.number)

    def with_caption(caption: str) -> NoisyBatch:
        batch = target.with_caption(noisy_batch.batch, caption, noisy_batch.noise.device)
        return replace(noisy_batch, batch=batch)

    neutral = with_caption(slider.neutral)
    base_neutral = passes.predict_base_model(neutral)
    base_positive = passes.predict_base_model(with_caption(slider.positive))
    direction = base_positive - passes.predict_base_model(with_caption(slider.negative))
    anchors = []  # at most one
    for caption, weight in _list_anchors(target, slider, passes.rule.in_lockstep):
        anchor = with_caption(caption)
        anchors.append(_TrainedPass(anchor, passes.predict_base_model(anchor), weight))
    for strength in (1.0, -1.0):
        with at_strength(strength):
            guided = base_neutral + strength * target.file.guidance * direction
            yield _TrainedPass(neutral, guided, 0.5 * slider.weight).run(passes)
            for anchor_pass in anchors:
                yield anchor_pass.run(passes)


@dataclass(frozen=True)
class _TrainedPass:
    """A pass with gradients: its input, the velocity to learn, and the weight of its errors."""

    noisy_batch: NoisyBatch
    velocity: Tensor
    weight: float

    def run(self, passes: TrainingPasses) -> StreamErrors:
        """Predict with gradients and return the weighted errors."""
        passes.reset_network_seed(self.noisy_batch)
        predicted = passes.predict_with_gradients(self.noisy_batch)
        errors = measure_errors(passes, predicted, self.velocity, self.noisy_batch)
        return tuple(self.weight * error for error in errors)


def _list_anchors(target: SliderTarget, slider: Slider, in_lockstep: bool) -> list[tuple[str, float]]:
    """Return the anchor caption of a slider and the weight of its errors; empty for a slider without one."""
    # If processes run in lockstep, a slider without an anchor gets one with weight 0: another process may
    # have an anchor in this step, and all have to run the same passes.
    if slider.anchor is not None:
        return [(slider.anchor, slider.weight * slider.anchor_weight)]
    if in_lockstep and target.file.has_anchors:
        return [(slider.neutral, 0.0)]
    return []


def encode_sliders(family: Family, file: SliderFile, device: torch.device) -> SliderTarget:
    """Encode all captions of a --slider file, one text encoder after the other.

    Raises:
        OptionError: If the file of a text encoder is missing.
    """
    texts = list(dict.fromkeys(text for slider in file.sliders for text in slider.captions))
    captions = encode_captions(family, texts, device)
    return SliderTarget(file, captions.encoded, captions.variable_length)
