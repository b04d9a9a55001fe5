"""A run that is killed at any instant leaves nothing corrupt, and the same command again ends where it would
have ended.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.commands import QUIET, ROOT, run_python, run_script
from tests.faults.run_and_die import POINTS
from tests.faults.runs import (
    DYING,
    Scripts,
    Undisturbed,
    assert_same_caches,
    assert_same_training,
    assert_whole,
    copy_data,
)
from tests.warm_processes import CAN_BE_WARM, WarmProcess

KILLED = 1 if os.name == "nt" else -9
Running = WarmProcess | subprocess.Popen[bytes]
PATIENCE = 300  # seconds until a process that does not go on counts as hanging


def start(project: Path, command: Sequence[str], log: Path) -> Running:
    """Start a script of the project; what it says goes to `log`."""
    script, *arguments = command
    if CAN_BE_WARM:
        return WarmProcess([str(ROOT / script), *arguments], project, QUIET, log, log)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=project,
            env={**os.environ, **QUIET},
            stdout=file,
            stderr=file,
        )


def wait_until(condition: Callable[[], bool], process: Running) -> None:
    """Look often, until it is so or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.002)


def kill_after(process: Running, seconds: float) -> int:
    """Kill a process unless it ends before; returns its exit code."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def kill_once_begun(begin: Callable[[int], Running], has_begun: Callable[[int], bool], log: Path) -> int:
    """Start a run, and kill it from outside at any time after it has begun; return at which attempt.

    A fast machine may end a short run before it is killed: then the next attempt waits a quarter as long.
    """
    for attempt in range(6):
        process = begin(attempt)
        wait_until(lambda attempt=attempt: has_begun(attempt), process)  # type: ignore[misc]
        code = kill_after(process, random.uniform(0, 0.3 / 4**attempt))
        if code == KILLED:
            return attempt
        assert code == 0, log.read_text(encoding="utf-8")
    pytest.fail("no run was killed in time")


# --- training


@pytest.mark.slow_cases("wan-before_rename", "wan-mid_accumulation", "wan-while_sampling")
@pytest.mark.parametrize("point", POINTS)
def test_training_killed_at_a_chosen_point_ends_as_if_it_had_not_been(
    point: str, scripts: Scripts, project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    count = random.Random(f"kill at {point}").randint(1, undisturbed.passed[point])
    command = [*scripts.train, "--output_dir", str(tmp_path / "out")]
    killed = run_python(
        DYING, point, count, ROOT / scripts.train[0], *command[1:], folder=project, check=False
    )
    assert killed.returncode == KILLED, killed.stderr[-3000:]
    assert_whole(tmp_path / "out")
    run_script(*command, folder=project)
    assert_same_training(tmp_path / "out", undisturbed.output)


def test_training_killed_from_outside_ends_as_if_it_had_not_been(
    scripts: Scripts, project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    def command(attempt: int) -> list[str]:
        return [*scripts.train, "--output_dir", str(tmp_path / str(attempt))]

    attempt = kill_once_begun(
        lambda attempt: start(project, command(attempt), tmp_path / "log"),
        lambda attempt: (tmp_path / str(attempt) / "x-step00000003.safetensors").exists(),
        tmp_path / "log",
    )
    output = tmp_path / str(attempt)
    assert_whole(output)
    run_script(*command(attempt), folder=project)
    assert_same_training(output, undisturbed.output)


@pytest.mark.slow
def test_200_random_kills_of_training_change_nothing(
    scripts: Scripts, project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Of runs that are killed again and again until they come to their end.

    Half of the kills come from outside.
    """
    dice = random.Random(200)
    kills, runs = 0, 0
    while kills < 200:
        output = tmp_path / f"run {runs}"
        workers = str(dice.choice([0, 0, 2]))
        command = [*scripts.train, "--output_dir", str(output), "--max_data_loader_n_workers", workers]
        while kills < 200 and _killed(dice, project, undisturbed, command, tmp_path / "log"):
            kills += 1
            if output.exists():
                assert_whole(output)
        run_script(*command, folder=project)
        assert_same_training(output, undisturbed.output)
        shutil.rmtree(output, ignore_errors=True)  # the processes that draw its page may still write there
        runs += 1


def _killed(
    dice: random.Random, project: Path, undisturbed: Undisturbed, command: Sequence[str], log: Path
) -> bool:
    """Run a training that may be killed; returns whether it was."""
    if dice.random() < 0.5:
        code = kill_after(start(project, command, log), dice.uniform(0.2, 1) * undisturbed.seconds)
    else:
        point = dice.choice(POINTS)
        count = dice.randint(1, undisturbed.passed[point])
        code = run_python(
            DYING, point, count, ROOT / command[0], *command[1:], folder=project, check=False
        ).returncode
    assert code in {0, KILLED}
    return code == KILLED


# --- caching


def test_latent_caching_killed_from_outside_goes_on_where_it_was(
    scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    def begin(attempt: int) -> Running:
        config = copy_data(project, tmp_path / str(attempt), cached=False)
        command = [*scripts.cache_latents, "--dataset_config", str(config)]
        return start(project, command, tmp_path / "log")

    def has_begun(attempt: int) -> bool:
        cache = tmp_path / str(attempt) / "cache"
        return cache.is_dir() and any(cache.iterdir())

    folder = tmp_path / str(kill_once_begun(begin, has_begun, tmp_path / "log"))
    cache, data = folder / "cache", ["--dataset_config", str(folder / "dataset.toml")]
    assert_whole(cache)
    run_script(*scripts.cache_latents, *data, folder=project)
    run_script(*scripts.cache_texts, *data, folder=project)
    assert_same_caches(cache, project / "cache")
