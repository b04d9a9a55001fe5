"""Progress bar, and steps that are timed where they end, by a clock that only work moves."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import SGD
from tqdm import tqdm

from modules.options import read_options
from tests.training.toy import ToyFamily, toy_options, write_caches, write_prompts
from training.loop import train
from training.options import TrainingOptions, read_arguments, training_parser
from training.processes import make_accelerator
from training.reports.logs import (
    BAR,
    DelayedReports,
    Logs,
    StepReport,
    name_rates,
    public_config,
)
from training.reports.pauses import MIN_STEPS, SAMPLES, SAVING, STEPS_BETWEEN_WARNINGS, VALIDATION, StepClock
from training.run import prepare_run
from training.run_options import AcceleratorOptions
from training.steps import StepPlan
from training.summary import count_pauses

PLAIN = AcceleratorOptions.from_defaults()


def options(words: str = "", **paths: Path) -> TrainingOptions:
    """The options of a command. paths: options whose value may have a blank."""
    argv = f"--dataset_config d.toml --output_dir out --output_name x {words}".split()
    for name, path in paths.items():
        argv += [f"--{name}", str(path)]
    return read_options(TrainingOptions, read_arguments(training_parser(None), argv, {}))


def test_without_trackers_only_the_bar_moves() -> None:
    out = io.StringIO()
    with Logs(make_accelerator(PLAIN), 10, 4) as logs:
        logs.bar = tqdm(total=10, initial=4, file=out, mininterval=0)
        logs.log_step(StepReport(5, {}, loss=1.0, average=0.123456))
        assert logs.bar.n == 5

    assert "avr_loss=0.1235" in out.getvalue()


def test_the_config_that_is_logged_has_no_keys_and_no_paths() -> None:
    config = public_config(options("--huggingface_token hf_1 --wandb_api_key w_1 --learning_rate 1e-4"))

    told = {"learning_rate": 1e-4, "discrete_flow_shift": 1.0, "network_args": "None"}
    assert {name: config[name] for name in told} == told
    assert not {"huggingface_token", "wandb_api_key", "dataset_config", "output_dir"} & set(config)
    assert all(isinstance(value, (int, float, str)) for value in config.values())


def test_rates_are_named_by_group_and_scaled_where_the_optimizer_estimates_a_factor() -> None:
    optimizer = SGD([{"params": [torch.zeros(1)], "lr": 0.5}, {"params": [torch.ones(1)], "lr": 2.0}], lr=1.0)
    assert name_rates([0.5, 2.0], ("unet", "unet plus"), optimizer) == {"lr/unet": 0.5, "lr/unet plus": 2.0}

    optimizer.param_groups[0]["d"] = 0.1

    assert name_rates([0.5, 2.0], ("unet", "unet plus"), optimizer)["lr/d*lr/unet"] == pytest.approx(0.05)


@pytest.fixture
def clock() -> StepClock:
    """A clock that has seen steps of a second; the first of them does not count."""
    clock = StepClock()
    for step in range(1, MIN_STEPS + 2):
        assert clock.record_step(step, 1.0) is None
    return clock


def test_a_step_of_more_than_twice_the_median_is_told_once_in_a_while(clock: StepClock) -> None:
    assert clock.record_step(20, 2.0) is None  # twice is not more than twice
    line = clock.record_step(21, 3.0)
    assert line is not None
    assert "Step 21 took 3.00 s; 1.00 s are usual for steps with items of this size" in line
    assert clock.record_step(22, 9.0) is None
    assert clock.record_step(21 + STEPS_BETWEEN_WARNINGS, 9.0) is not None


def test_a_step_is_compared_with_steps_of_its_size_and_not_below_a_second(clock: StepClock) -> None:
    for step in range(20, 20 + MIN_STEPS):
        assert clock.record_step(step, 9.0, "large") is None
        assert clock.record_step(step, 0.01, "small") is None
    assert clock.record_step(40, 10.0, "large") is None
    assert clock.record_step(40, 0.9, "small") is None
    assert clock.record_step(41, 30.0, "large") is not None


def test_a_step_with_saving_or_sampling_before_it_does_not_count(clock: StepClock) -> None:
    clock.skips_next_step = True
    assert clock.record_step(20, 100.0) is None
    assert clock.record_step(21, 3.0) is not None


STEP, OTHER = 0.125, 100.0  # seconds: eight steps a second


class SlowPauses:
    """A toy family whose passes of training take STEP seconds, those of samples and validation OTHER."""

    def __init__(self) -> None:
        self.seconds, self.family = 0.0, ToyFamily()

    def __getattr__(self, name: str) -> object:
        return getattr(self.family, name)

    def predict(self, *given: Any, **named: Any) -> torch.Tensor:
        self.seconds += STEP if torch.is_grad_enabled() else OTHER
        return self.family.predict(*given, **named)


@pytest.mark.parametrize(
    "pauses",
    [
        "--save_every_n_steps 1",
        "--save_every_n_steps 3",
        "--validation_split 0.2 --validate_every_n_steps 2",
        "--rest_learned 0.3 --items_every 3",
        "--sample_every_n_steps 3 --sample_every_n_epochs 1 --sample_prompts PROMPTS",
    ],
)
def test_steps_per_second_are_those_of_the_steps_whatever_lies_between_them(
    tmp_path: Path, pauses: str
) -> None:
    """As TensorBoard gets them; steps take STEP seconds each."""
    write_caches(tmp_path)
    prompts = write_prompts(tmp_path)
    words = [str(prompts) if word == "PROMPTS" else word for word in pauses.split()]
    family: Any = SlowPauses()

    with prepare_run(family, toy_options(tmp_path, "--logging_dir", tmp_path / "logs", *words)) as run:
        train(replace(run, delayed_reports=DelayedReports(lambda: family.seconds)))

    (path,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    assert [event.value for event in events.Scalars("steps_per_second")] == [1 / STEP] * 8


def test_what_is_left_counts_the_pauses_to_come_and_the_history_says_what_is_made(tmp_path: Path) -> None:
    write_caches(tmp_path)
    prompts = write_prompts(tmp_path, "a cat --f 1 --s 2 --d 1\n" * 2)
    words = ["--sample_every_n_steps", "3", "--sample_prompts", str(prompts)]
    family: Any = SlowPauses()

    with prepare_run(family, toy_options(tmp_path, *words, has_page=True)) as run:
        run.logs.clock.now = lambda: family.seconds
        train(replace(run, delayed_reports=DelayedReports(lambda: family.seconds)))

    lines = run.reporter.history.path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    left = {values["step"]: values["left"] for values in rows if "left" in values}
    first, second = run.logs.clock.pauses[SAMPLES]  # after steps 3 and 6 of 8
    assert min(first, second) >= OTHER
    assert [left[3], left[4], left[7]] == [5 * STEP, 4 * STEP + first, STEP]
    doing = [values["doing"] for values in rows if "doing" in values]
    assert doing[0] == "sample 1 of 2"
    assert re.fullmatch(r"sample 1 of 2, step 1 of \d+, about .* left", doing[1])
    assert doing[-1] == "saving"


@pytest.mark.parametrize(
    ("words", "step", "epoch", "expected"),
    [
        ("", 5, 1, (0, 0, 1)),
        ("--save_every_n_steps 3 --save_every_n_epochs 1", 5, 1, (0, 0, 3 + 2 + 1)),
        ("--sample_every_n_steps 4", 4, 1, (2, 0, 1)),
        ("--sample_every_n_epochs 2", 4, 1, (2, 0, 1)),
        ("--validate_every_n_steps 2 --save_every_n_epochs 2", 5, 1, (0, 4, 2)),
        ("--validate_every_n_epochs 1", 5, 1, (0, 3, 1)),
    ],
)
def test_pauses_to_come_are_counted_by_kind(
    words: str, step: int, epoch: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """Epochs of 4 steps, and 13 steps in all: the fourth epoch is cut short."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat")
    paths = {"sample_prompts": prompts} if "--sample" in words else {}
    given = options(words, **paths)
    found = count_pauses(given, given.saving, StepPlan(4, 1, 1, 13), validates=True, step=step, epoch=epoch)
    assert tuple(found[kind] for kind in (SAMPLES, VALIDATION, SAVING)) == expected


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (60, "left=75 s"),
        (80, "s/it=0.759, left=75 s, sample=50"),
        (90, "s/it=0.759, left=75 s, mem=10.2G, sample=50"),
        (140, "s/it=0.759, left=75 s, avr_loss=0.2299, lr=0.001, mem=10.2G, sample=50"),
    ],
)
def test_numbers_make_room_for_the_bar(columns: int, shown: str) -> None:
    out, extras = io.StringIO(), {"mem": "10.2G", "sample": "50"}
    with Logs(make_accelerator(PLAIN), 100, extras=lambda _: extras) as logs:
        logs.bar = tqdm(desc="steps", total=100, file=out, ncols=columns, mininterval=0, bar_format=BAR)
        for step in range(1, 9):
            logs.log_step(StepReport(step, {"lr/unet": 0.001}, seconds=0.759, average=0.2299))
        logs.bar.refresh()

    line = out.getvalue().split("\r")[-2]
    assert f", {shown}]" in line
    assert len(line.split("|")[1]) >= 10
    assert len(line) <= columns


def test_a_cuda_device_measures_between_its_own_events() -> None:
    """The host has run ahead: by its clock no time has passed."""

    class Event:
        def __init__(self, milliseconds: float) -> None:
            self.milliseconds = milliseconds

        def synchronize(self) -> None:
            """It has passed."""

        def elapsed_time(self, later: "Event") -> float:
            return later.milliseconds - self.milliseconds

    delayed_reports = DelayedReports(lambda: 5.0)
    delayed_reports.last_time_stamp = Event(1000)
    delayed_reports._pending = (StepReport(1, {}), torch.zeros(2), Event(1250))
    found = delayed_reports.flush()
    assert found is not None
    assert found.seconds == 0.25
