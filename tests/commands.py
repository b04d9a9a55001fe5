"""Run the project's scripts as users do, from any folder."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from modules.installation import FRONT_SCRIPT, PREFIX, program_words
from tests.warm_processes import CAN_BE_WARM, WarmProcess

ROOT = Path(__file__).resolve().parent.parent
MAX_SECONDS = 600
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUTF8": "1",
    "ACCELERATE_USE_CPU": "true",
}


def typed_there(said: str) -> str:
    """What a script printed as if it had been typed in its folder: commands begin where theirs did."""
    folder = re.escape(f"{ROOT}{os.sep}")
    return re.sub(rf"""python (?:{folder}|(["']){folder}([^"']*)\1)""", r"python \2", said)


def run_script(
    script: str,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a root script in a process of its own; with `check` a failure shows its output."""
    words = ["-m", "reelsmith"] if PREFIX and script == FRONT_SCRIPT else program_words(Path(script))
    return run_python(*words, *arguments, folder=folder, environment=environment, check=check)


def run_python(
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments, a script with its libraries loaded before if that is possible here."""
    if CAN_BE_WARM and environment is None and str(arguments[0]).endswith(".py"):
        return _checked(_run_warm([str(each) for each in arguments], folder), check)
    return run_program(sys.executable, *arguments, folder=folder, environment=environment, check=check)


def run_in_processes(
    count: int,
    script: str,
    *arguments: object,
    folder: Path,
    code: int = 0,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[subprocess.CompletedProcess[str]]:
    """Run a root script as a launcher of several processes does; return what each of them said.

    code: how all of them end.
    """
    command = [str(ROOT / script), *map(str, arguments)]
    with start_processes([command] * count, folder, environment) as started:
        for process in started:
            process.wait(timeout=MAX_SECONDS)
        done = [process.done() for process in started]
    codes = [one.returncode for one in done]
    assert codes == [code] * count, "\n".join(f"{one.returncode}\n{one.stderr[-3000:]}" for one in done)
    return done


@contextmanager
def start_processes(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[list[WarmProcess]]:
    """Start a script as each process of a launcher; those that run at the end of the block are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(commands))
    everywhere = {**environment, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    started: list[WarmProcess] = []
    with tempfile.TemporaryDirectory() as said:
        try:
            for rank, command in enumerate(commands):
                place = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                files = Path(said) / f"out{rank}", Path(said) / f"err{rank}"
                started.append(WarmProcess(command, folder, QUIET, *files, place))
            yield started
        finally:
            for process in started:
                process.kill()


def _run_warm(command: list[str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as said:
        process = WarmProcess(command, folder, QUIET, Path(said) / "out", Path(said) / "err")
        process.wait(timeout=MAX_SECONDS)
        return process.done()


def run_program(
    program: str | Path,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    max_seconds: float = MAX_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run any program with arguments."""
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **QUIET, **(environment or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=max_seconds,
    )
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check:
        assert done.returncode == 0, (
            f"{done.args[1]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    done.stdout, done.stderr = typed_there(done.stdout), typed_there(done.stderr)
    return done


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The program ended with code 1 or 2, no traceback, and a message that holds all the words."""
    assert done.returncode in {1, 2}, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr[-3000:]}"


def joined(words: Sequence[str]) -> set[str]:
    """Options with their single value behind an equals sign, as `--seed=1`, and switches; of a list the
    first.
    """
    options: list[str] = []
    for word in words:
        if word.startswith("--"):
            options.append(word)
        elif options and "=" not in options[-1]:
            options[-1] += f"={word}"
    return set(options)
