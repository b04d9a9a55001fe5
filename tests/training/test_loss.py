"""The loss, which has a closed form for a network that says a constant, and the validation loss."""

import argparse
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dataset.batches.finding import find_items
from dataset.batches.order import split_validation
from dataset.config import load_dataset_config
from modules.errors import DatasetError
from modules.options import read_options
from modules.parser import add_options
from protocols.data import CAPTION, FIRST_FRAME, LOSS_MASK, Batch
from protocols.family import FLOW, NoiseSpec
from protocols.steps import NO_OVERRIDES, Overrides
from tests.golden_cases import read_case
from tests.training.toy import (
    LATENT,
    ToyFamily,
    around,
    record_encoders,
    toy_options,
    train_toy,
    write_caches,
)
from training.features.output_preservation import preserve
from training.features.teacher_passes import TeacherComparison, TeacherTarget, predict_as_base_model
from training.learning_options import PRESERVE_OUTPUT
from training.loss import PLAIN_LOSS, LossRule, NoisyBatch, convert_velocity, element_errors, find_thresholds
from training.noise_options import PREDICTIONS, LossOptions
from training.run import prepare_run
from training.run_options import LoopOptions, ValidationOptions
from training.targets.passes import compare_with_clip, measure_streams, training_loss


class Constant(torch.nn.Module):
    """Predicts the same velocity everywhere and remembers what it was fed."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, noisy: Tensor, timesteps: Tensor, text: list[Tensor]) -> Tensor:
        self.noisy, self.timesteps = noisy, timesteps
        return self.value.expand_as(noisy)


def noisy_batch(**more: Tensor) -> NoisyBatch:
    """Two samples, whose latents are 2 and 4 in model space; noise is 1. more: tensors of its batch."""
    latents = torch.stack([torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 2, 2), 8.0)])
    tensors = {"latents": latents, "letters": [torch.ones(1, 1), torch.ones(3, 1)], **more}
    batch = Batch(tensors, ("a", "b"), ("a", "b"))
    times = torch.tensor([251.0, 501.0])
    return NoisyBatch(batch, torch.ones_like(latents), torch.tensor([0.25, 0.5]), times, torch.ones(2))


def with_batch(noisy: NoisyBatch, **changes: Any) -> NoisyBatch:
    return replace(noisy, batch=replace(noisy.batch, **changes))


def errors_of(
    noisy: NoisyBatch, dit: torch.nn.Module | None = None, family: Any = None, rule: LossRule = PLAIN_LOSS
) -> Tensor:
    (errors,) = measure_streams(family or ToyFamily(), dit or Constant(), noisy, nullcontext, rule)
    return errors


def test_latents_are_scaled_then_mixed_with_noise() -> None:
    dit = Constant()

    errors_of(noisy_batch(), dit)

    assert dit.noisy[:, 0, 0, 0, 0].tolist() == [0.75 * 2 + 0.25, 0.5 * 4 + 0.5]
    assert dit.timesteps.tolist() == [251.0, 501.0]


class Told(ToyFamily):
    """Notes how many frames its network was told to be given."""

    def predict(
        self, dit: Any, noisy: Any, timesteps: Any, cond: Any, overrides: Overrides = NO_OVERRIDES
    ) -> Any:
        self.__dict__["given"] = overrides.num_clean_frames
        return super().predict(dit, noisy, timesteps, cond)


def test_given_frames_are_clean_and_left_out_of_the_loss() -> None:
    """The mean is over the other frames, also of a mask."""
    latents = noisy_batch().batch.tensor("latents").repeat(1, 1, 3, 1, 1)
    latents = latents * torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    mask = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    plain = noisy_batch(latents=latents, **{LOSS_MASK: mask})
    batch = replace(plain, noise=torch.ones_like(latents), num_clean_frames=1)
    dit, family = Constant(), Told()

    errors = errors_of(batch, dit, family)

    assert family.__dict__["given"] == 1
    clean = latents * LATENT.scale
    assert torch.equal(dit.noisy[:, :, :1], clean[:, :, :1])
    assert not torch.equal(dit.noisy[:, :, 1:], clean[:, :, 1:])
    each = (0.5 - (1 - clean[:, 0, :, 0, 0])).square()  # B F
    torch.testing.assert_close(errors, (0.5 * each[:, 1] + 0.25 * each[:, 2]) / 2)
    errors_of(replace(batch, num_clean_frames=0), dit, family)
    assert family.__dict__["given"] == 0


def test_each_sample_counts_its_squared_distance_from_noise_minus_latents() -> None:
    assert errors_of(noisy_batch()).tolist() == [(0.5 - (1 - 2)) ** 2, (0.5 - (1 - 4)) ** 2]


def test_the_loss_is_float32_where_the_network_computes_in_bf16() -> None:
    errors = errors_of(noisy_batch(), Constant().bfloat16(), ToyFamily(dtype=torch.bfloat16))

    assert errors.dtype == torch.float32


LOSSES, LOSS_TENSORS = read_case("image_losses")
RECORDED = [case for case in LOSSES["cases"] if case["loss_per_sample"] is not None]


@pytest.mark.parametrize(
    "case", RECORDED, ids=lambda case: f"{case['loss_type']} {case['huber_schedule']} {case['huber_c']}"
)
def test_every_loss_is_the_recorded_one(case: dict[str, Any]) -> None:
    names = "loss_type", "huber_schedule", "huber_c", "huber_scale"
    options = LossOptions.from_defaults(**{name: case[name] for name in names})
    sigmas = torch.tensor(LOSSES["sigma"])
    thresholds = find_thresholds(options, NoiseSpec(), sigmas, 1000 * sigmas)

    differences = LOSS_TENSORS["model_output"] - LOSS_TENSORS["target"]
    errors = element_errors(options, NoiseSpec(), differences, sigmas, 1000 * sigmas)

    expected = torch.tensor(case["loss_per_sample"])
    torch.testing.assert_close(errors.flatten(1).mean(1), expected, rtol=1e-5, atol=0)
    if case["threshold"] is not None:
        torch.testing.assert_close(thresholds, torch.tensor(case["threshold"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("loss_type", "expected"), [("l2", (1.5**2 + 3.5**2) / 2), ("l1", (1.5 + 3.5) / 2)])
def test_the_loss_that_options_ask_for_is_trained(loss_type: str, expected: float) -> None:
    rule = LossRule(LossOptions.from_defaults(loss_type=loss_type))
    assert training_loss(ToyFamily(), Constant(), noisy_batch(), nullcontext, rule).item() == expected


def test_places_that_the_mask_leaves_out_do_not_count() -> None:
    mask = torch.zeros(2, 4, 4)  # of pixels: 2 x 2 of them for each latent
    mask[0, :2, :2] = 1
    mask[1, :, :2] = 0.5

    assert errors_of(noisy_batch(alpha_mask=mask)).tolist() == [1.5**2 / 4, 3.5**2 / 4]


def test_a_model_with_a_table_is_given_latents_under_noise_and_learns_the_noise() -> None:
    drawn, dit = replace(noisy_batch(), sigmas=torch.tensor([0.5, 10.0])), Constant()

    errors = errors_of(drawn, dit, ToyFamily(noise=NoiseSpec(table=(0.0,) * 1000)))

    assert dit.noisy[:, 0, 0, 0, 0].tolist() == [2 + 0.5, 4 + 10]
    assert errors.tolist() == [0.25, 0.25]


def test_a_loss_of_an_unknown_name_is_an_error() -> None:
    rule = replace(PLAIN_LOSS, options=replace(PLAIN_LOSS.options, loss_type="smooth_l2"))
    ones = torch.ones(1)

    with pytest.raises(ValueError, match="unknown loss 'smooth_l2'"):
        element_errors(rule.options, FLOW, torch.zeros(1, 2, 1, 4, 4), sigmas=ones, timesteps=ones)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_a_mask_of_a_clip_weights_each_latent_and_the_mean_is_over_all(loss_type: str) -> None:
    rule = LossRule(LossOptions.from_defaults(loss_type=loss_type, huber_schedule="constant"))
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]], dtype=torch.float16)

    full = errors_of(noisy_batch(), rule=rule)
    masked = errors_of(noisy_batch(**{LOSS_MASK: mask}), rule=rule)

    torch.testing.assert_close(masked, full * torch.tensor([1.5 / 4, 1.0]))


@pytest.mark.parametrize("prediction", PREDICTIONS[1:])  # the first one is the output itself
def test_every_prediction_is_the_recorded_one(prediction: str) -> None:
    output, noisy = LOSS_TENSORS["model_output"], LOSS_TENSORS["x_t"]
    sigmas = torch.tensor(LOSSES["sigma"])

    straight = convert_velocity(output, noisy, sigmas, prediction, 1.0)
    turned = convert_velocity(-output, noisy, sigmas, prediction, -1.0)  # a family turned the output round

    torch.testing.assert_close(straight, LOSS_TENSORS[f"prediction_{prediction}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(-turned, straight)


def test_further_noise_of_the_input_is_not_to_be_predicted() -> None:
    batch, dit = noisy_batch(), Constant()

    plain = errors_of(batch, dit)
    seen = dit.noisy.clone()
    errors = errors_of(replace(batch, perturbation=torch.full_like(batch.noise, 2.0)), dit)

    torch.testing.assert_close(dit.noisy - seen, (2.0 * batch.sigmas).view(2, 1, 1, 1, 1).expand_as(seen))
    assert torch.equal(errors, plain)


@contextmanager
def saying(dit: Constant, value: float) -> Iterator[None]:
    learned = dit.value
    dit.value = torch.nn.Parameter(torch.tensor(value))
    yield
    dit.value = learned


# of the errors of two samples, of which the second is preserved
@pytest.mark.parametrize(
    ("teacher_weight", "expected"),
    [(0.0, [1.5**2, 0.25**2]), (0.25, [0.75 * 1.5**2 + 0.25 * 0.25**2, 0.25**2])],
)
def test_preserved_samples_and_a_teachers_share_are_compared_with_the_base_model(
    teacher_weight: float, expected: list[float]
) -> None:
    """Its prediction is a constant 0.25 here, whatever the latents and the noise are."""
    batch, dit = with_batch(noisy_batch(), attributes=(frozenset(), frozenset({PRESERVE_OUTPUT}))), Constant()

    teaching = TeacherComparison(TeacherTarget(teacher_weight), predict_as_base_model)
    rule = LossRule(
        as_base=lambda: saying(dit, 0.25),
        list_comparisons=around(compare_with_clip, preserve, *([teaching.compare] if teacher_weight else [])),
    )
    errors = errors_of(batch, dit, rule=rule)

    assert errors.tolist() == expected
    errors.sum().backward()
    assert dit.value.grad is not None


def test_a_teacher_is_told_dropped_captions_and_the_first_frame() -> None:
    """The frame that only the teacher is given has no part in what is compared with it."""
    seen: list[tuple[float, float, int]] = []

    class Watching(ToyFamily):
        def predict(
            self, dit: Any, noisy: Any, timesteps: Any, cond: Any, overrides: Overrides = NO_OVERRIDES
        ) -> Any:
            seen.append(
                (float(cond["letters"][0].mean()), float(noisy[0, 0, 0, 0, 0]), overrides.num_clean_frames)
            )
            velocity = dit(noisy, timesteps, cond["letters"]).clone()
            velocity[:, :, 0] += 100  # of the first frame, which must not count for what is given
            return velocity

    dit = Constant()
    batch = noisy_batch().moved(lambda tensor: tensor.repeat(1, 1, 3, 1, 1) if tensor.ndim == 5 else tensor)
    batch = with_batch(batch, undropped={"letters": [torch.full((1, 1), 7.0), torch.ones(3, 1)]})
    teaching = TeacherComparison(TeacherTarget(1.0), predict_as_base_model)
    rule = LossRule(
        as_base=lambda: saying(dit, 0.75), list_comparisons=around(compare_with_clip, teaching.compare)
    )

    errors = errors_of(batch, dit, Watching(teacher_only_conditions=(CAPTION, FIRST_FRAME)), rule)
    assert errors.tolist() == [0.25**2, 0.25**2]
    assert seen == [(7.0, 4.0 * LATENT.scale, 1), (1.0, 0.75 * 4.0 * LATENT.scale + 0.25, 0)]

    seen.clear()
    errors_of(batch, dit, Watching(teacher_only_conditions=(CAPTION,)), rule)
    assert [given for *_, given in seen] == [0, 0]


def test_bands_go_from_little_to_much_noise_and_their_mean_is_the_loss(tmp_path: Path) -> None:
    write_caches(tmp_path)

    with prepare_run(ToyFamily(), toy_options(tmp_path, "--validation_split", "0.4")) as run:
        assert run.validation is not None
        losses = run.validation.measure(run.model.dits.on_device, run.autocast)

    bands = [f"validation/loss_{timestep}" for timestep in (100, 300, 500, 700, 900)]
    assert list(losses) == ["validation/loss", *bands]
    assert losses["validation/loss"] == pytest.approx(sum(losses[band] for band in bands) / 5)


def losses_in(text: str) -> list[tuple[str, str]]:
    return re.findall(r"Step (\d+): validation loss (?:[\d.]+ -> )?([\d.]+)", text)


def test_it_is_measured_at_the_start_and_every_n_steps_the_same_for_every_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)
    for seed in (1, 2):
        train_toy(tmp_path, "--seed", seed, "--validation_split", "0.4", "--validate_every_n_steps", 3)

    found = losses_in(caplog.text)
    assert [step for step, _ in found] == ["0", "3", "6"] * 2
    assert found[0] == found[3]


def test_without_a_number_of_steps_it_is_measured_after_epochs_that_leave_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path, count=5)

    with caplog.at_level(logging.INFO):  # four items are left to train on
        train_toy(tmp_path, "--validation_split", "0.2")
        train_toy(tmp_path, "--validation_split", "0.2", "--save_every_n_epochs", "1")

    assert [step for step, _ in losses_in(caplog.text)] == ["0", "8", "0", "4", "8"]


@pytest.mark.parametrize(
    ("words", "steps", "due"),
    [
        ((), 5, [50, 100]),  # epochs of five steps
        ((), 60, [60, 120]),
        ((), 120, [120]),
        (("--validate_every_n_epochs", "7"), 5, [35, 70, 105]),
        (("--validate_every_n_steps", "5"), 5, []),  # and after steps
    ],
)
def test_short_epochs_are_not_all_validated(words: tuple[str, ...], steps: int, due: list[int]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, LoopOptions, ValidationOptions)
    options = read_options(ValidationOptions, parser.parse_args(words))
    ends = [(epoch, epoch * steps) for epoch in range(1, 120 // steps + 1)]
    assert [end for epoch, end in ends if options.is_due_after_epoch(epoch, end, steps, False)] == due
    is_asked = options.validate_every_n_epochs is not None or options.validate_every_n_steps is not None
    assert options.is_due_after_epoch(1, steps, steps, is_saved=True) is not is_asked


def test_a_table_marked_for_validation_is_not_trained_on(tmp_path: Path) -> None:
    write_caches(tmp_path, more="validation = true")

    with pytest.raises(DatasetError, match="validation = true"):
        train_toy(tmp_path)


def test_held_back_caches_of_another_encoder_are_told_of_with_those_that_are_learned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the validation item differs, and it is told of once, however often it is measured."""
    write_caches(tmp_path, count=3)
    items = find_items(load_dataset_config(tmp_path / "dataset.toml"), "toy", LATENT).items
    _, (held,) = split_validation(items, 0.3)
    record_encoders(tmp_path, {item.source_stem: "second" if item == held else "first" for item in items})

    train_toy(tmp_path, "--validation_split", 0.3, "--validate_every_n_steps", 2)

    (said,) = (text for text in caplog.messages if "were made by the same encoders:" in text)
    assert f"{held.caption_path(0)}: letters second" in said
