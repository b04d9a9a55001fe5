"""A run that goes on with other settings or clips: --resume_changed."""

import json
import logging
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from modules.errors import OptionError
from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from training.run import train_network
from training.saving.states import SavedState, read_state

CHANGED = ["--resume", "latest", "--resume_changed"]


def test_without_a_difference_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5)
    expected = train_toy(tmp_path)
    other = ["--output_dir", tmp_path / "stopped", "--save_state"]
    train_network(
        ToyFamily(), toy_options(tmp_path, *other, "--max_train_steps", 8, "--save_every_n_steps", 3)
    )
    for name in ("x-state", "x-step00000006-state"):
        (tmp_path / "stopped" / name).rename(tmp_path / name)

    train_network(ToyFamily(), toy_options(tmp_path, *other, *CHANGED))

    assert same(expected, load_file(tmp_path / "stopped" / "x.safetensors"))


def test_what_differs_is_listed_and_noted_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_state", "--max_train_steps", 2)
    more = ["--learning_rate", "1e-3", "--max_train_steps", 4, "--loss_type", "l1"]

    with caplog.at_level(logging.INFO):
        train_toy(tmp_path, *CHANGED, *more, "--save_state")

    said = [record.getMessage().strip() for record in caplog.records]
    lines = ["--learning_rate: 0.01 -> 0.001", "--loss_type: l2 -> l1", "--max_train_steps: 2 -> 4"]
    assert [line for line in said if line in lines] == lines
    with safe_open(tmp_path / "output" / "x.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["ss_resume_changes"])
    assert noted == [f"step 2: {line}" for line in lines]
    train_toy(
        tmp_path, "--resume", "latest", *more[:2], *more[4:], "--max_train_steps", 5
    )  # no flag any more
    with safe_open(tmp_path / "output" / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_resume_changes"]) == noted


@pytest.mark.parametrize(
    "schedule",
    [
        ["--lr_scheduler", "cosine"],
        ["--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=8"],
        ["--optimizer_type", "AdamWScheduleFree"],
    ],
    ids=["named", "imported", "schedule-free"],
)
def test_the_schedule_of_now_begins_at_the_step_that_was_reached(tmp_path: Path, schedule: list[str]) -> None:
    if "AdamWScheduleFree" in schedule:
        pytest.importorskip("schedulefree")
    write_caches(tmp_path)
    train_toy(tmp_path, *schedule, "--save_state", "--max_train_steps", 4)
    still = train_toy(tmp_path, *schedule, *CHANGED, "--learning_rate", "1e-9", "--max_train_steps", 6)
    moved = train_toy(tmp_path, *schedule, *CHANGED, "--learning_rate", "1e-1", "--max_train_steps", 6)

    state = read_state(tmp_path / "output" / "x-state")
    assert isinstance(state, SavedState)
    before = state.parts["network"]
    changes = [
        max(float((after[name] - before[name]).abs().max()) for name in before) for after in (still, moved)
    ]
    assert changes[0] < (1e-2 if "AdamWScheduleFree" in schedule else 1e-6)  # it saves an average
    assert changes[1] > 1e-2


@pytest.mark.parametrize("stopped", [2, 5], ids=["in an epoch", "at its end"])
def test_other_clips_begin_the_epoch_again_in_their_own_order(tmp_path: Path, stopped: int) -> None:
    write_caches(tmp_path, count=5)
    train_toy(tmp_path, "--save_state", "--max_train_steps", stopped)
    write_caches(tmp_path, count=7)
    family = ToyFamily()
    epochs = [*CHANGED, "--max_train_epochs", 2, "--save_every_n_steps", 4, "--save_state"]

    last = train_toy(tmp_path, *epochs, family=family)

    # the rest: two epochs of seven clips, or one
    assert sum(family.passes) == (14 if stopped == 2 else 7)
    state = tmp_path / "output" / f"x-step{8:08d}-state"
    for folder in (tmp_path / "output").glob("*-state"):
        if folder != state:
            folder.rename(tmp_path / folder.name)
    # later it goes on exactly, without the option
    again = train_toy(tmp_path, "--resume", "latest", "--max_train_epochs", 2)
    assert same(again, last)


def test_another_size_of_a_step_goes_on_with_the_clips_that_are_left(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5)
    train_toy(tmp_path, "--save_state", "--max_train_steps", 1)
    family = ToyFamily()

    train_toy(
        tmp_path, *[*CHANGED, "--gradient_accumulation_steps", 3, "--max_train_epochs", 2], family=family
    )

    assert sum(family.passes) == 9  # four of the first epoch, in steps of 3 and 1; five of the second


@pytest.mark.parametrize(
    "changed",
    [["--network_dim", 3], ["--network_module", "networks.lora"], ["--optimizer_type", "SGD"], ["--seed", 9]],
    ids=lambda changed: str(changed[0]),
)
def test_what_cannot_change_is_refused_with_what_to_do(tmp_path: Path, changed: list[object]) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_state", "--max_train_steps", 2)

    with pytest.raises(OptionError, match=f"(?s){changed[0]}.*--network_weights"):
        train_network(ToyFamily(), toy_options(tmp_path, *CHANGED, *changed, "--learning_rate", 1))


def test_without_it_the_refusal_names_it_only_if_it_would_help(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_state", "--max_train_steps", 2)

    for changed, helps in (
        (["--learning_rate", 1], True),
        (["--learning_rate", 1, "--network_dim", 3], False),
    ):
        with pytest.raises(OptionError) as error:
            train_network(ToyFamily(), toy_options(tmp_path, "--resume", "latest", *changed))
        assert ("--resume_changed" in str(error.value)) is helps
