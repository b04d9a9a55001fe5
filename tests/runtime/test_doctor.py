"""tools/doctor.py: what it tells of an environment."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modules.installation import hide_packages
from runtime.doctor import examine
from runtime.machine import MachineGpu, describe_machine, list_shared_lines
from tests.commands import run_python
from tools import doctor


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let packages look as if they were not installed, also those that are loaded."""
    loaded = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        with hide_packages(*names):
            yield
    finally:
        sys.modules.update(loaded)


def test_a_line_for_each_thing_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])

    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert [*said][:5] == ["Python", "packages", "video", "bitsandbytes", "browser"]
    assert [*said][5:6] + [*said][-3:] == ["torch", "compile", "attention", "disk"]
    assert said["Python"].startswith(sys.version.split()[0])
    assert said["torch"].startswith(torch.__version__)
    assert len(said) <= 13


def test_what_is_missing_says_what_it_costs(tmp_path: Path) -> None:
    with without("bitsandbytes"):
        found = {each.name: each for each in examine(tmp_path)}
    assert found["bitsandbytes"].text.startswith("missing: --optimizer_type adamw8bit is refused")
    assert all(each.is_fit for each in found.values())  # nothing else needs it

    with without("uvicorn"):
        found = {each.name: each for each in examine(tmp_path)}
    assert "uvicorn is not installed" in found["packages"].text
    assert not found["packages"].is_fit

    with without("einops"):
        found = {each.name: each for each in examine(tmp_path)}
    assert "einops is not installed" in found["packages"].text
    assert not found["packages"].is_fit


def test_the_lines_to_share_name_no_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USER", "HOSTNAME", "USERPROFILE", "CUDA_VISIBLE_DEVICES", "PATH"):
        monkeypatch.setenv(name, f"/home/zaphod/{name}")
    monkeypatch.setattr(torch, "__version__", "2.99.0a0+zaphod")

    doctor.main(["--share"])

    said = capsys.readouterr().out
    begins = [line.split()[0] for line in said.splitlines()]
    assert begins == ["Reelsmith", "Python", "torch", "GPU:", "Packages:"]
    assert "torch 2.99.0a0," in said
    assert "zaphod" not in said
    assert str(tmp_path) not in said


def test_the_lines_to_share_need_no_packages() -> None:
    done = run_python("-S", Path(doctor.__file__), "--share")
    assert "torch is not installed" in done.stdout
    assert len(done.stdout.splitlines()) == 5


def test_a_gpu_stands_in_the_lines_with_its_memory() -> None:
    info = replace(describe_machine(), gpus=(MachineGpu("Card 9", 24 << 30, "8.9"),), driver="580.1")

    lines = list_shared_lines(info)

    assert lines[2].endswith("driver 580.1")
    assert lines[3] == "GPU: Card 9, 24 GB, capability 8.9"


def test_without_torch_it_says_so_in_three_lines_and_fails() -> None:
    done = run_python("-S", Path(doctor.__file__), check=False)
    assert done.returncode == 1
    assert "torch is not installed" in done.stdout
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == ""


@pytest.mark.slow
def test_bitsandbytes_does_not_tell_what_nobody_asked() -> None:
    pytest.importorskip("bitsandbytes")
    code = "from modules.command import start_logging; start_logging(); import bitsandbytes"
    assert run_python("-c", code, folder=Path(doctor.__file__).parents[1]).stderr == ""
