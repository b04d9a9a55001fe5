"""--lr_scheduler plateau: torch's ReduceLROnPlateau by the validation loss, resumed to the bit."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

from modules.errors import OptionError
from tests.training.toy import same, train_toy, write_caches
from training.optimizers.lr_schedule import PlateauSchedule, PlateauSettings
from training.reports.history import history_path, read_history, read_session

PLATEAU = ("--lr_scheduler", "plateau", "--lr_scheduler_args", "patience=0", "factor=0.5", "threshold=0.9")
VALIDATION = ("--validation_split", 0.4, "--validate_every_n_steps", 2)


def make_optimizer() -> torch.optim.SGD:
    groups = [{"params": [Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.01)]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize("seed", range(40))
def test_rates_are_those_of_torch(seed: int) -> None:
    draw = random.Random(seed)
    settings: dict[str, Any] = {
        "factor": draw.choice((0.1, 0.5, 0.9)),
        "patience": draw.choice((0, 1, 3)),
        "threshold": draw.choice((0, 1e-4, 0.1)),
        "threshold_mode": draw.choice(("rel", "abs")),
        "cooldown": draw.choice((0, 2)),
        "min_lr": draw.choice((0.0, 0.005, 0.1)),
        "eps": draw.choice((1e-8, 0.3)),
    }
    ours, theirs = make_optimizer(), make_optimizer()
    schedule = PlateauSchedule(ours, PlateauSettings(**settings), warmup=0)
    oracle = ReduceLROnPlateau(theirs, **settings)
    for step in range(1, 60):
        loss = draw.choice((0.1, 0.5, 1.0, draw.random()))
        oracle.step(loss)

        schedule.step()
        schedule.observe(step, loss)

        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]


def test_the_rate_rises_during_the_warm_up_and_a_step_counts_once() -> None:
    schedule = PlateauSchedule(make_optimizer(), PlateauSettings(factor=0.5, patience=0), warmup=4)
    rates = []
    for step in range(1, 7):
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
        if step == 2:
            assert not schedule.observe(step, 1.0)
            assert not schedule.observe(step, 2.0)
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.observe(6, 1.0)
    assert schedule.get_last_lr() == [0.5, 0.005]


def test_the_rate_falls_and_the_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a threshold of 90 % no loss counts as lower: each measurement after the first halves the rate."""
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)

    train_toy(tmp_path, *PLATEAU, *VALIDATION, has_page=True)

    assert "The validation loss is not below" in caplog.text
    path = history_path(tmp_path / "output", "x")
    session = read_session(path)
    assert session is not None
    notes = [text for _, text in read_history(path, session).notes]
    assert [text.rpartition("rate ")[2] for text in notes] == ["0.005", "0.0025", "0.00125"]


@pytest.mark.parametrize(
    ("stop", "every"),
    [
        ("x-step00000006-state", ("--save_every_n_steps", 2)),
        # epochs of three steps: a save, then what was measured at the same step
        ("x-000002-state", ("--save_every_n_epochs", 1, "--validate_every_n_epochs", 1)),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, stop: str, every: tuple[object, ...]) -> None:
    write_caches(tmp_path)
    words = (*PLATEAU, "--validation_split", 0.4, *every, "--save_state", "--max_train_steps", 12)
    if every[0] == "--save_every_n_steps":
        words += VALIDATION[2:]
    whole = train_toy(tmp_path, *words)
    constant = train_toy(tmp_path, *words[6:], "--output_dir", tmp_path / "constant")

    resumed = train_toy(tmp_path, *words, "--resume", tmp_path / "output" / stop)

    assert same(whole, resumed)
    assert not same(whole, constant)


def test_without_validation_it_is_refused(tmp_path: Path) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match="plateau needs a validation loss"):
        train_toy(tmp_path, *PLATEAU)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("factor=1", "between 0 and 1"),
        ("patience=1.5", "whole number"),
        ("cooldown=-1", "from 0 on"),
        ("threshold_mode=most", "use rel"),
        ("mode=max", "no such argument; it has factor, patience, threshold"),
        ("min_lr=low", "use a number"),
    ],
)
def test_a_wrong_argument_is_refused(tmp_path: Path, argument: str, message: str) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match=message):
        train_toy(tmp_path, *PLATEAU[:2], "--lr_scheduler_args", argument, *VALIDATION)
