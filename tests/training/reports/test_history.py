"""What a run has reported survives stops, kills and resumes, and stays small."""

import json
import logging
import math
from pathlib import Path

import pytest

from modules.errors import OutputError
from training.reports.curves import MOST_BINS, BinnedCurve
from training.reports.history import History, SampleRow, open_history

SESSION = 7


def write_history(path: Path, steps: int = 10) -> History:
    history = open_history(path, SESSION, 0)
    history.note_start(0)
    for step in range(1, steps + 1):
        history.note_step(step, 1 / step, {"lr/unet": 1e-4}, 0.5)
        if step % 5 == 0:
            history.note_validation(step, {"validation/loss": 2 / step, "validation/loss_100": 1.0})
            history.note_samples(SampleRow(step, f"{step:06d}", {0: f"x_{step}.mp4"}, {0: "a cat \u00fc"}))
            history.note_saved(step, f"x-step{step}.safetensors")
    history.flush()
    return history


def steps_of(history: History) -> list[float]:
    return [each.step for each in history.loss]


def test_a_resumed_run_has_all_of_its_past(tmp_path: Path) -> None:
    before = write_history(tmp_path / "h.jsonl")

    after = open_history(tmp_path / "h.jsonl", SESSION, 10)

    assert [each.mean for each in after.loss] == pytest.approx([each.mean for each in before.loss])
    assert (after.validations, after.samples, after.saved) == (
        before.validations,
        before.samples,
        before.saved,
    )
    assert after.seconds.mean == 0.5
    assert after.bands.keys() == {"validation/loss_100"}


def test_lines_beyond_the_resumed_state_are_dropped_from_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path)

    resumed = open_history(path, SESSION, 6)
    resumed.note_start(6)
    resumed.note_step(7, 0.25, {})
    resumed.flush()

    again = open_history(path, SESSION, 10)
    assert steps_of(again) == [1, 2, 3, 4, 5, 6, 7]
    assert again.starts == [0, 6]
    assert list(again.saved.values()) == [5]


def test_a_run_that_begins_anew_and_another_run_have_no_past(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path)

    assert steps_of(open_history(path, SESSION, 0)) == []
    assert steps_of(open_history(path, SESSION + 1, 10)) == []
    anew = open_history(path, SESSION + 1, 0)
    anew.note_step(1, 3.0, {})
    anew.flush()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_reading_changes_nothing_until_there_is_something_to_add(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path)
    before = path.read_bytes()

    open_history(path, SESSION, 0)

    assert path.read_bytes() == before


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, left: int) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path, steps=4)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: last + left])

    resumed = open_history(path, SESSION, 4)
    assert steps_of(resumed) == [1, 2, 3]
    resumed.note_step(5, 1.0, {})
    resumed.flush()

    assert steps_of(open_history(path, SESSION, 5)) == [1, 2, 3, 5]


BROKEN = [
    b"\xff\xfe",
    b"[" * 100_000,
    b"{}",
    b"[1]",
    b"null",
    b'{"step": -1, "loss": 1}',
    b'{"step": true, "loss": 1}',
    b'{"step": 1e3, "loss": 1}',
    b'{"step": 3, "loss": "<b>"}',
    b'{"step": 3, "loss": 1e999}',
    b'{"step": 3, "loss": 1, "rates": [1]}',
    b'{"step": 3, "loss": 1, "rates": {"a": "b"}}',
    b'{"step": 3, "samples": "e1", "files": {"../x": "y"}, "prompts": {}}',
    b'{"step": 3, "samples": "e1", "files": {"0": 3}, "prompts": {}}',
    b'{"step": 3, "samples": "e1", "files": {"0": "../../secret.png"}, "prompts": {}}',
    b'{"step": 3, "saved": 5}',
    b'{"step": 3, "saved": "/etc/passwd"}',
    b'{"step": 3, "validation": 5}',
    b"x" * (1 << 21),
]


def test_lines_that_are_not_ours_are_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path, steps=2)
    with path.open("ab") as file:
        file.write(b"\n".join(BROKEN) + b"\n")
        file.write(b'{"step": 4, "loss": 2.5}\n')

    history = open_history(path, SESSION, 10)

    assert steps_of(history) == [1, 2, 4]
    assert history.samples == {}
    (said,) = caplog.messages
    assert "lines cannot be read and are left out" in said


def test_a_history_that_cannot_be_read_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "h.jsonl").mkdir()

    with caplog.at_level(logging.WARNING):
        history = open_history(tmp_path / "h.jsonl", SESSION, 10)

    assert steps_of(history) == []
    assert "the page begins at step 10" in caplog.text
    with pytest.raises(OutputError):
        history.flush()


def test_numbers_that_are_not_finite_are_counted_and_stored_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    history = open_history(path, SESSION, 0)
    for step, loss in enumerate([1.0, math.nan, math.inf, 2.0], 1):
        history.note_step(step, loss, {"lr/unet": math.inf})
    history.note_validation(4, {"validation/loss": math.nan})
    history.flush()

    for each in (history, open_history(path, SESSION, 4)):
        assert (steps_of(each), each.loss.left_out, each.validations) == ([1, 4], 2, {})
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_long_curve_takes_bounded_memory_and_keeps_its_extremes() -> None:
    curve = BinnedCurve()
    for step in range(1, 100_001):
        curve.add(step, 1000.0 if step == 55_555 else -1000.0 if step == 77_777 else 1.0)

    bins = list(curve)
    assert len(bins) <= MOST_BINS
    assert max(each.highest for each in bins) == 1000.0
    assert min(each.lowest for each in bins) == -1000.0
    assert sum(each.count for each in bins) == 100_000
    assert curve.mean == pytest.approx(1.0 + (999 - 1001) / 100_000)
    assert [each.step for each in bins] == sorted(each.step for each in bins)
