"""Run the project's scripts as users do, from any folder."""

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.warm_processes import CAN_BE_WARM, WarmProcess

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 600
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
    return run_python(ROOT / script, *arguments, folder=folder, environment=environment, check=check)


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(ROOT / script), *map(str, arguments)]
    size = str(count)
    everywhere = {**environment, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as said:
        started = []
        for rank in range(count):
            place = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            files = Path(said) / f"out{rank}", Path(said) / f"err{rank}"
            started.append((WarmProcess(command, folder, QUIET, *files, place), *files))
        codes = [process.wait(timeout=MOST_SECONDS) for process, *_ in started]
        texts = [[file.read_text(encoding="utf-8", errors="replace") for file in two] for _, *two in started]
    done = [
        subprocess.CompletedProcess(command, *each)
        for each in zip(codes, *zip(*texts, strict=True), strict=True)
    ]
    assert codes == [code] * count, "\n".join(f"{one.returncode}\n{one.stderr[-3000:]}" for one in done)
    return done


def _run_warm(command: list[str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said) / "out", Path(said) / "err"
        code = WarmProcess(command, folder, QUIET, out, err).wait(timeout=MOST_SECONDS)
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess([sys.executable, *command], code, *texts)


def run_program(
    program: str | Path,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
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
        timeout=MOST_SECONDS,
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
