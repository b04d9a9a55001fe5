"""The validation loss: fixed noise and timesteps, so that its values can be compared."""

import argparse
import logging
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dataset.batches.items import NO_COMMANDS, find_items
from dataset.batches.order import split_validation
from dataset.config import load_dataset_config
from modules.contract.loading import Placement
from modules.errors import DatasetError, OptionError
from modules.options import read_options
from modules.parser import add_options
from tests.training.toy import LATENT, ToyFamily, record_encoders, toy_options, train_toy, write_caches
from training.run import train_network
from training.run_options import LoopOptions, ValidationOptions
from training.validation import Validation

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
    assert f"{held.text_path}: letters second" in said
