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

from dataset.batches.items import NO_COMMANDS, find_items
from dataset.batches.order import split_validation
from dataset.config import load_dataset_config
from modules.contract.data import CAPTION, FIRST_FRAME, LOSS_MASK, Batch
from modules.contract.family import NoiseSpec
from modules.contract.loading import Placement
from modules.contract.steps import NO_TWEAKS, Tweaks
from modules.errors import DatasetError, OptionError
from modules.options import read_options
from modules.parser import add_options
from tests.golden_cases import read_case
from tests.training.toy import LATENT, ToyFamily, record_encoders, toy_options, train_toy, write_caches
from training.loss import (
    LossRule,
    NoisyBatch,
    compared,
    element_errors,
    find_thresholds,
    measure_errors,
    training_loss,
)
from training.noise_options import PREDICTIONS, LossOptions
from training.run import train_network
from training.run_options import LoopOptions, ValidationOptions
from training.validation import Validation


class Constant(torch.nn.Module):
    """Predicts the same velocity everywhere and remembers what it was fed."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: list[torch.Tensor]) -> torch.Tensor:
        self.noisy, self.timesteps = noisy, timesteps
        return self.value.expand_as(noisy)


def noisy_batch(weights: tuple[float, float] = (1.0, 1.0)) -> NoisyBatch:
    latents = torch.stack([torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 2, 2), 8.0)])
    batch = Batch(
        {"latents": latents, "letters": [torch.ones(1, 1), torch.ones(3, 1)]}, ("a", "b"), ("a", "b")
    )
    noise = torch.full_like(latents, 1.0)
    return NoisyBatch(
        batch, noise, torch.tensor([0.25, 0.5]), torch.tensor([251.0, 501.0]), torch.tensor(weights)
    )


def test_latents_are_scaled_then_mixed_with_noise() -> None:
    dit = Constant(0.0)

    measure_errors(ToyFamily(), dit, noisy_batch(), nullcontext)

    scaled = torch.tensor([4.0, 8.0]) * LATENT.scale
    torch.testing.assert_close(
        dit.noisy[:, 0, 0, 0, 0],
        0.75 * scaled * torch.tensor([1, 0])
        + 0.5 * scaled * torch.tensor([0, 1])
        + torch.tensor([0.25, 0.5]),
    )
    assert dit.timesteps.tolist() == [251.0, 501.0]


class Told(ToyFamily):
    """Notes how many frames its network was told to be given."""

    def predict(self, dit: Any, noisy: Any, timesteps: Any, cond: Any, tweaks: Tweaks = NO_TWEAKS) -> Any:
        self.__dict__["given"] = tweaks.given_frames
        return super().predict(dit, noisy, timesteps, cond)


def test_given_frames_are_clean_and_left_out_of_the_loss() -> None:
    """The mean is over the other frames, also of a mask."""
    batch = noisy_batch()
    latents = batch.batch.tensor("latents").repeat(1, 1, 3, 1, 1) * torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    mask = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    tensors = {**batch.batch.tensors, "latents": latents, LOSS_MASK: mask}
    batch = replace(
        batch, batch=replace(batch.batch, tensors=tensors), noise=torch.ones_like(latents), given_frames=1
    )
    dit, family = Constant(0.5), Told()

    errors = measure_errors(family, dit, batch, nullcontext)

    assert family.__dict__["given"] == 1
    clean = latents * LATENT.scale
    assert torch.equal(dit.noisy[:, :, :1], clean[:, :, :1])
    assert not torch.equal(dit.noisy[:, :, 1:], clean[:, :, 1:])
    each = (0.5 - (1 - clean[:, 0, :, 0, 0])).square()  # B F
    torch.testing.assert_close(errors, (0.5 * each[:, 1] + 0.25 * each[:, 2]) / 2)
    measure_errors(family, dit, replace(batch, given_frames=0), nullcontext)
    assert family.__dict__["given"] == 0


def test_each_sample_counts_its_squared_distance_from_noise_minus_latents() -> None:
    errors = measure_errors(ToyFamily(), Constant(0.5), noisy_batch(), nullcontext)

    assert errors.tolist() == [(0.5 - (1 - 2)) ** 2, (0.5 - (1 - 4)) ** 2]


def test_the_loss_is_float32_where_the_network_computes_in_bf16() -> None:
    errors = measure_errors(
        ToyFamily(dtype=torch.bfloat16), Constant(0.5).bfloat16(), noisy_batch(), nullcontext
    )

    assert errors.dtype == torch.float32


LOSSES, LOSS_TENSORS = read_case("image_losses")
RECORDED = [case for case in LOSSES["cases"] if case["loss_per_sample"] is not None]


@pytest.mark.parametrize(
    "case", RECORDED, ids=lambda case: f"{case['loss_type']} {case['huber_schedule']} {case['huber_c']}"
)
def test_every_loss_is_the_recorded_one(case: dict[str, Any]) -> None:
    options = LossOptions.usual(
        loss_type=case["loss_type"],
        huber_schedule=case["huber_schedule"],
        huber_c=case["huber_c"],
        huber_scale=case["huber_scale"],
    )
    sigmas = torch.tensor(LOSSES["sigma"])
    thresholds = find_thresholds(options, NoiseSpec(), sigmas, 1000 * sigmas)

    errors = (
        element_errors(options, LOSS_TENSORS["model_output"] - LOSS_TENSORS["target"], thresholds)
        .flatten(1)
        .mean(1)
    )

    torch.testing.assert_close(errors, torch.tensor(case["loss_per_sample"]), rtol=1e-5, atol=0)
    if case["threshold"] is not None:
        torch.testing.assert_close(thresholds, torch.tensor(case["threshold"]), rtol=1e-5, atol=0)


def test_the_loss_that_options_ask_for_is_trained() -> None:
    plain = training_loss(ToyFamily(), Constant(0.5), noisy_batch(), nullcontext)
    absolute = training_loss(
        ToyFamily(), Constant(0.5), noisy_batch(), nullcontext, LossRule(LossOptions.usual(loss_type="l1"))
    )
    assert plain.item() == (1.5**2 + 3.5**2) / 2
    assert absolute.item() == (1.5 + 3.5) / 2


def test_places_that_the_mask_leaves_out_do_not_count() -> None:
    drawn = noisy_batch()
    mask = torch.zeros(2, 4, 4)  # of pixels: 2 x 2 of them for each latent
    mask[0, :2, :2] = 1
    mask[1, :, :2] = 0.5
    tensors = {**drawn.batch.tensors, "alpha_mask": mask}

    errors = measure_errors(
        ToyFamily(), Constant(0.5), replace(drawn, batch=replace(drawn.batch, tensors=tensors)), nullcontext
    )

    assert errors.tolist() == [1.5**2 / 4, 3.5**2 / 4]


def test_a_model_with_a_table_is_given_latents_under_noise_and_learns_the_noise() -> None:
    drawn, dit = replace(noisy_batch(), sigmas=torch.tensor([0.5, 10.0])), Constant(0.5)

    errors = measure_errors(ToyFamily(noise=NoiseSpec(table=(0.0,) * 1000)), dit, drawn, nullcontext)

    assert dit.noisy[:, 0, 0, 0, 0].tolist() == [2 + 0.5, 4 + 10]
    assert errors.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_a_mask_of_a_clip_weights_each_latent_and_the_mean_is_over_all(loss_type: str) -> None:
    options = LossOptions.usual(loss_type=loss_type, huber_schedule="constant")
    plain = noisy_batch()
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]], dtype=torch.float16)
    batch = replace(plain.batch, tensors={**plain.batch.tensors, LOSS_MASK: mask})

    whole = measure_errors(ToyFamily(), Constant(0.5), plain, nullcontext, LossRule(options))
    masked = measure_errors(
        ToyFamily(), Constant(0.5), replace(plain, batch=batch), nullcontext, LossRule(options)
    )

    torch.testing.assert_close(masked, whole * torch.tensor([1.5 / 4, 1.0]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_is_the_recorded_one(prediction: str) -> None:
    output, noisy = LOSS_TENSORS["model_output"], LOSS_TENSORS["x_t"]
    sigmas = torch.tensor(LOSSES["sigma"])

    straight = compared(output, noisy, sigmas, prediction, 1.0)
    turned = compared(-output, noisy, sigmas, prediction, -1.0)  # a family turned the output round

    torch.testing.assert_close(straight, LOSS_TENSORS[f"prediction_{prediction}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(-turned, straight)


def test_further_noise_of_the_input_is_not_to_be_predicted() -> None:
    batch, dit = noisy_batch(), Constant(0.5)
    perturbed = replace(batch, perturbation=torch.full_like(batch.noise, 2.0))

    plain = measure_errors(ToyFamily(), dit, batch, nullcontext)
    seen = dit.noisy.clone()
    errors = measure_errors(ToyFamily(), dit, perturbed, nullcontext)

    torch.testing.assert_close(dit.noisy - seen, (2.0 * batch.sigmas).view(2, 1, 1, 1, 1).expand_as(seen))
    assert torch.equal(errors, plain)


@contextmanager
def saying(dit: Constant, value: float) -> Iterator[None]:
    learned = dit.value
    dit.value = torch.nn.Parameter(torch.tensor(value))
    yield
    dit.value = learned


def test_preserved_samples_are_compared_with_the_base_model() -> None:
    """Its prediction is a constant 0.25 here, whatever the latents and the noise are."""
    batch, dit = noisy_batch(), Constant(0.5)
    batch = replace(batch, batch=replace(batch.batch, preserved=(False, True)))

    rule = LossRule(as_base=lambda: saying(dit, 0.25))
    errors = measure_errors(ToyFamily(), dit, batch, nullcontext, rule)

    assert errors.tolist() == [1.5**2, 0.25**2]
    errors.sum().backward()
    assert dit.value.grad is not None


def test_a_teacher_has_its_share_of_the_loss_beside_what_is_preserved() -> None:
    """The model says 0.5, as the base 0.25; the first sample's velocity is -1."""
    batch, dit = noisy_batch(), Constant(0.5)
    batch = replace(batch, batch=replace(batch.batch, preserved=(False, True)))
    rule = LossRule(as_base=lambda: saying(dit, 0.25), teacher_weight=0.25)

    errors = measure_errors(ToyFamily(), dit, batch, nullcontext, rule)

    of_teacher = 0.25 * 0.25**2
    assert errors.tolist() == [0.75 * 1.5**2 + of_teacher, 0.75 * 0.25**2 + of_teacher]
    errors.sum().backward()
    assert dit.value.grad is not None


