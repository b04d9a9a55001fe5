"""Of several processes that train or generate together, one that is killed or stopped ends the others, with a
message; and the same command again ends where it would have ended.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import distributed

from modules.lost_processes import reconnect
from tests.commands import QUIET, ROOT, run_in_processes, start_processes
from tests.faults.runs import DYING, WAN, Scripts, assert_same_tensors, assert_whole, told
from tests.waiting import PATIENCE
from tests.warm_processes import WarmProcess

FAMILIES = (WAN,)
KILLED = -9
MAX_SECONDS = 300  # that the others live on after a kill, on a busy machine; without it 600
WAYS = {"whole": (), "shared": ("--shard_base",)}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

Passed = dict[str, tuple[Path, list[dict[str, int]]]]  # of each way


def command(scripts: Scripts, output: Path, way: str) -> list[str]:
    """A training of two processes; without a page, of which a process that is done may still be writing."""
    script, *words = scripts.train_only
    return [str(ROOT / script), *words, "--no_page", "--output_dir", str(output), *WAYS[way]]


@pytest.fixture(scope="module")
def passed(scripts: Scripts, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Passed:
    """Of each way what a training that nothing happened to wrote, and how often its processes passed which
    point.
    """
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp(way)
        words = command(scripts, folder / "out", way)
        counts = [folder / f"{rank}.json" for rank in range(2)]
        with start_processes([[str(DYING), "count", str(one), *words] for one in counts], project) as started:
            assert [process.wait(timeout=300) for process in started] == [0, 0], started[0].done().stderr
        found[way] = folder / "out", [json.loads(one.read_text(encoding="utf-8")) for one in counts]
    return found


INSTANTS = [(way, number) for way in WAYS for number in range(10)]


@pytest.mark.slow_cases("wan-shared-0")
@pytest.mark.parametrize(
    ("way", "number"),
    [pytest.param(*one, marks=[] if one[1] == 0 else pytest.mark.slow) for one in INSTANTS],
)
def test_training_goes_on_after_a_process_was_killed_as_if_it_had_not_been(
    scripts: Scripts,
    project: Path,
    passed: Passed,
    tmp_path: Path,
    way: str,
    number: int,
) -> None:
    undisturbed, counts = passed[way]
    dice = random.Random(f"{way} {number}")
    lost = dice.randrange(2)
    point = dice.choice([name for name, count in counts[lost].items() if count])
    words = command(scripts, tmp_path / "out", way)
    commands: list[Sequence[str]] = [words, words]
    commands[lost] = [str(DYING), point, str(dice.randint(1, counts[lost][point])), *words]

    with start_processes(commands, project) as started:
        assert started[lost].wait(timeout=300) == KILLED
        assert started[1 - lost].wait(timeout=MAX_SECONDS) == 1
        said = started[1 - lost].done().stderr
    assert said.count("LostProcessError: ") == 1
    assert f"process {lost} (counted from 0) was lost: it was killed" in said
    assert "--resume latest-or-fail" in said or "No state was saved yet" in said
    assert "Traceback" not in said
    assert_whole(tmp_path / "out")

    run_in_processes(2, words[0], *words[1:], folder=project)
    assert_same_tensors(tmp_path / "out" / "x.safetensors", undisturbed / "x.safetensors")
    assert told(tmp_path / "out" / "x-state") == told(undisturbed / "x-state")


def test_generation_ends_with_one_message_and_the_second_process_never_writes(
    scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    script, *words = scripts.generate
    words = [str(ROOT / script), *words, "--save_path", str(tmp_path / "out"), "--shard_base"]
    counted = tmp_path / "counted.json"
    commands = [[str(DYING), "before_rename", "2", *words], [str(DYING), "count", str(counted), *words]]

    with start_processes(commands, project) as started:
        assert started[0].wait(timeout=300) == KILLED
        assert started[1].wait(timeout=MAX_SECONDS) == 1
        said = started[1].done().stderr
    assert said.count("LostProcessError: process 0 (counted from 0) was lost") == 1
    assert "Start the same command again" in said
    assert not any(json.loads(counted.read_text(encoding="utf-8")).values())
    assert len(list((tmp_path / "out").glob("*_latent.safetensors"))) == 1  # finished before


@pytest.mark.slow
@pytest.mark.parametrize(("what", "lost"), [("training", 0), ("generation", 1)])
def test_a_process_that_is_stopped_ends_the_others_within_100_seconds(
    scripts: Scripts, project: Path, tmp_path: Path, what: str, lost: int
) -> None:
    out = tmp_path / "out"
    words = [*command(scripts, out, "whole"), "--max_train_epochs", "10000"]
    if what == "generation":
        script, *given = scripts.generate
        words = [str(ROOT / script), *given, "--save_path", str(out), "--shard_base"]
        (project / "many.txt").write_text("a cat --w 32 --h 32 --f 5 --s 2\n" * 2000, encoding="utf-8")
        words[words.index("prompts.txt")] = "many.txt"
    with start_processes([words, words], project) as started:
        deadline = time.monotonic() + PATIENCE
        while not list(out.glob("*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(started[lost].pid, signal.SIGSTOP)
        assert started[1 - lost].wait(timeout=PATIENCE) == 1
        said = started[1 - lost].done().stderr
    assert said.count(f"LostProcessError: process {lost} (counted from 0) has not answered for 60 s") == 1
    assert "Traceback" not in said


LAUNCHERS = {  # of a way to train
    "whole": "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3",
    "shared": "accelerate.commands.launch --multi_gpu --num_processes 2 --max_restarts 3 "
    "--main_process_port 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", LAUNCHERS)
def test_a_launcher_that_restarts_the_processes_needs_no_hand(
    scripts: Scripts, project: Path, passed: Passed, tmp_path: Path, way: str
) -> None:
    undisturbed, _ = passed[way]
    words = command(scripts, tmp_path / "out", way)
    with subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[way].split(), *words],
        cwd=project,
        env={**os.environ, **QUIET},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / "out" / "x-step00000003.safetensors").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ours = [one for one in children if words[0] in Path(f"/proc/{one}/cmdline").read_text()]
            os.kill(int(ours[way == "whole"]), signal.SIGKILL)  # in order of rank
            _, said = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    assert said.count("LostProcessError: ") == 1
    assert_same_tensors(tmp_path / "out" / "x.safetensors", undisturbed / "x.safetensors")
    assert told(tmp_path / "out" / "x-state") == told(undisturbed / "x-state")


def test_processes_that_are_restarted_meet_where_no_earlier_attempt_did() -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(rank: int) -> str:
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
        environment |= {"RANK": str(rank), "WORLD_SIZE": "3"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        reconnect(environment)
        assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "False"
        return environment["MASTER_PORT"]

    ports = []
    with ThreadPoolExecutor() as pool:
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            waiting = []
            for rank in order:
                waiting.append(pool.submit(meet, rank))
                time.sleep(0.1)
            (port,) = {one.result(timeout=PATIENCE) for one in waiting}
            ports.append(port)
    assert len({*ports, str(store.port)}) == 4


WATCHED = """
import os, sys, time
from torch import distributed
from modules.command import command_line
from modules.lost_processes import OtherProcesses, Pace

