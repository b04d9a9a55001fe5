"""The environment of the two front doors."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from modules.environment import create_environment, provide_pip
from modules.errors import UserError


def test_a_folder_that_cannot_be_made_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")

    with pytest.raises(UserError, match="a file"):
        create_environment(tmp_path / "a file" / ".venv")


@pytest.mark.slow
def test_an_environment_without_pip_is_given_one(tmp_path: Path) -> None:
    """As an interrupted run leaves it, and as uv makes it; in a folder with a blank in its name."""
    folder = tmp_path / "my project" / ".venv"
    create_environment(folder)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    provide_pip(python)

    assert subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_python_that_cannot_install_pip_is_told_what_to_do(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=sys.platform != "win32")
    python = tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    packages = Path(
        subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    # as Debian leaves it out
    (packages / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")

    with pytest.raises(UserError, match="python3-venv"):
        provide_pip(python)
