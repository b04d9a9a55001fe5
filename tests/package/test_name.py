"""The name of the distribution: it is not somebody else's, and a namesake in the same Python is told."""

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from modules import installation
from modules.installation import DISTRIBUTION, NAMESAKE, find_namesake
from runtime.doctor import examine
from tests.commands import ROOT, run_python


def test_the_code_knows_the_name_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION


def test_nobody_else_has_the_name_on_the_index(tmp_path: Path) -> None:
    """Two look-ups, where an index can be reached: of a package that the build needs, and of our name."""
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "0", "--timeout", "10"]
    if run_python("-m", "pip", "--version", check=False).returncode:
        pytest.skip("this Python has no pip")
    download = [*pip, "download", "-q", "--no-deps", "-d", tmp_path]
    if run_python(*download, "setuptools", check=False).returncode:
        pytest.skip("no package index can be reached")
    (tmp_path / next(tmp_path.iterdir())).unlink()
    if run_python(*download, DISTRIBUTION, check=False).returncode:
        return  # the name is free
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        assert "reelsmith/wan_train_network.py" in archive.namelist(), f"{DISTRIBUTION} is another program"


def test_a_namesake_is_told_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_namesake() is None
    (tmp_path / f"{DISTRIBUTION.replace('-', '_')}-0.1.0.dist-info").mkdir()
    assert find_namesake() is None
    (tmp_path / f"{NAMESAKE}-0.2.1.dist-info").mkdir()
    told = "reelsmith 0.2.1 is installed too, another program with the same command: here, type python "
    assert (find_namesake() or "").startswith(f"{told}reelsmith.py")


def test_doctor_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / f"{NAMESAKE}-0.2.1.dist-info").mkdir()
    findings = [finding for finding in examine(tmp_path) if finding.name == "name"]
    assert [finding.text for finding in findings] == [installation.find_namesake()]
    assert findings[0].is_fit
