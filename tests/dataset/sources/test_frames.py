"""Spans and frame dropping, by the numbers of the format."""

from pathlib import Path

import numpy as np
import pytest

from dataset.sources.frames import resample_indices, spans
from tests.dataset.making import make_table


@pytest.mark.parametrize(
    ("mode", "keys", "kept", "expected"),
    [
        ("head", {"target_frames": (9, 17, 25)}, 20, ((0, 9), (0, 17))),
        ("chunk", {"target_frames": (9, 17)}, 40, ((0, 9), (9, 9), (18, 9), (27, 9), (0, 17), (17, 17))),
        ("slide", {"target_frames": (17,), "frame_stride": 8}, 40, ((0, 17), (8, 17), (16, 17))),
        (
            "uniform",
            {"target_frames": (9, 25), "frame_sample": 4},
            40,
            ((0, 9), (10, 9), (20, 9), (31, 9), (0, 25), (5, 25), (10, 25), (15, 25)),
        ),
        ("full", {"max_frames": 129}, 40, ((0, 37),)),
        ("full", {"max_frames": 30}, 40, ((0, 29),)),
        ("full", {"max_frames": 129}, 0, ()),
        ("head", {"target_frames": (17,)}, 12, ()),
        ("uniform", {"target_frames": (9,), "frame_sample": 4}, 10, ((0, 9), (1, 9))),
    ],
)
def test_spans_of_each_mode(tmp_path: Path, mode: str, keys: dict, kept: int, expected: tuple) -> None:
    table = make_table(tmp_path, frame_extraction=mode, **keys)

    assert spans(table, kept) == expected


def test_uniform_starts_are_those_of_numpy(tmp_path: Path) -> None:
    for kept in range(9, 120, 7):
        for sample in (*range(2, 12), *range(max(2, kept - 11), kept - 5), 500):
            table = make_table(tmp_path, frame_extraction="uniform", target_frames=(9,), frame_sample=sample)
            starts = np.linspace(0, kept - 9, sample, dtype=int).tolist()
            assert spans(table, kept) == tuple((start, 9) for start in dict.fromkeys(starts))


def test_a_family_with_another_frame_step_rounds_full_clips_by_it(tmp_path: Path) -> None:
    assert spans(make_table(tmp_path, frame_extraction="full"), 40, frame_step=8) == ((0, 33),)


@pytest.mark.parametrize("source", [None, 8.0, 16.0])
def test_nothing_is_dropped_or_doubled_without_need(source: float | None) -> None:
    assert resample_indices(20, source, 16.0) == tuple(range(20))
