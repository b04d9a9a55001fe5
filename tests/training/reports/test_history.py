"""What a run has reported survives stops, kills and resumes, and stays small."""

import json
import logging
import math
import os
from pathlib import Path

import pytest

from modules.errors import OutputError
from training.reports.drawing import draw_page, is_page_current
from training.reports.history import LOSS, History, RunHistory, history_path, read_history
from training.reports.page import MAX_BINS, join_bins
from training.reports.sections import page_path

SESSION = 7


def write_history(path: Path, steps: int = 10) -> History:
    history = History(path, SESSION)
    history.add(0, started=True)
    for step in range(1, steps + 1):
        history.add(step, loss=1 / step, rates={"lr/unet": 1e-4}, seconds=0.5)
        if step % 5 == 0:
            losses = {"validation/loss": 2 / step, "validation/loss_100": 1.0}
            history.add(step, validation=losses)
            texts = {"files": {"0": f"x_{step}.mp4"}, "prompts": {"0": "a cat \u00fc"}}
            history.add(step, samples=f"{step:06d}", **texts)
            history.add(step, saved=f"x-step{step}.safetensors")
    history.flush()
    return history


def steps_of(history: History) -> list[int]:
    history.flush()
    return [*read_history(history.path, history.session).loss]


def test_a_resumed_run_has_all_of_its_past(tmp_path: Path) -> None:
    before = read_history(write_history(tmp_path / "h.jsonl").path, SESSION)

    resumed = History(tmp_path / "h.jsonl", SESSION, 10)
    resumed.flush()

    after = read_history(resumed.path, resumed.session)
    assert after == before
    assert (after.seconds[1], after.validations_by_level.keys()) == (0.5, {"validation/loss_100"})
    assert after.samples[5, "000005"].files == {0: "x_5.mp4"}
    told = resumed.run_history
    assert (told.validations, told.saved) == (after.validations, after.saved)


def test_lines_beyond_the_resumed_state_are_dropped_from_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path)

    resumed = History(path, SESSION, 6)
    resumed.add(6, started=True)
    resumed.add(7, loss=0.25)
    resumed.flush()

    again = History(path, SESSION, 10)
    assert steps_of(again) == [1, 2, 3, 4, 5, 6, 7]
    assert [*read_history(again.path, again.session).starts] == [0, 6]
    assert list(read_history(again.path, again.session).saved.values()) == [5]


@pytest.mark.parametrize(("session", "step"), [(SESSION, 0), (SESSION + 1, 10), (SESSION + 1, 0)])
def test_a_run_that_begins_anew_and_another_run_have_no_past(tmp_path: Path, session: int, step: int) -> None:
    write_history(tmp_path / "h.jsonl")

    anew = History(tmp_path / "h.jsonl", session, step)
    anew.add(1, loss=3.0)

    assert steps_of(anew) == [1]
    assert anew.run_history == RunHistory()


@pytest.mark.parametrize("left", [1, 8, 22, 43])
def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, left: int) -> None:
    path = tmp_path / "h.jsonl"
    write_history(path, steps=4)
    full = path.read_bytes()
    path.write_bytes(full[: full.rstrip(b"\n").rfind(b"\n") + 1 + left])

    resumed = History(path, SESSION, 4)
    assert steps_of(resumed) == [1, 2, 3]
    resumed.add(5, loss=1.0)
    resumed.flush()

    assert steps_of(History(path, SESSION, 5)) == [1, 2, 3, 5]


BROKEN = [
    b"\xff\xfe",
    b"[" * 100_000,
    b"{}",
    b"[1]",
    b"null",
    b'{"step": "3", "loss": 1}',
    b'"session x"',
    b'["session"]',
    b'{"step": 3, "saved": "../other.safetensors"}',
    b'{"step": 3, "saved": null}',
    b'{"step": 3, "samples": "", "files": ["a.png"]}',
    b'{"step": 3, "samples": "", "files": {"0": "a.png"}}',
    b'{"step": 3, "samples": ""}',
    b'{"step": 3, "loss": 1.0, "rates": [1]}',
    b'{"step": 3, "validation": 5}',
    b'{"step": 3, "samples": "", "files": {"0": "C:\\\\other.png"}, "prompts": {}}',
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

    history = History(path, SESSION, 10)

    assert history.run_history.starts == {0: None}
    (said,) = caplog.messages
    assert steps_of(history) == [1, 2, 4]
    assert "lines cannot be read and are left out" in said


def test_a_history_that_cannot_be_read_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "h.jsonl").mkdir()

    with caplog.at_level(logging.WARNING):
        history = History(tmp_path / "h.jsonl", SESSION, 10)

    assert history.run_history == RunHistory()
    assert "the page begins at step 10" in caplog.text
    with pytest.raises(OutputError):
        history.flush()


