"""A run that goes on with other settings or clips, and files in its folder that ask it for something."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from modules.errors import OptionError
from tests.training import toy
from training.saving.files import Names
from training.training_run import (
    CHECK_INTERVAL,
    MAX_REQUEST_BYTES,
    SAMPLE,
    SAVE,
    STOP,
    Requests,
    trigger_paths,
)

CHANGED = ["--resume", "latest", "--resume_changed"]


def test_without_a_difference_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ["--save_every_n_steps", 3, "--save_state", *CHANGED]

    assert toy.same(toy.train_toy(tmp_path), toy.train_with_kills(tmp_path, *words, moments=(5,)))


def test_what_differs_is_listed_and_noted_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    file = tmp_path / "output" / "x.safetensors"
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 2)
    more = ["--learning_rate", "1e-3", "--loss_type", "l1"]

    with caplog.at_level(logging.INFO):
        toy.train_toy(tmp_path, *CHANGED, *more, "--max_train_steps", 4, "--save_state")

    lines = ["--learning_rate: 0.01 -> 0.001", "--loss_type: l2 -> l1", "--max_train_steps: 2 -> 4"]
    assert [line.strip() for line in caplog.messages if line.strip() in lines] == lines
    noted = json.loads(toy.metadata_of(file)["ss_resume_changes"])
    assert noted == [f"step 2: {line}" for line in lines]
    toy.train_toy(tmp_path, "--resume", "latest", *more, "--max_train_steps", 5)  # no flag any more
    assert json.loads(toy.metadata_of(file)["ss_resume_changes"]) == noted


@pytest.mark.parametrize(
    ("schedule", "minimum"),
    [
        ("--lr_scheduler cosine", 1e-6),
        ("--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=8", 1e-6),
        ("--optimizer_type AdamWScheduleFree", 1e-2),  # it saves an average
    ],
    ids=["named", "imported", "schedule-free"],
)
def test_the_schedule_of_now_begins_at_the_step_that_was_reached(
    tmp_path: Path, schedule: str, minimum: float
) -> None:
    if "AdamWScheduleFree" in schedule:
        pytest.importorskip("schedulefree")
    toy.write_caches(tmp_path)
    words = schedule.split()
    toy.train_toy(tmp_path, *words, "--save_state", "--max_train_steps", 4)
    still = toy.train_toy(tmp_path, *words, *CHANGED, "--learning_rate", "1e-9", "--max_train_steps", 6)
    moved = toy.train_toy(tmp_path, *words, *CHANGED, "--learning_rate", "1e-1", "--max_train_steps", 6)

    before = toy.state_tensors(tmp_path / "output" / "x-state")["network"]
    changes = [
        max(float((after[name] - before[name]).abs().max()) for name in before) for after in (still, moved)
    ]
    assert changes[0] < minimum
    assert changes[1] > 1e-2


@pytest.mark.parametrize(("stopped", "rest"), [(2, 14), (5, 7)], ids=["in an epoch", "at its end"])
def test_other_clips_begin_the_epoch_again_in_their_own_order(
    tmp_path: Path, stopped: int, rest: int
) -> None:
    """rest: micro-batches of two epochs of seven clips, or of one."""
    toy.write_caches(tmp_path, count=5)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", stopped)
    toy.write_caches(tmp_path, count=7)
    family = toy.ToyFamily()
    epochs = [*CHANGED, "--max_train_epochs", 2, "--save_every_n_steps", 4, "--save_state"]

    last = toy.train_toy(tmp_path, *epochs, family=family)

    assert sum(family.passes) == rest
    state = (tmp_path / "output" / "x-step00000008-state").rename(tmp_path / "x-state")
    # later it goes on exactly, without the option
    assert toy.same(toy.train_toy(tmp_path, "--resume", state, "--max_train_epochs", 2), last)


def test_another_size_of_a_step_goes_on_with_the_clips_that_are_left(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=5)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 1)
    family = toy.ToyFamily()

    toy.train_toy(
        tmp_path, *CHANGED, "--gradient_accumulation_steps", 3, "--max_train_epochs", 2, family=family
    )

    assert sum(family.passes) == 9  # four of the first epoch, in steps of 3 and 1; five of the second


@pytest.mark.parametrize(
    "changed", ["--network_dim 3", "--network_module networks.lora", "--optimizer_type SGD", "--seed 9"]
)
def test_what_cannot_change_is_refused_with_what_to_do(tmp_path: Path, changed: str) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 2)
    name, value = changed.split()

    with pytest.raises(OptionError, match=f"(?s){name}.*--network_weights"):
        toy.train_toy(tmp_path, *CHANGED, name, value, "--learning_rate", 1)


def test_without_it_the_refusal_names_it_only_if_it_would_help(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 2)

    for dim, helps in ((4, True), (3, False)):
        with pytest.raises(OptionError) as error:
            toy.train_toy(tmp_path, "--resume", "latest", "--learning_rate", 1, "--network_dim", dim)
        assert ("--resume_changed" in str(error.value)) is helps


def files_in(folder: Path, can_sample: bool = True) -> tuple[Requests, Callable[[], None]]:
    """What watches the folder of a run x, and what lets a second pass."""
    clock = [0.0]

    def later() -> None:
        clock[0] += CHECK_INTERVAL

    return Requests(trigger_paths(Names(folder, "x"), also_plain=True), can_sample, lambda: clock[0]), later


@pytest.mark.parametrize(
    ("name", "kind"), [("x.sample", SAMPLE), ("sample", SAMPLE), ("x.save", SAVE), ("x.stop", STOP)]
)
def test_a_file_asks_until_it_is_done_and_is_removed_then(tmp_path: Path, name: str, kind: str) -> None:
    triggers, later = files_in(tmp_path)
    other = SAVE if kind == SAMPLE else SAMPLE
    (tmp_path / name).touch()
    assert triggers.is_requested(kind)
    assert not triggers.is_requested(other)
    triggers.finish(other)
    assert triggers.is_requested(kind)
    triggers.finish(kind)
    assert not (tmp_path / name).exists()
    later()
    assert not triggers.is_requested(kind)


def test_a_folder_a_link_and_a_file_with_content_ask_for_nothing_and_stay(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "save").write_bytes(b"x" * (MAX_REQUEST_BYTES + 1))
    if sys.platform != "win32":
        (tmp_path / "x.save").symlink_to(tmp_path / "nothing")
    triggers, _ = files_in(tmp_path)

    assert not triggers.is_requested(SAMPLE)
    assert not triggers.is_requested(SAVE)
    triggers.finish(SAVE)
    assert (tmp_path / "save").exists()


def test_samples_without_prompts_are_refused_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    triggers, later = files_in(tmp_path, can_sample=False)
    (tmp_path / "x.sample").touch()

    assert not triggers.is_requested(SAMPLE)
    later()
    assert not triggers.is_requested(SAMPLE)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--sample_prompts" in caplog.text
    assert not (tmp_path / "x.sample").exists()


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="nobody may remove it there")
def test_a_file_that_cannot_be_removed_is_ignored_until_it_changes(tmp_path: Path) -> None:
    triggers, later = files_in(tmp_path)
    (tmp_path / "save").touch()
    assert triggers.is_requested(SAVE)
    tmp_path.chmod(0o500)
    try:
        triggers.finish(SAVE)
    finally:
        tmp_path.chmod(0o700)
    later()
    assert not triggers.is_requested(SAVE)


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, Tensor]:
    """What a run ends with that nobody asks for anything."""
    toy.write_caches(tmp_path)
    return toy.train_toy(tmp_path)


def asked_for(folder: Path, *names: str) -> toy.ToyFamily:
    """A family whose first step makes these files in the folder of its run."""

    def touch(passes: int) -> None:
        if passes == 0:
            for name in names:
                (folder / name).touch()

    return toy.ToyFamily(watch=touch)


def test_a_run_samples_and_saves_at_the_next_step_and_ends_with_the_same_weights(
    tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    folder, prompts = tmp_path / "asked", toy.write_prompts(tmp_path)
    words = ["--output_dir", folder, "--sample_prompts", prompts, "--sample_now", "--save_state"]

    found = toy.train_toy(tmp_path, *words, family=asked_for(folder, "x.sample", "x.save"))

    saved = ["x-state", "x-step00000001-state", "x-step00000001.safetensors", "x.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["sample", *saved]
    assert [path.name[:8] for path in (folder / "sample").iterdir()] == ["x_000001"]
    assert toy.same(expected, found)


def test_a_run_stops_after_the_step_that_a_file_asks_at_and_goes_on_to_the_same_weights(
    tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    folder = tmp_path / "asked"
    words = ["--output_dir", folder, "--sample_now", "--resume", "latest"]

    toy.train_toy(tmp_path, *words, family=asked_for(folder, "x.stop"))

    saved = ["x-step00000001-state", "x-step00000001.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == saved
    assert toy.same(expected, toy.train_toy(tmp_path, *words))
