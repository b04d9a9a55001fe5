"""A process that is killed is told by one of the others, in one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import QUIET, ROOT
from tests.training.toy import write_caches

SCRIPT = """
import os, signal, sys
from pathlib import Path
from modules.command import command_line
from tests.training.toy import ToyFamily, toy_options
from training.run import train_network

def watch(passes):
    if passes == 4 and os.environ["RANK"] == os.environ["TOY_KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)

def main():
    saving = ["--save_every_n_steps", 2, "--save_state", "--max_train_steps", 50]
    options = toy_options(Path(sys.argv[1]), *saving)
    train_network(ToyFamily(watch=watch), options)

command_line(main)
"""

REFUSED = """
from modules.command import command_line
from modules.errors import OptionError

def main():
    raise OptionError("--x 3: give 4")

command_line(main, needs_packages=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
@pytest.mark.skipif(os.name == "nt", reason="processes meet through gloo, and are killed by a signal")
def test_a_killed_process_is_told_in_one_message_with_the_command_that_goes_on(
    tmp_path: Path, killed: int
) -> None:
    write_caches(tmp_path)
    base = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    base |= {"MASTER_PORT": str(20000 + (os.getpid() + killed) % 20000), "TOY_KILLED": str(killed)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    said = [process.communicate(timeout=300)[1] for process in processes]

    survivor = 1 - killed
    assert processes[killed].returncode == -9
    assert processes[survivor].returncode == 1
    text = said[survivor]
    assert "Traceback" not in text
    assert text.count("LostProcessError: ") == 1
    # who was lost is known only while what the others met through lives: a launcher, here process 0
    assert ("process 1 (counted from 0) was lost" if killed == 1 else "another process of this run") in text
    assert "--resume latest-or-fail" in text


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="torchrun ends processes by a signal")
def test_an_error_that_all_processes_have_is_told_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REFUSED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]

    done = subprocess.run(
        [sys.executable, *launch, str(script)],
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode != 0
    assert done.stderr.count("OptionError: --x 3: give 4") == 1
