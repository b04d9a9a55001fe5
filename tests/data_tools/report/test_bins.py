"""Histograms hold every number once, in bins of round widths."""

import random

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


@pytest.mark.parametrize("seed", range(6))
def test_every_number_lies_in_its_bin(seed: int) -> None:
    generator = random.Random(seed)
    values = [round(generator.expovariate(10.0 ** (seed - 3)), 6) for _ in range(500)]

    bins = count_bins(values)

    assert 2 <= len(bins) <= 20
    assert sum(one["count"] for one in bins) == len(values)
    for place, one in enumerate(bins):
        is_last = place == len(bins) - 1
        inside = [one["from"] <= value < one["to"] or is_last and value == one["to"] for value in values]
        assert abs(sum(inside) - one["count"]) <= 1  # an edge such as 0.3 is rounded
        assert is_last or one["to"] == bins[place + 1]["from"]
