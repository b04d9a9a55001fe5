"""The quickstart's own work: which steps there are, and how they are announced."""

import sys
from pathlib import Path

import pytest

import quickstart


def test_every_step_is_announced_with_its_number_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)

    quickstart.take_steps(planned := quickstart.Runner(None))
    assert not capsys.readouterr().err

    runner = quickstart.Runner(Path(sys.executable), len(planned.commands))
    runner.run("Doing nothing", ["-c", "pass"])
    runner.run("Doing no more", ["-c", "pass"])

    total = len(planned.commands)
    assert total > 10
    assert capsys.readouterr().err.splitlines() == [
        f"Step 1 of {total}: Doing nothing",
        f"Step 2 of {total}: Doing no more",
    ]
