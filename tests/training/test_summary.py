"""Which micro-batches form a step, the boxes at the start and the end, and the commands that they name."""

import logging
import re
from pathlib import Path

import pytest
import torch

from tests.training.toy import ToyFamily, toy_options, train_toy, write_caches, write_prompts
from training.learner import FULL_MODEL, find_network_spec
from training.previews import describe_run
from training.reports.history import History
from training.reports.pauses import StepClock
from training.run import prepare_run
from training.steps import StepPlan
from training.summary import (
    _make_result_rows,
    count_saves,
    describe_best,
    describe_learning_rate,
    disk_needed,
    judge_alpha,
    next_samples,
    saved_bytes,
)


@pytest.mark.parametrize("position", [0, 4, 7])
def test_groups_after_a_resume_are_the_rest_of_the_epoch(position: int) -> None:
    plan = StepPlan(7, 1, 4, 100)

    assert list(plan.batches_by_step(0, position)) == [
        group for group in plan.batches_by_step(0) if group.start >= position
    ]


def test_the_run_ends_at_its_total_in_the_middle_of_an_epoch() -> None:
    plan = StepPlan(num_batches=6, data_parallel_size=1, accumulation_steps=2, total_steps=4)

    assert plan.num_epochs == 2
    assert list(plan.batches_by_step(1)) == [range(0, 2)]
    assert list(plan.keys(0, 0, 2)) == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1)]
    assert list(plan.batches_by_step(1, 2)) == []


@pytest.mark.parametrize("begin", [(0, 0, 0), (2, 0, 9), (1, 3, 5), (1, 7, 5)])
def test_steps_are_counted_from_where_the_plan_began(begin: tuple[int, int, int]) -> None:
    epoch, position, step = begin
    plan = StepPlan(7, 1, 4, 30, *begin)

    for number in range(epoch, plan.num_epochs):
        for group in plan.batches_by_step(number, position):
            assert plan.steps_until(number, position) == step
            assert {plan.step_of(number, index) for index in group} == {step}  # which warm-ups of tags read
            step, position = step + 1, group.stop
        position = 0
    assert step == plan.total_steps


def test_a_run_says_what_it_does_and_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)

    train_toy(tmp_path, "--validation_split", 0.4, "--validate_every_n_steps", 2, "--save_every_n_steps", 4)

    start, end = (text for text in caplog.messages if text.startswith(("Training x", "x is trained")))
    assert "3 items with repeats, 2 items for validation" in start
    assert "  steps:         8 in 3 epochs of 3" in start
    assert "for 3 saves" in start
    assert f"  result:             {tmp_path / 'output' / 'x.safetensors'} (" in end
    assert "best by validation: step " in end
    assert "8 in " in end
    assert ".html" not in start + end  # the toy has no page
    validations = [text for text in caplog.messages if ": validation loss " in text]
    numbers = [[float(each) for each in re.findall(r"\d\.\d+", text)] for text in validations]
    assert [len(each) for each in numbers] == [1, 2, 2, 2, 2]
    assert [now for *_, now in numbers[:-1]] == [before for before, _ in numbers[1:]]
    assert not [text for text in caplog.messages if re.search(r"process\(es\)|tables", text)]


def test_the_end_repeats_all_that_was_said_about_one_step(tmp_path: Path) -> None:
    write_caches(tmp_path)
    with prepare_run(ToyFamily(), toy_options(tmp_path, has_page=True)) as run:
        run.note("it went back", 3)
        run.note("it went back again", 3)
        rows = _make_result_rows(run, run.reporter.history.run_history)

    assert [row for row in rows if row[0] == "step 3"] == [
        ("step 3", "it went back"),
        ("step 3", "it went back again"),
    ]


@pytest.mark.parametrize(
    ("words", "rate", "alpha"),
    [
        ("", "2e-06, which is LOW for a LoRA: 1e-4 is usual", "acts at 0.0312 of its strength, which is LOW"),
        ("--optimizer_type prodigy --network_alpha 0", "2e-06", "32 for rank 32"),
        ("--learning_rate 1e-4 --network_alpha 16", "0.0001", "0.5 of its strength"),
        ("--learning_rate 1e-2", "0.01, which is HIGH for a LoRA", "LOW: --network_alpha 16 or 32"),
        ("--optimizer_type torch.optim.SGD --learning_rate 1e-2", "0.01", "1 for rank 32"),
    ],
)
def test_a_rate_and_an_alpha_that_were_forgotten_are_judged(
    tmp_path: Path, words: str, rate: str, alpha: str
) -> None:
    # 2e-6 is the default
    options = toy_options(tmp_path, "--learning_rate", "2e-6", "--network_dim", 32, *words.split())

    said = describe_learning_rate(options, find_network_spec(ToyFamily(), options.network))
    assert said == rate if "which" not in rate else said.startswith(rate)
    assert options.network is not None
    assert alpha in str(judge_alpha(options.network))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--learning_rate 5e-5", "5e-05, which is HIGH for a whole model: 1e-5 is usual"),
        ("--learning_rate 1e-5", "1e-05"),
        ("--learning_rate 1e-4 --optimizer_type adafactor", "0.0001"),  # it finds its own rate
        (
            "--learning_rate 1e-4 --optimizer_type adafactor --optimizer_args relative_step=False",
            "0.0001, which is HIGH for a whole model: 1e-5 is usual",
        ),
    ],
)
def test_a_loras_rate_is_high_for_a_whole_model(tmp_path: Path, words: str, expected: str) -> None:
    assert (
        describe_learning_rate(toy_options(tmp_path, *words.split(), full_dit=True), FULL_MODEL) == expected
    )


