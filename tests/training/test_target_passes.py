"""Passes of targets on single batches: samples on a bound, and passes that have no say of their own."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from protocols.data import FIRST_FRAME, HAS_AUDIO, Batch
from tests.training import toy
from training.features.blank_prior import run_blank_pass
from training.features.guided import GuidedTarget, with_guided_target
from training.features.output_preservation import preserve
from training.features.preference_pairs import add_streams, join_pairs
from training.features.slider_file import Slider, SliderFile
from training.features.slider_passes import SliderTarget, slider_passes
from training.features.teacher_errors import Split, magnitude_direction_errors
from training.features.teacher_passes import (
    BALANCE,
    Band,
    TeacherComparison,
    TeacherTarget,
    predict_as_base_model,
    with_teacher_inputs,
)
from training.learning_options import PRESERVE_OUTPUT
from training.loss import LossRule, NoisyBatch
from training.targets.passes import TrainingPasses, compare_with_clip, loss_passes, run_usual_pass

RESTART, BASE, LEARNING = "restart", "base", "learning"


def make_batch(*levels: float, frames: int = 1) -> NoisyBatch:
    """Samples at these levels, with the empty prompt."""
    generator = torch.Generator().manual_seed(5)
    count = len(levels)
    shape = (count, toy.LATENT.channels, frames, 4, 4)
    texts = [torch.full((1, 1), 0.3 * index) for index in range(count)]
    batch = Batch(
        {"latents": torch.randn(shape, generator=generator), "letters": texts},
        captions=("a",) * count,
        keys=("a",) * count,
        empty_text={"letters": [torch.full((1, 1), -0.7)] * count},
    )
    sigmas = torch.tensor(levels)
    return NoisyBatch(
        batch,
        noise=torch.randn(shape, generator=generator),
        sigmas=sigmas,
        timesteps=1000 * sigmas,
        weights=torch.ones(count),
        levels=levels,
    )


class Step:
    """The toy as a network, whose base model is the toy with another head; `events` are its passes."""

    def __init__(self, **changes: Any) -> None:
        self.events: list[str] = []
        self.family = toy.ToyFamily(watch=lambda _: self.events.append(LEARNING))
        self.dit = toy.ToyDit()
        generator = torch.Generator().manual_seed(7)
        for parameter in self.dit.parameters():
            parameter.data.normal_(generator=generator)
        self.rule = LossRule(
            as_base=self.as_base,
            seed_networks=lambda number: self.events.append(RESTART),
            **changes,
        )

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        self.events.append(BASE)
        weight = self.dit.head.weight.data
        self.dit.head.weight.data = -0.5 * weight
        yield
        self.dit.head.weight.data = weight

    def loss(self, noisy_batch: NoisyBatch) -> Tensor:
        passes = loss_passes(self.family, self.dit, noisy_batch, contextlib.nullcontext, self.rule)
        return torch.stack([loss.detach() for (loss,) in passes]).sum()

    def predict(self, noisy_batch: NoisyBatch) -> Tensor:
        latents = toy.LATENT.to_model(noisy_batch.batch.tensor("latents"))
        share = noisy_batch.sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noisy_batch.noise
        with torch.no_grad():
            output: Tensor = self.dit(noisy, noisy_batch.timesteps, noisy_batch.batch.tensors["letters"])
        return output

    def predict_base(self, noisy_batch: NoisyBatch) -> Tensor:
        with self.as_base():
            return self.predict(noisy_batch)


def velocity_of(noisy_batch: NoisyBatch) -> Tensor:
    return noisy_batch.noise - toy.LATENT.to_model(noisy_batch.batch.tensor("latents"))


def test_a_sample_at_the_lowest_level_is_guided() -> None:
    guided = GuidedTarget(scale=3.0, audio_scale=2.0, lowest_level=0.5)
    step = Step(list_comparisons=toy.around(compare_with_clip, partial(with_guided_target, guided)))
    noisy_batch = make_batch(0.5, 0.499)

    away = step.predict(replace(noisy_batch, batch=noisy_batch.batch.with_empty_text()))
    target = velocity_of(noisy_batch)
    target[0] = (away + 3 * (target - away))[0]
    expected = mse_loss(step.predict(noisy_batch), target)
    torch.testing.assert_close(step.loss(noisy_batch), expected)


def test_an_anchor_has_its_weight_and_its_balance() -> None:
    band = Band(0.0, 0.5)
    teaching = TeacherComparison(TeacherTarget(0.7, band=band, anchor_weight=0.5), predict_as_base_model)
    step = Step(list_comparisons=toy.around(compare_with_clip, teaching.compare))
    noisy_batch = replace(make_batch(0.5, 0.6), notes={BALANCE: 2.0})

    output, base = step.predict(noisy_batch), step.predict_base(noisy_batch)
    inside, outside = (output - base).square().flatten(1).mean(1)
    expected = 0.3 * mse_loss(output, velocity_of(noisy_batch)) + 0.7 * (inside + 0.5 * 2 * outside) / 2
    torch.testing.assert_close(step.loss(noisy_batch), expected)


@pytest.mark.parametrize(("frames", "given", "expected"), [(3, 0, 1), (3, 2, 2), (1, 0, 0)])
def test_a_teacher_that_knows_the_first_frame_is_not_compared_there(
    frames: int, given: int, expected: int
) -> None:
    family = toy.ToyFamily(teacher_only_conditions=(FIRST_FRAME,))
    noisy_batch = replace(make_batch(0.5, frames=frames), num_clean_frames=given)

    assert with_teacher_inputs(family, noisy_batch, "").num_clean_frames == expected


@pytest.mark.parametrize("attributes", [(), (frozenset(), frozenset({PRESERVE_OUTPUT}))])
def test_processes_that_share_a_model_run_the_base_model_for_every_batch(
    attributes: tuple[frozenset[str], ...],
) -> None:
    """What no sample asks for is dropped."""
    step = Step(always_runs_base_model=True, list_comparisons=toy.around(compare_with_clip, preserve))
    noisy_batch = make_batch(0.5, 0.6)
    noisy_batch = replace(noisy_batch, batch=replace(noisy_batch.batch, attributes=attributes))

    target = velocity_of(noisy_batch)
    if attributes:
        target[1] = step.predict_base(noisy_batch)[1]
    expected = mse_loss(step.predict(noisy_batch), target)
    step.events.clear()
    torch.testing.assert_close(step.loss(noisy_batch), expected)
    assert step.events == [BASE, LEARNING]


def test_random_numbers_of_the_network_begin_anew_before_each_pass_that_learns() -> None:
    guided = partial(with_guided_target, GuidedTarget(3.0, 3.0, 0.0))
    step = Step(
        list_comparisons=toy.around(compare_with_clip, guided),
        run_passes=toy.around(run_usual_pass, partial(run_blank_pass, 0.5)),
    )
    step.loss(make_batch(0.5))
    assert step.events == [BASE, RESTART, LEARNING, RESTART, RESTART, LEARNING]

    sliders = (Slider("red", "blue", "a thing", anchor="a dog", weight=1.0, anchor_weight=1.0),)
    encoded = {text: {"letters": torch.zeros(1, 1)} for text in ("red", "blue", "a thing", "a dog")}
    target = SliderTarget(SliderFile(2.0, sliders), encoded, frozenset())
    noisy_batch = make_batch(0.5)
    latents = toy.LATENT.to_model(noisy_batch.batch.tensor("latents"))
    passes = TrainingPasses(step.family, step.dit, latents, contextlib.nullcontext, step.rule)
    step.events.clear()
    at_strength = lambda strength: contextlib.nullcontext()  # noqa: E731
    for _ in slider_passes(target, at_strength, run_usual_pass, passes, noisy_batch):
        assert step.events[-2:] == [RESTART, LEARNING]
    assert step.events == [BASE] * 4 + [RESTART, LEARNING] * 4


def test_a_clip_without_sound_has_none_in_its_preference() -> None:
    pairs = make_batch(0.5, 0.5)
    heard = {**pairs.batch.tensors, HAS_AUDIO: torch.tensor([True, False])}
    pairs = replace(pairs, batch=replace(pairs.batch, tensors=heard))

    errors = add_streams((torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])), pairs)

    assert errors.tolist() == [11.0, 2.0]


def test_pairs_have_all_numbers_of_their_samples_twice() -> None:
    noisy_batch = make_batch(0.25, 0.5)
    rejected = noisy_batch.batch.tensor("latents") + 1
    batch = replace(
        noisy_batch.batch, rejected=rejected, has_empty_text=(True, False), loss_weights=(1.0, 2.0)
    )

    pairs = join_pairs(replace(noisy_batch, batch=batch))

    assert pairs.levels == (0.25, 0.5) * 2
    assert pairs.batch.has_empty_text == (True, False) * 2
    assert pairs.batch.loss_weights == (1.0, 2.0) * 2
    for name in ("noise", "sigmas", "timesteps", "weights"):
        first, second = getattr(pairs, name).chunk(2)
        assert torch.equal(first, second), name
    better, second = pairs.batch.tensor("latents").chunk(2)
    assert torch.equal(better + 1, second)
    assert len(pairs.batch) == len(pairs.batch.tensors["letters"]) == 4


def test_the_colour_of_a_clip_is_the_mean_of_all_its_frames() -> None:
    """Each frame has its own means; only the part that all frames share is weighed by the color's weight."""
    target = torch.zeros(1, 2, 2, 1, 1)
    target[:] = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
    both = torch.tensor([3.0, -1.0]).view(1, 1, 2, 1, 1)  # of two frames: 1 on average
    output = target + both

    lighter = magnitude_direction_errors(output, target, Split(1.0, 0.0), has_channels=True)

    # without the mean of 1, the frames differ by 2 and -2
    torch.testing.assert_close(lighter, torch.tensor([4.0]))