def test_lines_that_are_written_again_after_a_failure_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full in the middle of a line: the first whole line of the next attempt is kept too."""
    history = write_history(tmp_path / "h.jsonl", steps=2)

    def fill_the_disk(path: Path, text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text[: 3 * len(text) // 4])
        raise OutputError("full")

    history.add(3, loss=3.0)
    history.add(4, loss=4.0)
    with monkeypatch.context() as patched:
        patched.setattr("training.reports.history.append_text", fill_the_disk)
        with pytest.raises(OutputError):
            history.flush()
    history.add(5, loss=5.0)

    assert steps_of(history) == [1, 2, 3, 4, 5]
    assert [*read_history(history.path, history.session).starts] == [0]


def test_numbers_that_are_not_finite_are_counted_and_stored_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    history = History(path, SESSION, 0)
    for step, loss in enumerate([1.0, math.nan, math.inf, 2.0], 1):
        history.add(step, loss=loss, rates={"lr/unet": math.inf})
    history.add(4, validation={"validation/loss": math.nan})
    history.flush()

    run_history = read_history(history.path, history.session)
    assert run_history.loss == {1: 1.0, 2: None, 3: None, 4: 2.0}
    assert run_history.validations == {}
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_long_curve_is_joined_and_keeps_its_extremes() -> None:
    values = {55_555: 1000.0, 77_777: -1000.0, 5: None}
    bins = join_bins({step: values.get(step, 1.0) for step in range(1, 100_001)})

    assert len(bins) <= MAX_BINS
    assert max(map(max, bins.values())) == 1000.0
    assert min(map(min, bins.values())) == -1000.0
    assert sum(map(len, bins.values())) == 99_999
    assert [*bins] == sorted(bins)


@pytest.mark.parametrize(
    ("there", "validations", "expected"),
    [
        (("x-step00000004", "x-step00000008", "x"), {}, "x"),
        (("x-step00000004", "x-step00000008", "x-step00000008-ema"), {}, "x-step00000008"),
        (("x-000001", "x-step00000008"), {}, "x-step00000008"),
        (("x-step00000004", "x-000003"), {}, "x-000003"),
        (("x-step00000004", "x-step00000008", "x"), {4: 0.1, 8: 0.2, 9: 0.3}, "x-step00000004"),
        (("x-step00000008",), {4: 0.1, 8: 0.2}, "x-step00000008"),
        ((), {}, None),
        (("x-step00000004", "x_zorb"), {}, "x-step00000004"),
        (("x_zorb", "x-ema_zorb"), {9: 0.1}, None),
    ],
    ids=[
        *("the whole run", "the newest", "by step", "an epoch", "the best", "the best is gone", "none"),
        *("not the word next to a LoRA", "a word alone"),
    ],
)
def test_the_file_to_use_is_one_that_exists(
    there: tuple[str, ...], validations: dict[int, float], expected: str | None, tmp_path: Path
) -> None:
    steps = {"x-step00000004": 4, "x-000001": 5, "x-step00000008": 8, "x-step00000008-ema": 8}
    steps |= {"x-000003": 9, "x": 9, "x_zorb": 9, "x-ema": 9, "x-ema_zorb": 9}
    rows = [{"step": step, "saved": f"{name}.safetensors"} for name, step in steps.items()]
    rows += [{"step": step, "validation": {LOSS: loss}} for step, loss in validations.items()]
    for name in there:
        (tmp_path / f"{name}.safetensors").touch()

    file = RunHistory.of(rows).usable_file(tmp_path)

    assert file == (None if expected is None else f"{expected}.safetensors")


def test_a_page_that_is_drawn_of_an_earlier_history_replaces_no_later_one(tmp_path: Path) -> None:
    """The process of a killed run may draw longer than the run takes that goes on with it."""
    history = History(history_path(tmp_path, "x"), 7)
    history.add(1, started={"total_steps": 8}, loss=0.5)
    history.flush()

    def draw(path: Path, run_history: RunHistory) -> None:
        path.write_text(f"until step {max(run_history.loss)}", encoding="utf-8")

    def draw_slowly(path: Path, run_history: RunHistory) -> None:
        history.add(2, loss=0.4)
        history.flush()
        later = history.path.stat().st_mtime_ns + 10**9  # clocks of files may tick rarely
        os.utime(history.path, ns=(later, later))
        draw_page(history.path, draw, is_over=True)
        draw(path, run_history)

    draw_page(history.path, draw_slowly, is_over=True)

    assert page_path(tmp_path, "x").read_text(encoding="utf-8") == "until step 2"
    assert is_page_current(history.path)
    assert {path.name for path in tmp_path.iterdir()} == {history.path.name, "x.html"}
