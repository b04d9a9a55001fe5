"""What the page says of real trainings, in processes of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.browser.serving import Served, serve_runs
from tests.commands import run_script
from tests.faults.runs import WAN, write_project
from tests.faults.test_kill_and_resume import KILLED, Running, kill_after, start, wait_until
from tests.tiny.project import write_dataset


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and clips with their caches."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, WAN)
    run_script(*WAN.cache_latents, folder=folder)
    run_script(*WAN.cache_texts, folder=folder)
    write_dataset(folder, frames="5", batch_size=2, more="num_repeats = 32")
    return folder


def command(output: Path, *words: object) -> Sequence[str]:
    """A training whose epochs are one step, of more than a second."""
    slow = ("--gradient_accumulation_steps", 1000, "--save_every_n_steps", 2, "--sample_now")
    return [*WAN.train, "--output_dir", str(output), *map(str, (*slow, *words))]


def start_until_saved(project: Path, command: Sequence[str], output: Path, step: int) -> Running:
    """A training that has just saved at this step, and is at the next one."""
    output.mkdir()  # it is looked into by now
    process = start(project, command, output.parent / "log")
    wait_until((output / f"x-step{step:08d}.safetensors").exists, process)
    assert process.poll() is None, (output.parent / "log").read_text(encoding="utf-8")
    return process


def tell(served: Served) -> tuple[str, str]:
    """The state of the run in the list, and how its page says that it stands."""
    page = served.ask(served.of("x")).text
    return served.runs.look()[0].state, page.partition('<p class="status">')[2].partition("</span>")[0]


def test_a_killed_run_has_died_and_resumed_it_is_finished(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # a save at each step: when the file of the second is there, the state of the first is whole
    words = ("--max_train_epochs", 3, "--sample_every_n_steps", 2, "--save_every_n_steps", 1)
    process = start_until_saved(project, command(output, *words), output, 2)
    with serve_runs(output) as served:
        assert tell(served)[0] == "running"
        assert kill_after(process, 0) == KILLED

        assert tell(served)[0] == "died"
        assert "died after step" in tell(served)[1]
        assert start(project, command(output, *words), tmp_path / "log").wait(300) == 0
        assert tell(served)[0] == "finished"


def test_a_run_that_is_asked_samples_within_two_steps_and_stops_with_all_saved(
    project: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("--max_train_epochs", 100, "--sample_every_n_steps", 100)
    process = start_until_saved(project, command(output, *words), output, 2)

    def told(kind: str) -> list[dict[str, Any]]:
        rows = (output / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, rows) if kind in row]

    with serve_runs(output) as served:
        assert served.ask(served.of("x", "ask"), "POST", "what=sample", Origin=served.url).status == 204
        wait_until(lambda: bool(told("samples")), process)
        (sampled,) = told("samples")
        assert sampled["step"] <= 4
        name = sampled["files"]["0"]
        assert served.ask(served.of("x", f"sample/{name}")).body[4:8] == b"ftyp"
        assert name in served.ask(served.of("x")).text

        assert served.ask(served.of("x", "ask"), "POST", "what=stop", Origin=served.url).status == 204
        assert process.wait(60) == 0
        (step,) = [row["step"] for row in told("ended")]
        assert step <= sampled["step"] + 2
        assert tell(served)[0] == "stopped"
        assert f"stopped after step {step}" in tell(served)[1]
        assert (output / f"x-step{step:08d}-state").is_dir()
