"""The loss of clips with sound: two streams as one tensor, each with its own noise, weights and error."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protocols.data import AUDIO_LATENTS, HAS_AUDIO, AudioSpec, AudioVideoShapes, Batch, Conditions
from protocols.family import FLOW, Abilities, NoiseSpec
from protocols.rules import AUDIO_STREAM, IMAGE_STREAM, AudioLearning, ShiftedLogit
from protocols.steps import NO_OVERRIDES, Overrides
from tests.training.toy import LATENT, ToyFamily, around, toy_options, write_caches
from training.data.feed import BatchSources, NoiseSampler
from training.data.timesteps import draw
from training.features.guided import GuidedTarget, with_guided_target
from training.features.teacher_errors import Split
from training.features.teacher_passes import TeacherComparison, TeacherTarget, predict_as_base_model
from training.loss import PLAIN_LOSS, LossRule, NoisyBatch
from training.noise_options import SHIFTED_LOGIT, TimestepOptions
from training.run import prepare_run
from training.targets.passes import compare_with_clip, measure_streams, training_loss

JOINT = AudioVideoShapes((2, 3, 2, 2), (2, 4, 3))


class Hearing(ToyFamily):
    """Returns its input, and keeps what it was told."""

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        self.__dict__["told"] = noisy, timesteps, overrides
        return noisy


def count_tokens(shape: tuple[int, ...]) -> int:
    return 1024 if len(shape) == 5 else 4096


def batch_of(*has_sound: bool) -> Batch:
    """Random latents; sound for those that have some."""
    numbers = torch.Generator().manual_seed(0)
    count = len(has_sound)
    tensors: dict[str, Any] = {"latents": torch.randn(count, *JOINT.image, generator=numbers)}
    tensors["letters"] = [torch.ones(1, 1)] * count
    if any(has_sound):
        mask = torch.tensor(has_sound)
        heard = torch.randn(count, *JOINT.audio, generator=numbers)
        tensors |= {AUDIO_LATENTS: heard * mask.view(-1, 1, 1, 1), HAS_AUDIO: mask}
    return Batch(tensors, ("",) * count, tuple("abc"[:count]))


AS_DEFAULT = AudioLearning()


def drawn(batch: Batch, learning: AudioLearning = AS_DEFAULT) -> NoisyBatch:
    timesteps = replace(TimestepOptions.from_defaults(), timestep_sampling="uniform")
    return NoiseSampler(timesteps, 7, replace(FLOW, training_offset=0.0), audio=learning).add_noise(
        batch, 3, 0
    )


def by_hand(noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
    """Return the two errors of each sample of a network that returns its input."""
    assert noisy.audio is not None

    def errors(clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        sigma = sigmas.view(-1, *([1] * (clean.ndim - 1)))
        output = (1 - sigma) * clean + sigma * noise
        return (output - (noise - clean)).square().flatten(1).mean(1)

    latents, heard = noisy.batch.tensor("latents") * LATENT.scale, noisy.batch.tensor(AUDIO_LATENTS)
    audio = errors(heard, noisy.audio.noise, noisy.audio.sigmas)
    return errors(latents, noisy.noise, noisy.sigmas), audio


@pytest.mark.parametrize("own", [False, True])
def test_the_streams_are_judged_apart_and_added(own: bool) -> None:
    family, learning = Hearing(), AudioLearning(0.5, 3.0, has_own_times=own)
    noisy = drawn(batch_of(True, True), learning)

    loss = training_loss(family, nn.Identity(), noisy, nullcontext)

    image, heard = by_hand(noisy)
    torch.testing.assert_close(loss, (0.5 * image + 3 * heard).mean())  # float32, another order of sums
    fed, timesteps, overrides = family.__dict__["told"]
    assert fed.shape == (2, 24 + 24)
    assert overrides.audio_video_shapes == JOINT
    assert noisy.audio is not None
    assert torch.equal(timesteps, torch.stack([noisy.timesteps, noisy.audio.timesteps], dim=1))
    assert torch.equal(noisy.sigmas, noisy.audio.sigmas) != own


def test_a_silent_clip_leaves_the_loss_of_the_others_sound_as_it_is() -> None:
    mixed, both = drawn(batch_of(True, False)), drawn(batch_of(True, True))

    streams = measure_streams(Hearing(), nn.Identity(), mixed, nullcontext, PLAIN_LOSS)
    alone = measure_streams(Hearing(), nn.Identity(), both, nullcontext, PLAIN_LOSS)

    assert mixed.audio is not None
    assert mixed.audio.weights.tolist() == [1, 0]
    assert torch.equal(streams[1][0], alone[1][0])


def test_clips_without_any_sound_are_an_ordinary_batch() -> None:
    family = Hearing()
    noisy = drawn(batch_of(False, False))

    training_loss(family, nn.Identity(), noisy, nullcontext)

    fed, timesteps, overrides = family.__dict__["told"]
    assert noisy.audio is None
    assert (fed.shape, timesteps.shape, overrides.audio_video_shapes) == ((2, *JOINT.image), (2,), None)


def test_a_guided_target_has_a_scale_for_each_stream_and_the_levels_of_each() -> None:
    """The network answers every text alike, so its distance to the target is the scale times the usual."""
    noisy = drawn(batch_of(True, True), AudioLearning(has_own_times=True))
    assert noisy.audio is not None
    noisy = replace(noisy, batch=replace(noisy.batch, empty_text={"letters": [torch.zeros(1, 1)] * 2}))
    lowest = min(noisy.levels) + 1e-3  # one picture is below it
    guided = partial(with_guided_target, GuidedTarget(3.0, 2.0, lowest))
    rule = LossRule(list_comparisons=around(compare_with_clip, guided))

    streams = measure_streams(Hearing(), nn.Identity(), noisy, nullcontext, rule)

    for errors, default, levels, scale in zip(
        streams, by_hand(noisy), (noisy.levels, noisy.audio.levels), (3.0, 2.0), strict=True
    ):
        factors = [scale**2 if level >= lowest else 1.0 for level in levels]
        torch.testing.assert_close(errors, default * torch.tensor(factors))
    assert sum(level < lowest for level in noisy.levels) == 1


def test_the_colour_of_a_teacher_is_of_the_picture_alone() -> None:
    """A base model that is off by a constant: its color counts as the weight says, its sound in full."""

    class Shifted(Hearing):
        is_base = False

        def predict(
            self, dit: Any, noisy: Tensor, timesteps: Any, cond: Any, overrides: Any = NO_OVERRIDES
        ) -> Tensor:
            return noisy + 0.5 if type(self).is_base else noisy

    @contextmanager
    def as_base() -> Iterator[None]:
        Shifted.is_base = True
        yield
        Shifted.is_base = False

    noisy = drawn(batch_of(True))
    teaching = TeacherComparison(TeacherTarget(1.0, split=Split(1.0, 0.25)), predict_as_base_model)
    rule = LossRule(as_base=as_base, list_comparisons=around(compare_with_clip, teaching.compare))

    image, heard = measure_streams(Shifted(), nn.Identity(), noisy, nullcontext, rule)

    torch.testing.assert_close(image, torch.full((1,), 0.25 * 0.25))
    torch.testing.assert_close(heard, torch.full((1,), 0.25))


@pytest.mark.parametrize(("given", "is_image"), [(IMAGE_STREAM, True), (AUDIO_STREAM, False)])
def test_a_given_stream_is_clean_and_not_learned(given: str, is_image: bool) -> None:
    noisy = drawn(batch_of(True), AudioLearning(clean_stream=given))
    family = Hearing()

    loss = training_loss(family, nn.Identity(), noisy, nullcontext)

    image, heard = by_hand(noisy)
    assert torch.equal(loss, (heard if is_image else image).mean())
    parts = JOINT.split(family.__dict__["told"][0])
    clean = (noisy.batch.tensor("latents") * LATENT.scale, noisy.batch.tensor(AUDIO_LATENTS))
    are_clean = [torch.equal(part, one) for part, one in zip(parts, clean, strict=True)]
    assert are_clean == [is_image, not is_image]


@pytest.mark.parametrize(
    "learning",
    [
        AudioLearning(),
        AudioLearning(0.5, 0.25),
        AudioLearning(0.5, 0.0, has_own_times=True),
        AudioLearning(2.0, 3.0, clean_stream=IMAGE_STREAM),
        AudioLearning(2.0, 3.0, clean_stream=AUDIO_STREAM),
    ],
)
def test_validation_measures_the_task_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning: AudioLearning
) -> None:
    """The same stream is clean, the weights are those of the loss, and the noise is that of the level."""
    write_caches(tmp_path)
    with prepare_run(ToyFamily(), toy_options(tmp_path, "--validation_split", "0.2")) as run:
        validation = run.validation
    assert validation is not None
    family = Hearing(
        abilities=Abilities(trains_audio=True), noise=replace(FLOW, training_offset=0.0, audio_shift=3.0)
    )
    family.__dict__.update(audio=AudioSpec(8000, 2, lambda frames, fps: JOINT.audio), audio_learning=learning)
    monkeypatch.setattr(BatchSources, "read", lambda *_, **__: batch_of(True))
    validation.plan = replace(validation.plan, family=family)
    measured = validation.measure(lambda _: nn.Identity(), nullcontext)

    clean = batch_of(True)
    image, audio = clean.tensor("latents") * LATENT.scale, clean.tensor(AUDIO_LATENTS)
    noisy, timesteps, _ = family.__dict__["told"]  # of the last level: 0.9
    image_sigma = 0.0 if learning.clean_stream == IMAGE_STREAM else 0.9
    audio_sigma = 0.9 if learning.has_own_times else 3 * 0.9 / (1 + 2 * 0.9)
    audio_sigma = 0.0 if learning.clean_stream == AUDIO_STREAM else audio_sigma
    expected = 0.0
    parts = zip(
        (image, audio),
        JOINT.split(noisy),
        (image_sigma, audio_sigma),
        (learning.image_weight, learning.audio_weight),
        strict=True,
    )
    for latents, part, sigma, weight in parts:
        if sigma == 0:
            assert torch.equal(part, latents)
            continue
        noise = (part - (1 - sigma) * latents) / sigma
        assert 0.5 < float(noise.std()) < 1.5
        expected += weight * float((part - (noise - latents)).square().mean())
    assert (timesteps / 1000).flatten().tolist() == pytest.approx([image_sigma, audio_sigma])
    assert measured["validation/loss_900"] == pytest.approx(expected, rel=1e-4)


def test_times_of_audio_of_its_own_are_independent_with_buckets_too() -> None:
    """Levels of the two lie in the same tenth about as often as chance says, and audio alone takes each."""
    options = replace(TimestepOptions.from_defaults(), timestep_sampling="uniform", num_timestep_buckets=10)
    sampler = NoiseSampler(options, 7, FLOW, audio=AudioLearning(has_own_times=True))
    levels = []
    for number in range(300):
        noisy = sampler.add_noise(batch_of(True), number, number)
        assert noisy.audio is not None
        levels.append((noisy.levels[0], noisy.audio.levels[0]))

    image, audio = torch.tensor(levels, dtype=torch.float64).T
    assert abs(float(torch.corrcoef(torch.stack([image, audio]))[0, 1])) < 0.2  # 0.99 with shared intervals
    assert float((image - audio).abs().max()) > 0.5
    for stream in (image, audio):
        tenths = (10 * stream).floor().view(30, 10).sort(1).values
        assert torch.equal(tenths, torch.arange(10.0).double().expand(30, 10))


@pytest.mark.parametrize("is_stretched", [False, True])
def test_shifted_logit_normal_has_the_quantiles_of_its_formula(is_stretched: bool) -> None:
    """By the definition: sigmoid(n + mu), stretched, mirrored at 0.001, a tenth of it uniform."""
    rule, count = ShiftedLogit(is_stretched=is_stretched), 40_000
    options = replace(TimestepOptions.from_defaults(), timestep_sampling=SHIFTED_LOGIT)
    spec = NoiseSpec(count_tokens=count_tokens, shifted_logit=rule)
    for shape, mu in (((1, 2, 3, 2, 2), 0.95), ((1, 2, 4, 3), 2.05)):
        generator = torch.Generator().manual_seed(1)
        sigmas = draw(options, count, generator, noise_spec=spec, shape=shape).sigmas
        numbers = torch.Generator().manual_seed(2)
        expected = torch.sigmoid(torch.randn(count, generator=numbers, dtype=torch.float64) + mu)
        if is_stretched:
            low, high = torch.sigmoid(torch.special.ndtri(torch.tensor([0.005, 0.999]).double()) + mu)
            expected = (expected - low) / (high - low)
            expected = torch.where(expected < 1e-3, 2e-3 - expected, expected).clamp(0, 1)
            uniform = torch.rand(2, count, generator=numbers)
            expected = torch.where(uniform[0] < 0.1, 1e-3 + (1 - 1e-3) * uniform[1], expected)
        places = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
        difference = sigmas.double().quantile(places) - expected.quantile(places)
        assert difference.abs().max() < 0.02  # 40,000 draws: a standard error of a quantile is below 0.005


def test_the_line_goes_on_beyond_its_ends_unless_it_is_clamped() -> None:
    assert ShiftedLogit().shift(126) == pytest.approx(1.8747, abs=1e-4)  # mu 0.6285
    assert ShiftedLogit(is_clamped=True).shift(126) == pytest.approx(2.5857, abs=1e-4)