def test_a_teacher_is_told_dropped_captions_and_the_first_frame() -> None:
    """The frame that only the teacher is given has no part in what is compared with it."""
    seen: list[tuple[float, float, int]] = []

    class Watching(ToyFamily):
        def predict(self, dit: Any, noisy: Any, timesteps: Any, cond: Any, tweaks: Tweaks = NO_TWEAKS) -> Any:
            seen.append((float(cond["letters"][0].mean()), float(noisy[0, 0, 0, 0, 0]), tweaks.given_frames))
            velocity = dit(noisy, timesteps, cond["letters"])
            velocity = velocity.clone()
            velocity[:, :, 0] += 100  # of the first frame, which must not count for what is given
            return velocity

    dit, batch = Constant(0.5), noisy_batch()
    batch = batch.moved(lambda tensor: tensor.repeat(1, 1, 3, 1, 1) if tensor.ndim == 5 else tensor)
    full = {"letters": [torch.full((1, 1), 7.0), torch.ones(3, 1)]}
    batch = replace(batch, batch=replace(batch.batch, undropped=full))
    rule = LossRule(as_base=lambda: saying(dit, 0.75), teacher_weight=1.0)

    errors = measure_errors(Watching(fuller=(CAPTION, FIRST_FRAME)), dit, batch, nullcontext, rule)
    assert errors.tolist() == [0.25**2, 0.25**2]
    assert seen == [(7.0, 4.0 * LATENT.scale, 1), (1.0, 0.75 * 4.0 * LATENT.scale + 0.25, 0)]

    seen.clear()
    measure_errors(Watching(fuller=(CAPTION,)), dit, batch, nullcontext, rule)
    assert [given for *_, given in seen] == [0, 0]


