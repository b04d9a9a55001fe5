"""A session on a GPU, tried on a CPU: its order, its files, and how it goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.gpu_checks import Group
from benchmarks.gpu_rows import BY_NAME, ROWS, Row, Size
from benchmarks.gpu_session import (
    LISTS,
    MEASURED,
    Plans,
    RowRunner,
    Session,
    SessionFiles,
    main,
    next_row,
    traits_of,
)
from benchmarks.gpu_steps import PROBES, measure_row, run_probe
from tests.tiny import flux
from tests.tiny.stable_diffusion import write_sd1

CPU = torch.device("cpu")
FIGURES = {
    **{"seconds": 1.0, "spread": 0.0, "calls": 2, "per": 1.0, "whole": 1.0, "warm_up": 1.0},
    **{"operations": 2e12, "model_operations": 1e12, "device": 1 << 30, "planned": 1 << 30},
    **{"host": 0, "loading": 1.0, "loaded": 1e9, "losses": [1.0], "norms": [1.0]},
}


def tiny(name: str, **changes: Any) -> Row:
    row = replace(BY_NAME[name], size=Size(64, 64), text_tokens=7, steps=2, card=0)
    return replace(row, options=tuple(word for word in row.options if word != "--compile"), **changes)


def rows_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["rows"]
    return found


def session_words(folder: Path, *words: str) -> list[str]:
    return ["--output", str(folder), "--device", "cpu", "--parts", "goals", "rows", *words]


@pytest.mark.slow
def test_tiny_rows_are_measured_with_plans_made_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the goal, then what is like nothing that is measured."""
    rows = [tiny("flux-bf16", is_goal=True), tiny("sd1.5-bf16")]
    paths = {
        "flux-bf16": flux.write_dit(tmp_path, flux.tiny_state("dev", dtype=torch.bfloat16)),
        "sd1.5-bf16": write_sd1(tmp_path),
    }
    monkeypatch.setattr("benchmarks.gpu_steps.lay_out", lambda row, folder: (paths[row.name], None))
    output = tmp_path / "session"
    main(["--output", str(output), "--prepare"], rows=rows)
    planned = json.loads((output / "plans.json").read_text(encoding="utf-8"))["rows"]

    def run(row: Row, limit: float) -> dict[str, Any]:
        assert row.planned == planned[row.name]["planned"] > 0
        return measure_row(row, paths[row.name], None, CPU, enough=0)

    main(session_words(output), rows=rows, run_row=run)

    assert list(rows_in(output)) == ["flux-bf16", "sd1.5-bf16"]
    page = (output / "tables.md").read_text(encoding="utf-8")
    (header,) = (line for line in page.splitlines() if line.startswith("| model"))
    assert "| device GiB | planned |" in header
    assert "Stable Diffusion 1.5 | 64x64 | bf16, eager" in page
    assert len([*output.iterdir()]) <= 8
    assert "flux-bf16: about " in capsys.readouterr().out


def test_a_session_goes_on_and_repeats_what_failed_only_when_asked(tmp_path: Path) -> None:
    rows = [BY_NAME["flux-bf16"], BY_NAME["krea2-bf16"]]
    tried: list[str] = []

    def failing(row: Row, limit: float) -> dict[str, Any]:
        tried.append(row.name)
        return {"failed": "out of memory"} if row.name == "krea2-bf16" else FIGURES

    for words in ([], [], ["--again"]):
        main(session_words(tmp_path, *words), rows=rows, run_row=failing)

    assert sorted(tried[:2]) == ["flux-bf16", "krea2-bf16"]
    assert tried[2:] == ["krea2-bf16"]
    assert "out of memory" in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_rows_that_would_end_too_late_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 60 seconds, by a guess."""
    rows = [BY_NAME["load-bf16"]]

    main(session_words(tmp_path, "--seconds", "50"), rows=rows, run_row=lambda row, limit: FIGURES)

    assert not (tmp_path / "rows.json").exists()
    assert "1 others wait for another command" in capsys.readouterr().out


def test_lists_of_rows_run_in_their_order_and_leave_time_for_the_parts_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess for a row without a plan is 90 s; the tests get 200, and 10 are for the device's peaks."""
    ran: list[str] = []
    monkeypatch.setattr(Session, "check", lambda session, seconds, paths: ran.append(f"{seconds:.0f} s"))

    def run(row: Row, limit: float) -> dict[str, Any]:
        ran.append(row.name)
        return FIGURES

    words = ["--output", str(tmp_path), "--device", "cpu", "--check_seconds", "200", "--seconds", "580"]
    words += ["--parts", "waiting", "further", "checks", "long"]
    main([*words, "--dry"], run_row=run)

    said = capsys.readouterr().out
    assert not ran
    assert said.index("1. Rows of waiting") < said.index("2. Rows of further") < said.index("3. Tests marked")
    assert said.count("about 90 s") == 4
    assert f"{LISTS['waiting'][2]}: waits for another command" in said

    main(words, run_row=run)  # rows take no time here, so more of them fit

    assert ran == [*LISTS["waiting"], *LISTS["further"], "200 s", *LISTS["long"]]


