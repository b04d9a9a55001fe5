"""Build the wheel and the sdist, and install the wheel into an environment of its own.

That environment sees the packages of this one, but not the checkout.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.commands import ROOT, run_program, run_python

BUILD = "import sys; from package import backend; to = sys.argv[1]; backend.build_{kind}(to)"


@dataclass(frozen=True)
class Installed:
    """An environment with the package, and an empty folder to work in."""

    python: Path
    packages: Path  # its site-packages
    folder: Path

    def run(
        self, *words: object, environment: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a console command, or `python`, in the empty folder."""
        program = self.python.with_name(str(words[0]))
        clean = {"PYTHONPATH": "", **(environment or {})}
        return run_program(program, *words[1:], folder=self.folder, environment=clean, check=check)


def build(kind: str, folder: Path) -> Path:
    """Build the wheel or the sdist of the checkout into `folder`. Returns the file."""
    run_python("-c", BUILD.format(kind=kind), folder, folder=ROOT)
    (path,) = folder.iterdir()
    return path


def install(wheel: Path, folder: Path) -> Installed:
    """Install a wheel into a new environment in `folder`."""
    home = folder / "an environment"
    venv.create(home, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run_program(python, "-c", ask).stdout.strip())
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    run_python("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    empty = folder / "an empty folder ü"
    empty.mkdir()
    return Installed(python, packages, empty)
