"""Steps are timed where they end, and without pauses: shown with a clock that only work moves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.contract.data import Conditions
from modules.contract.steps import NO_TWEAKS, Tweaks
from tests.training.toy import ToyFamily, toy_options, write_caches
from training.loop import train
from training.reports.logs import Moment, Readings
from training.run import prepare_run

STEP, PAUSE = 0.125, 100.0  # seconds: eight steps a second


@dataclass
class WorkClock:
    """Show the seconds that work has taken."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        self.seconds += seconds


class SlowPauses:
    """A toy family whose passes of training take STEP seconds, those of samples and validation PAUSE."""

    def __init__(self, work: Callable[[float], None]) -> None:
        self.work, self.family = work, ToyFamily()

    def __getattr__(self, name: str) -> object:
        return getattr(self.family, name)

    def predict(
        self,
        dit: torch.nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        cond: Conditions,
        tweaks: Tweaks = NO_TWEAKS,
    ) -> torch.Tensor:
        self.work(STEP if torch.is_grad_enabled() else PAUSE)
        return self.family.predict(dit, noisy, timesteps, cond, tweaks)


def steps_per_second(folder: Path, *arguments: object) -> list[float]:
    """What TensorBoard gets of a run in which steps take STEP seconds each."""
    clock = WorkClock()
    options = toy_options(folder, "--logging_dir", folder / "logs", *arguments)
    with prepare_run(SlowPauses(clock.work), options) as run:  # type: ignore[arg-type]
        train(replace(run, readings=Readings(clock)))
    (events,) = (folder / "logs").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [event.value for event in accumulator.Scalars("steps_per_second")]


PAUSES: dict[str, list[object]] = {
    "none": [],
    "saving": ["--save_every_n_steps", 1],
    "saving now and then": ["--save_every_n_steps", 3],
    "validation": ["--validation_split", "0.2", "--validate_every_n_steps", 2],
    "samples": ["--sample_every_n_steps", 3, "--sample_every_n_epochs", 1],
}


@pytest.mark.parametrize("pauses", PAUSES.values(), ids=PAUSES)
def test_steps_per_second_are_those_of_the_steps_whatever_lies_between_them(
    tmp_path: Path, pauses: list[object]
) -> None:
    write_caches(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --s 2\n", encoding="utf-8")
    if "--sample_every_n_steps" in pauses:
        pauses = [*pauses, "--sample_prompts", tmp_path / "prompts.txt"]

    assert steps_per_second(tmp_path, *pauses) == [1 / STEP] * 8


def test_a_cuda_device_measures_between_its_own_events() -> None:
    """The host has run ahead: by its clock no time has passed."""

    class Event:
        def __init__(self, milliseconds: float) -> None:
            self.milliseconds = milliseconds

        def elapsed_time(self, later: "Event") -> float:
            return later.milliseconds - self.milliseconds

    assert Moment(5.0, Event(1000)).seconds_to(Moment(5.0, Event(1250))) == 0.25
    assert Moment(5.0).seconds_to(Moment(7.0)) == 2.0
