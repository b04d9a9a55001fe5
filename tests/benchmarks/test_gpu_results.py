"""What is made of the GPU benchmark's numbers: goals, tables, guesses. The numbers here are made up."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_results import Results, goals_of
from benchmarks.gpu_rows import TRAINING
from benchmarks.gpu_tables import BEGIN, END
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


# The tables


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


# The result file


# How long