CPU = torch.device("cpu")


def made(
    folder: Path, process: int = 0, processes: int = 1, split: float = 0.4
) -> tuple[Validation, torch.nn.Module]:
    family = ToyFamily()
    found = find_items(load_dataset_config(folder / "dataset.toml"), "toy", LATENT).items
    _, items = split_validation(found, split)
    timesteps = toy_options(folder).timesteps
    return Validation(family, items, timesteps, NO_COMMANDS, CPU, process, processes), family.load_dit(
        Placement(CPU)
    )


def test_bands_go_from_little_to_much_noise_and_their_mean_is_the_loss(tmp_path: Path) -> None:
    write_caches(tmp_path)
    validation, dit = made(tmp_path)

    losses = validation.measure(lambda _: dit, nullcontext)

    bands = [f"validation/loss_{timestep}" for timestep in (100, 300, 500, 700, 900)]
    assert list(losses) == ["validation/loss", *bands]
    assert losses["validation/loss"] == pytest.approx(sum(losses[band] for band in bands) / 5)


def losses_in(text: str) -> list[tuple[str, str]]:
    return re.findall(r"Step (\d+): validation loss (?:[\d.]+ -> )?([\d.]+)", text)


def test_it_is_measured_at_the_start_and_every_n_steps_the_same_for_every_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    firsts = []
    for seed in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train_toy(tmp_path, "--seed", seed, "--validation_split", "0.4", "--validate_every_n_steps", 3)
        found = losses_in(caplog.text)
        assert [step for step, _ in found] == ["0", "3", "6"]
        firsts.append(found[0][1])
    assert firsts[0] == firsts[1]


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
        train_network(ToyFamily(), toy_options(tmp_path))


def test_steps_without_anything_to_validate_on_are_refused(tmp_path: Path) -> None:
    write_caches(tmp_path)

    with pytest.raises(OptionError, match="--validation_split"):
        train_network(ToyFamily(), toy_options(tmp_path, "--validate_every_n_steps", 2))


def test_held_back_caches_of_another_encoder_are_told_of_with_those_that_are_learned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole run: nothing but the validation item differs, and it is told of once, however often it is
    measured.
    """
    write_caches(tmp_path, count=3)
    items = find_items(load_dataset_config(tmp_path / "dataset.toml"), "toy", LATENT).items
    _, (held,) = split_validation(items, 0.3)
    record_encoders(tmp_path, {item.source_stem: "second" if item == held else "first" for item in items})

    train_toy(tmp_path, "--validation_split", 0.3, "--validate_every_n_steps", 2)

    (said,) = (
        message
        for message in caplog.messages
        if message.startswith("Not all caches were made by the same encoders:")
    )
    assert f"{held.caption_path(0)}: letters second" in said
