"""--early_stopping_patience: a run ends once its validation loss is not below its lowest any more."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from modules.errors import OptionError
from tests.training.toy import train_toy, write_caches
from training.features.early_stopping import EarlyStoppingProgress, end_if_no_lower
from training.reports.history import LOSS, history_path, read_history
from training.steps import Progress

# a network that does not change: the first loss that is counted stays the lowest
STILL = ("--learning_rate", 0, "--validation_split", 0.4, "--validate_every_n_steps", 2, "--save_state")


def read_texts(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_run_ends_when_the_loss_is_not_lower_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)

    train_toy(tmp_path, *STILL, "--early_stopping_patience", 2, has_page=True)

    output = tmp_path / "output"
    texts = read_texts(output / "x.safetensors")
    # the loss before the first step does not count: it is of no file
    assert (texts["ss_steps"], texts["ss_ended_early"]) == ("6", "2")
    assert "Ended after step 6 of 8: the validation loss was lowest at step 2" in caplog.text
    assert (output / "x-state").is_dir()
    assert "the lowest so far" not in caplog.text
    history = read_history(history_path(output, "x"), int(texts["ss_session_id"]))
    assert history.ending == ("finished", "good")  # nobody has stopped it


def test_a_loss_above_that_of_the_untrained_model_that_falls_goes_on() -> None:
    losses = {0: 0.1, 2: 0.12, 4: 0.11, 6: 0.105}
    progress = Progress(seed=0, session_id=0, started_at=0)
    requested: list[str] = []
    run: Any = SimpleNamespace(progress=progress, request=lambda phase, reason: requested.append(reason))
    for progress.step, loss in losses.items():
        end_if_no_lower(run, {LOSS: loss}, patience=3)
    assert requested == []
    assert progress.feature_state(EarlyStoppingProgress).lowest_step == 6


def test_measurements_are_counted_across_a_resumed_run_and_epochs(tmp_path: Path) -> None:
    write_caches(tmp_path)
    patience = (*STILL, "--early_stopping_patience", 3, "--save_every_n_steps", 4, "--max_train_steps", 12)

    train_toy(tmp_path, *patience)
    before = read_texts(tmp_path / "output" / "x-step00000004.safetensors")
    (tmp_path / "output" / "x.safetensors").unlink()
    train_toy(tmp_path, *patience, "--resume", tmp_path / "output" / "x-step00000004-state")

    after = read_texts(tmp_path / "output" / "x.safetensors")
    assert "ss_ended_early" not in before
    assert (after["ss_steps"], after["ss_ended_early"]) == ("8", "2")


def test_a_loss_that_falls_ends_nothing(tmp_path: Path) -> None:
    write_caches(tmp_path)

    train_toy(tmp_path, *STILL[2:], "--learning_rate", 1e-2, "--early_stopping_patience", 8)

    texts = read_texts(tmp_path / "output" / "x.safetensors")
    assert texts["ss_steps"] == "8"
    assert "ss_ended_early" not in texts


def test_without_validation_it_is_refused(tmp_path: Path) -> None:
    write_caches(tmp_path)

    with pytest.raises(OptionError, match="needs a validation loss"):
        train_toy(tmp_path, "--early_stopping_patience", 2)
