"""What is made of the GPU benchmark's numbers: goals, tables, guesses. The numbers here are made up."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_results import (
    Results,
    continue_results,
    correction,
    difference,
    expect,
    goals_of,
    plan_error,
    read_results,
)
from benchmarks.gpu_rows import BY_NAME, GENERATION, LATENTS, LOADING, TRAINING
from benchmarks.gpu_tables import BEGIN, END, columns_of, line_of, tables, write_tables
from tests.commands import ROOT

HEAD = {
    "device": "a card",
    "torch": "2.9",
    "date": "2026-01-01",
    "matmul": 8e14,
    "upload": 5e10,
    "copy": 4e12,
}
GIB = 1 << 30


def row(kind: str = TRAINING, **changes: Any) -> dict[str, Any]:
    """A row as the result file has it."""
    usual = {
        **{"kind": kind, "model": "Wan", "size": "8x8", "about": "bf16", "options": [], "took": 90.0},
        **{"seconds": 10.0, "spread": 0.01, "calls": 3, "per": 1.0, "whole": 1.0, "warm_up": 60.0},
        **{"operations": 5e15, "model_operations": 4e15, "device": 50 * GIB, "planned": 51 * GIB},
        **{
            "host": GIB,
            "loading": 14.0,
            "loaded": 28e9,
            "losses": [2.0, 1.9],
            "norms": [1.0],
            "expected": 60.0,
        },
    }
    return {**usual, **changes}


def verdicts(**rows: dict[str, Any]) -> list[str]:
    return [
        str(goal)
        for goal in goals_of(Results(HEAD, {name.replace("_", "-"): one for name, one in rows.items()}))
    ]


def test_without_rows_no_goal_is_met_or_missed() -> None:
    assert [text.partition(":")[0] for text in verdicts()] == ["not measured", "not measured"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (10.0, ("missed: 65% of the bf16 peak in LoRA training of Wan 14B", "(wan14b-bf16 62.5%)")),
        (9.0, ("met: 65% of the bf16 peak in LoRA training of Wan 14B", "(wan14b-bf16 69.4%)")),
    ],
)
def test_the_share_of_the_peak_is_compared_with_its_goal(seconds: float, expected: tuple[str, str]) -> None:
    goal, (start, end) = verdicts(wan14b_bf16=row(seconds=seconds))[0], expected
    assert goal.startswith(start)
    assert goal.endswith(end)


@pytest.mark.parametrize(
    ("changes", "verdict", "found"),
    [
        ({"seconds": 8.0}, "met", "1.25 times, losses 0.00% apart, norms of gradients 10.00% apart"),
        ({"seconds": 8.5}, "missed", "1.18 times, losses 0.00% apart, norms of gradients 10.00% apart"),
        (
            {"seconds": 8.0, "losses": [2.0, 1.8]},
            "missed",
            "1.25 times, losses 5.26% apart, norms of gradients 10.00% apart",
        ),
        (
            {"seconds": 8.0, "losses": []},
            "missed",
            "1.25 times, losses unknown, norms of gradients 10.00% apart",
        ),
    ],
)
def test_fp8_must_be_faster_at_equal_loss(changes: dict[str, Any], verdict: str, found: str) -> None:
    goal = verdicts(wan14b_bf16=row(), wan14b_fp8_products=row(**{"norms": [1.1], **changes}))[1]
    assert goal.startswith(f"{verdict}: wan14b-fp8-products at least 1.2 times")
    assert goal.endswith(f"({found})")


@pytest.mark.parametrize(("seconds", "expected"), [(10.4, "met"), (10.6, "missed")])
def test_swap_may_cost_a_twentieth(seconds: float, expected: str) -> None:
    goal = verdicts(wan14b_bf16_compiled=row(), wan14b_bf16_swap30_compiled=row(seconds=seconds))[1]
    assert goal.startswith(f"{expected}: wan14b-bf16-swap30-compiled at most 5% slower")


def test_the_worst_plan_counts_and_rows_that_failed_do_not() -> None:
    goal = verdicts(wan14b_bf16=row(), gen_flux=row(GENERATION, planned=46 * GIB), gen_x={"failed": "no"})[-1]
    assert goal == "missed: the plan within 7% of the peak in all rows (worst gen-flux: -8.0%)"
    assert plan_error(row(planned=0)) is None


def test_losses_are_compared_step_by_step() -> None:
    assert difference(row(losses=[2.0, 1.0, 9.0]), row(losses=[2.0, 0.8])) == pytest.approx(0.25)
    assert difference(row(losses=[]), row()) is None
    assert difference(row(losses=[0.0, 1.0]), row(losses=[0.0, 1.0])) == 0
    for losses in ([2.0, math.nan], [math.nan, 1.0], [2.0, math.inf]):
        assert difference(row(losses=losses), row(losses=[2.0, 1.0])) == math.inf
        assert difference(row(losses=[2.0, 1.0]), row(losses=losses)) == math.inf
    assert difference(row(losses=[1.0]), row(losses=[0.0])) == math.inf


# The tables


def test_each_kind_of_row_has_a_table_with_its_own_columns() -> None:
    rows = {
        "gen-flux": row(GENERATION, per=5.0, whole=40.0, seconds=25.0),
        "cache-wan-vae": row(LATENTS, per=2.0, seconds=4.0),
        "load-bf16": row(LOADING, per=2.5, seconds=5.0, forgotten=10.0),
        "load-fp8": row(LOADING, per=2.5, seconds=5.0, forgotten=None),
        "wan14b-bf16": row(),
        "wan14b-fp8-weights": {**row(), "failed": "MemoryPlanError: | too large"},
    }

    text = tables(Results(HEAD, rows))

    assert text.splitlines()[0] == (
        "2026-01-01, a card, torch 2.9. Measured in the same run: bf16 matrix product 800 TFLOP/s, "
        "copy on the device 4.0 TB/s read and written, pinned upload 50 GB/s."
    )
    assert (
        "| Wan | 8x8 | bf16 | 10.00 | 500 (62%) | 400 (50%) | 50.0 | 51.0 (+2.0%) | 1.0 | 14 (0.50 a GB) "
        "| 1.0% of 3 | 60 |"
    ) in text
    assert "| Wan | 8x8 | bf16 | 200 for 40 steps (5 measured) | 5.00 | 200 (25%) |" in text
    assert "| Wan | 8x8 | bf16 | 0.50 | clips | 50.0 |" in text
    assert "| Wan | 8x8 | bf16 | 2.00 | 4.00 | 28.0 |" in text
    assert "| Wan | 8x8 | bf16 | 2.00 | - | 28.0 |" in text
    assert "| failed: MemoryPlanError: / too large |" in text
    assert "- not measured: 65%" not in text
    for kind in (TRAINING, GENERATION, LATENTS, LOADING):
        whole = line_of(row(kind, forgotten=None), columns_of(kind), 8e14)
        failed = line_of(row(kind, failed="x"), columns_of(kind), 8e14)
        assert whole.count("|") == failed.count("|") == len(columns_of(kind)) + 4


def test_tables_are_written_between_the_marks_of_the_documents_and_nowhere_else(tmp_path: Path) -> None:
    results = Results(HEAD, path=tmp_path / "gpu.json")
    results.note("wan14b-bf16", row())
    documents = [tmp_path / name for name in ("speed.md", "README.md")]
    shutil.copy(ROOT / "docs" / "speed.md", documents[0])
    shutil.copy(ROOT / "benchmarks" / "README.md", documents[1])
    before = [path.read_text(encoding="utf-8") for path in documents]
    words = ["--tables", str(tmp_path / "gpu.json"), "--documents", *map(str, documents)]

    gpu.main(words)
    gpu.main(words)  # again: instead of what was there

    for path, old in zip(documents, before, strict=True):
        new = path.read_text(encoding="utf-8")
        assert new.count("2026-01-01, a card, torch 2.9") == 1
        assert "| Wan | 8x8 | bf16 | 10.00 |" in new
        assert new.partition(BEGIN)[0] == old.partition(BEGIN)[0]
        assert new.partition(END)[2] == old.partition(END)[2]


def test_a_document_without_marks_is_refused_and_no_other_is_changed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"a\n{BEGIN}\n{END}\nb\n", encoding="utf-8")
    bad.write_text(f"a\n{END}\n{BEGIN}\n", encoding="utf-8")

    with pytest.raises(SystemExit, match=r"bad\.md must have the lines"):
        write_tables([Results(HEAD)], [good, bad])

    assert good.read_text(encoding="utf-8") == f"a\n{BEGIN}\n{END}\nb\n"


# The result file


def test_results_go_on_where_they_ended_but_not_on_another_device(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    continue_results(path, HEAD).note("wan14b-bf16", row())

    later = continue_results(path, {**HEAD, "date": "2026-01-02", "matmul": 7e14})

    assert later.rows["wan14b-bf16"] == row()
    assert (later.head["date"], later.peak) == ("2026-01-02", 7e14)
    with pytest.raises(SystemExit, match="was measured with a card, this is another: give another --output"):
        continue_results(path, {**HEAD, "device": "another"})


def test_a_row_is_compared_with_the_peak_of_its_own_run() -> None:
    kept = row(matmul=1e15)

    assert "| 500 (50%) |" in line_of(kept, columns_of(TRAINING), 8e14)
    assert verdicts(wan14b_bf16=kept)[0].endswith("(wan14b-bf16 50.0%)")


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"gpu\.json is no result file"):
        read_results(tmp_path / "gpu.json")


# How long


def test_a_row_is_expected_to_start_to_load_to_compile_and_to_make_its_calls() -> None:
    plain, compiled = BY_NAME["wan14b-bf16"], BY_NAME["wan14b-bf16-compiled"]

    eager = expect(plain, 4.5e15, 20e9).seconds

    assert eager == 25 + 10 + 10 * (1 + 3)
    assert expect(compiled, 4.5e15, 20e9).seconds == eager + 50
    assert expect(BY_NAME["load-bf16"], 0, 0).seconds == BY_NAME["load-bf16"].seconds


def test_what_rows_took_corrects_what_others_are_expected_to_take() -> None:
    assert correction(Results(HEAD)) == 1
    rows = {"a": row(took=90.0, expected=60.0), "b": row(took=900.0, expected=1.0, failed="x")}
    assert correction(Results(HEAD, rows)) == 1.5