def test_the_next_row_is_the_one_that_is_least_like_those_that_are_known() -> None:
    rows = [BY_NAME[name] for name in ("wan14b-bf16-swap30-compiled", "flux-nf4", "h3-int8-swap48-16gib")]

    first = next_row(rows, MEASURED, lambda row: 60.0)
    second = next_row(rows[:2], [*MEASURED, rows[2].name], lambda row: 60.0)

    assert first is rows[2]
    assert second is rows[1]
    assert next_row([], MEASURED, lambda row: 60.0) is None
    assert {"minimax_h3 training", "int8 training", "--blocks_to_swap training"} <= traits_of(rows[2])


def test_rows_that_count_as_measured_or_are_listed_are_there() -> None:
    assert set(MEASURED) | {name for names in LISTS.values() for name in names} <= set(BY_NAME)
    assert len(BY_NAME) == len(ROWS)


def test_plans_of_another_state_of_the_code_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plans.json"
    plan = {"planned": 5.0, "operations": 1e15, "size": 1e9}
    path.write_text(json.dumps({"code": "old", "rows": {"flux-bf16": plan}}), encoding="utf-8")

    assert not Plans.read(path).rows
    assert "of another state of the code" in capsys.readouterr().out

    path.write_text(json.dumps({"code": gpu_session.code_state(), "rows": {"flux-bf16": plan}}), "utf-8")
    plans = Plans.read(path)
    assert plans.with_plan(BY_NAME["flux-bf16"]).planned == 5.0
    assert plans.with_plan(BY_NAME["flux-nf4"]).planned == 0


def test_a_row_that_spoils_the_process_sends_the_others_into_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways: list[str] = []

    def run_here(job: object, row: Row, limit: float) -> dict[str, Any]:
        ways.append("here")
        return {"failed": "AcceleratorError: CUDA error: an illegal memory access was encountered"}

    def run(job: object, row: Row, limit: float) -> dict[str, Any]:
        ways.append("apart")
        return FIGURES

    monkeypatch.setattr("benchmarks.gpu.Job.run_here", run_here)
    monkeypatch.setattr("benchmarks.gpu.Job.run", run)
    runner = RowRunner("cuda")
    for _ in range(2):
        runner(BY_NAME["flux-bf16"], 60)

    assert ways == ["here", "apart"]


@pytest.mark.slow
def test_messages_of_failing_tests_are_written_as_they_come(tmp_path: Path) -> None:
    """Also those of a file that is ended before it is done; what was good is not run again."""
    tests = {
        "test_good.py": "def test_good(): pass\n",
        "test_hanging.py": "import time\ndef test_bad():\n    assert 1 + 1 == 3, 'a wrong sum'\n"
        "def test_endless():\n    time.sleep(600)\n",
    }
    paths = []
    for name, text in tests.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(text, encoding="utf-8")
    (tmp_path / "found").mkdir()
    files = SessionFiles(tmp_path / "found")

    def check(again: bool) -> list[Group]:
        plans = Plans(files.plans, "")
        session = Session(files, plans, 1e12, "cpu", again=again, rows=(), run_row=RowRunner("cpu"))
        session.check(25, paths, markers="")
        return [Group(**group) for group in json.loads(files.checks.read_text(encoding="utf-8"))["groups"]]

    first = check(again=False)
    assert {Path(group.name).name: group.is_good for group in first} == {
        "test_good.py": True,
        "test_hanging.py": False,
    }
    assert files.failures.read_text(encoding="utf-8").count("FAILED test_hanging.py::test_bad") == 1
    second = check(again=True)
    assert [group.seconds for group in second if group.is_good] == [
        group.seconds for group in first if group.is_good
    ]
    assert files.failures.read_text(encoding="utf-8").count("FAILED test_hanging.py::test_bad") == 2


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_a_probe_has_an_answer_on_a_cpu(probe: Any) -> None:
    found = run_probe(probe, "cpu")
    assert "failed" not in found, found["failed"]
    assert len(found) > 1
    assert not found.get("nan")
