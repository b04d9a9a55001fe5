"""docs/cards.md has a cell for each run and card of benchmarks/cards.py."""

from benchmarks.cards import CARDS, RUNS
from tests.commands import ROOT


def test_the_page_has_a_cell_for_each_run_and_card() -> None:
    lines = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8").splitlines()

    for run in (run for runs in RUNS.values() for run in runs):
        [row] = [line for line in lines if line.startswith(f"| {run.about} |")]
        assert len(row.strip("|").split("|")) == len(CARDS) + 1
    assert f"| | {' | '.join(f'{card} GB' for card in CARDS)} |" in lines