def main():
    distributed.init_process_group("gloo")
    pace = Pace(heartbeat_seconds=0.1, timeout_seconds=2, grace_seconds=0.5)
    with OtherProcesses(distributed.get_rank(), 3, pace) as others:
        others.advice = lambda: "Do it again."
        print("joined", flush=True)
        time.sleep(float(sys.argv[1]))
    os._exit(0)

command_line(main)
"""
HOW = {signal.SIGKILL: "was lost: it was killed", signal.SIGSTOP: "has not answered for 2 seconds"}


def write_watched(folder: Path) -> list[str]:
    """Write WATCHED; return how it is started."""
    (folder / "watched.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WATCHED}")
    return [str(folder / "watched.py")]


def wait_until_joined(started: Sequence[WarmProcess]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all("joined" in process.done().stdout for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "lost"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 0)])
def test_processes_that_wait_end_when_one_is_killed_or_stopped(
    tmp_path: Path, number: signal.Signals, lost: int
) -> None:
    with start_processes([[*write_watched(tmp_path), "300"]] * 3, tmp_path) as started:
        wait_until_joined(started)
        os.kill(started[lost].pid, number)
        others = [process for rank, process in enumerate(started) if rank != lost]
        assert [process.wait(timeout=MAX_SECONDS) for process in others] == [1, 1]
        first, second = (process.done().stderr for process in others)
    assert f"LostProcessError: process {lost} (counted from 0) {HOW[number]}" in first
    assert "Do it again." in first
    assert second == ""  # one process tells


def test_processes_that_are_stopped_together_go_on_together(tmp_path: Path) -> None:
    """Ctrl-Z, and fg after longer than a stopped process is waited for."""
    with start_processes([[*write_watched(tmp_path), "4"]] * 3, tmp_path) as started:
        wait_until_joined(started)
        for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0.0)):
            for process in started:
                os.kill(process.pid, number)
            time.sleep(pause)
        assert [process.wait(timeout=PATIENCE) for process in started] == [0, 0, 0]