@pytest.mark.parametrize(
    ("words", "held", "lines"),
    [
        ("--learning_rate 1e-4", 0, []),
        ("--learning_rate 1e-4", 5, ["Each validation measures 5 batches of one item"]),
        (
            "--learning_rate 1e-4 --max_validation_steps 1",
            5,
            ["Each validation measures 1 batch of one item (--max_validation_steps 1)"],
        ),
        ("--learning_rate 1e-2", 0, ["Learning rate: 0.01, which is HIGH for a LoRA: 1e-4 is usual"]),
    ],
)
def test_a_check_tells_of_validation_and_of_an_unusual_rate(
    tmp_path: Path, words: str, held: int, lines: list[str]
) -> None:
    options = toy_options(tmp_path, *words.split())
    assert describe_run(options, find_network_spec(ToyFamily(), options.network), held) == lines


def test_a_resumed_run_counts_its_own_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_state_on_train_end", "--max_train_steps", 5)
    caplog.set_level(logging.INFO)

    train_toy(tmp_path, "--resume", tmp_path / "output" / "x-state")

    assert "8 in 2 epochs of 5, from step 6 on" in caplog.text
    assert "steps:        3 in " in caplog.text


@pytest.mark.parametrize(
    ("words", "files", "states"),
    [
        ("", 1, 0),
        ("--save_every_n_steps 3 --save_state", 3, 3),
        ("--save_every_n_steps 2 --save_last_n_steps 2", 3, 0),
        ("--save_every_n_epochs 1 --save_state_on_train_end", 2, 1),
    ],
)
def test_the_files_of_a_run_are_counted_before(tmp_path: Path, words: str, files: int, states: int) -> None:
    plan = StepPlan(num_batches=5, data_parallel_size=1, accumulation_steps=1, total_steps=8)
    write_caches(tmp_path)
    saving = toy_options(tmp_path, *words.split()).saving

    assert count_saves(saving, plan, 0) == (files, states)

    train_toy(tmp_path, *words.split())
    found = [len([*(tmp_path / "output").glob(pattern)]) for pattern in ("*.safetensors", "*-state")]
    assert found == [files, states]


def test_the_next_samples_are_by_step_or_epoch_whichever_comes_first(tmp_path: Path) -> None:
    times = ["--sample_every_n_steps", 4, "--sample_every_n_epochs", 1]
    options = toy_options(tmp_path, *times, "--sample_prompts", write_prompts(tmp_path)).samples
    # after --resume_changed: epoch 2 began again at step 7, with 5 steps an epoch
    plan = StepPlan(5, 1, 1, total_steps=18, first_epoch=1, first_position=0, first_step=7)

    found = [next_samples(options, plan, *at) for at in ((7, 1), (8, 1), (12, 2), (17, 3))]
    assert found == [8, 12, 16, None]


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path) -> None:
    written = saved_bytes([torch.zeros(10, 10)], torch.bfloat16)
    assert written[0] == 200
    assert saved_bytes([torch.zeros(10, 10)], torch.bfloat16, has_average=True) == (400, 1600)
    assert "TOO LITTLE" not in disk_needed(tmp_path / "new", (2, 1), written)
    assert "TOO LITTLE" in disk_needed(tmp_path, (2, 1), (1 << 60, 1))


def test_the_best_step_is_named_with_its_file(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl", 1)

    def best() -> str:
        return describe_best(history.run_history, tmp_path, "x")

    for step, loss in ((2, 0.5), (4, 0.25), (7, 0.3)):
        history.add(step, validation={"validation/loss": loss})
    assert best() == "step 4, loss 0.25000, not saved"
    for step, name in ((8, "x.safetensors"), (4, "b.safetensors")):
        (tmp_path / name).touch()
        history.add(step, saved=name)
    assert best() == f"step 4, loss 0.25000: {tmp_path / 'b.safetensors'}"
    (tmp_path / "b.safetensors").unlink()
    assert f"not saved; best file: {tmp_path / 'x.safetensors'}" in str(best())


def test_pauses_do_not_count_as_training() -> None:
    clock = StepClock()
    for step, seconds in enumerate((2, 3, 1)):
        clock.record_step(step, seconds)

    assert clock.total_step_seconds == 6
    assert clock.seconds_per_step == 2
