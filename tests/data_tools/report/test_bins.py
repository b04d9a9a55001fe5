"""Histograms hold every number once, in bins of round widths."""

import pytest

from data_tools.report.numbers import count_bins


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([5, 5], [(5, 6, 2)]),
        ([1, 2, 2, 4], [(1, 2, 1), (2, 3, 2), (3, 4, 0), (4, 5, 1)]),
        ([0.5, 0.5], [(0, 1, 2)]),
        ([1] * 99 + [1000], [(1, 2, 99), (2, 1000, 1)]),
    ],
)
def test_bins(values: list[float], expected: list[tuple[float, float, int]]) -> None:
    assert [tuple(one.values()) for one in count_bins(values)] == expected
