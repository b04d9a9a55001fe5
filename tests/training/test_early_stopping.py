"""--early_stopping_patience: a run ends once its validation loss is not below its lowest any more."""

import logging
from pathlib import Path

import pytest
from safetensors import safe_open

from modules.errors import OptionError
from tests.training.toy import train_toy, write_caches

# a network that does not change: the loss before the first step stays the lowest
STILL = ("--learning_rate", 0, "--validation_split", 0.4, "--validate_every_n_steps", 2, "--save_state")


def read_texts(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_run_ends_when_the_loss_is_not_lower_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)

    train_toy(tmp_path, *STILL, "--early_stopping_patience", 2)

    texts = read_texts(tmp_path / "output" / "x.safetensors")
    assert (texts["ss_steps"], texts["ss_ended_early"]) == ("4", "0")
    assert "Ended after step 4 of 8: the validation loss was lowest at step 0" in caplog.text
    assert (tmp_path / "output" / "x-state").is_dir()


def test_measurements_are_counted_across_a_resumed_run_and_epochs(tmp_path: Path) -> None:
    write_caches(tmp_path)
    patience = (*STILL, "--early_stopping_patience", 3, "--save_every_n_steps", 4)

    train_toy(tmp_path, *patience)
    before = read_texts(tmp_path / "output" / "x-step00000004.safetensors")
    (tmp_path / "output" / "x.safetensors").unlink()
    train_toy(tmp_path, *patience, "--resume", tmp_path / "output" / "x-step00000004-state")

    after = read_texts(tmp_path / "output" / "x.safetensors")
    assert "ss_ended_early" not in before
    assert (after["ss_steps"], after["ss_ended_early"]) == ("6", "0")


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
