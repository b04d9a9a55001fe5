"""The page of a training: it fills itself, shows hostile text as text, and never ends a training."""

import html
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import share_page
from modules.errors import UserError
from modules.installation import ROOT
from modules.media.reading import read_image, video_frames
from modules.media.tracks import write_wav
from tests.chromium import open_page, wait_until
from tests.commands import run_python
from tests.run_pages import find_run_page, read_run_page
from tests.training.test_resume import train_in_two_processes
from tests.training.toy import (
    Killed,
    killed_at,
    same,
    toy_options,
    train_toy,
    write_caches,
    write_prompts,
)
from tests.waiting import wait_for
from training.reports.history import History, PageCommand, SampleRow, Start, read_history
from training.reports.page import Standing, list_charts, list_tiles, write_training_page
from training.reports.reporter import RunReporter
from training.reports.sample_files import (
    GAP,
    MIN_WIDTH,
    TEXT_SIZE,
    TITLE_SIZE,
    find_samples,
    read_downscaled,
    select_columns,
    select_first_shown,
    write_sheet,
)

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} $(rm -rf ~) </style> \u202e"
PROMPTS = "a cat --w 32 --h 32 --f 9 --d 11 --s 2\na dog --w 32 --h 32 --f 1 --s 2\n"


@pytest.fixture
def sampling(tmp_path: Path) -> list[object]:
    """Options that make samples of two prompts every third step."""
    write_caches(tmp_path)
    return ["--sample_prompts", write_prompts(tmp_path, PROMPTS), "--sample_every_n_steps", 3]


def page_of(folder: Path, name: str = "x") -> str:
    return read_run_page(folder / "output", name)


def text_of(page: str) -> str:
    """What a page says, without its embedded data."""
    page = re.sub(r"<!--.*?-->", "", re.sub(r'"data:[^"]*"', '""', page))
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    return " ".join(text.split())


def columns_of(page: str) -> list[str]:
    head = page.partition("<thead>")[2].partition("</thead>")[0]
    return [text.split(" best")[0] for text in re.findall(r"<th>([^<]*)", head)]


def test_the_page_is_there_after_samples_and_complete_at_the_end(
    tmp_path: Path, sampling: list[object]
) -> None:
    with pytest.raises(Killed):
        train_toy(tmp_path, *sampling, family=killed_at(4), has_page=True)
    wait_for(lambda: "died after step 3 without a message" in text_of(page_of(tmp_path)))
    assert columns_of(page_of(tmp_path)) == ["step 3"]

    train_toy(tmp_path, *sampling, "--validation_split", "0.2", "--validate_every_n_steps", 4, has_page=True)

    with open_page(find_run_page(tmp_path / "output")) as shown:
        assert shown.title() == "x: training"
        plays = "[...document.querySelectorAll('video')].every(clip => clip.currentTime > 0 && !clip.paused)"
        wait_until(shown, plays)
        assert shown.locator("video").count() == 2
        assert shown.evaluate("Math.min(...[...document.images].map(image => image.naturalWidth))") > 0
        assert shown.locator(".chart").count() == 4
        assert "finished" in shown.inner_text("body")
        assert "8 of 8" in shown.inner_text("body")
        assert shown.problems == []


@pytest.mark.slow
def test_curves_and_files_fit_on_a_phone_and_a_shared_copy_holds_no_folder(
    tmp_path: Path, sampling: list[object]
) -> None:
    name = "a_name_that_is_longer_than_a_phone_is_wide_and_never_breaks"
    options = [*sampling, "--save_every_n_steps", 4, "--output_name", name, "--validation_split", "0.2"]
    train_toy(tmp_path, *options, "--validate_every_n_steps", 4, has_page=True)
    page = find_run_page(tmp_path / "output", name)

    with open_page(page, width=360) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") == 360
        parts = "[...document.querySelectorAll('.chart, .files')]"
        assert shown.evaluate(f"{parts}.every(part => part.getBoundingClientRect().right <= 360)")
        assert shown.problems == []

    share_page.main([str(page)])
    text = page.with_name(f"{name}-shared.html").read_text(encoding="utf-8")
    assert str(tmp_path) in page.read_text(encoding="utf-8")
    assert not [private for private in (str(tmp_path), "./sample/") if private in text]
    assert "--dataset_config dataset.toml --max" in text_of(text)
    assert "a cat" in text_of(text)
    assert text.count("<video") == 2


def test_a_resumed_run_shows_the_whole_history(tmp_path: Path, sampling: list[object]) -> None:
    """The run dies at its seventh step, after a state at the fourth: steps 5 to 7 are trained again."""
    options = [*sampling, "--save_every_n_steps", 4, "--save_state", "--resume", "latest"]
    with pytest.raises(Killed):
        train_toy(tmp_path, *options, family=killed_at(6), has_page=True)

    train_toy(tmp_path, *options, has_page=True)

    page = page_of(tmp_path)
    assert columns_of(page) == ["step 3", "step 6"]
    assert "resumed at step 4" in text_of(page)
    assert page.count("<video") == 2
    lines = (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "loss" in row] == list(range(1, 9))


def test_hostile_texts_are_shown_and_nothing_of_them_runs(tmp_path: Path) -> None:
    write_caches(tmp_path)
    prompts = tmp_path / "prompts.json"
    entry = {"prompt": HOSTILE, "sample_steps": 1, "width": 32, "height": 32}
    prompts.write_text(json.dumps([entry]), encoding="utf-8")
    name = "'%41&amp; \u00fc #"
    options = ["--sample_prompts", prompts, "--sample_every_n_steps", 2, "--output_name", name]
    options += ["--training_comment", HOSTILE, "--max_train_steps", 2]
    options += ["--huggingface_token", "hf_secret", "--wandb_api_key", "w_secret"]

    train_toy(tmp_path, *options, has_page=True)

    file = find_run_page(tmp_path / "output", name)
    with open_page(file) as page:
        assert page.title() == f"{name}: training"
        assert HOSTILE.split(" \u202e")[0] in page.inner_text(".prompt")
        page.click("summary:has-text('options')")
        assert "onerror=alert(2)" in page.inner_text(".options")
        assert page.locator("script").count() == 1  # page.js, by its hash: its buttons copy
        page.locator(".copy").first.click()
        wait_until(page, "document.querySelector('.copy').textContent === 'Copied'")
        links = page.evaluate("[...document.querySelectorAll('a')].map(link => link.href)")
        assert page.problems == []
    here = file.parent.as_uri()
    assert links
    assert all(link.startswith(here) and Path(unquote(urlparse(link).path)).is_file() for link in links)
    assert "secret" not in file.read_text(encoding="utf-8")


def test_the_page_lists_the_options_that_were_typed(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_n_epoch_ratio", 2, "--max_train_epochs", 4, has_page=True)

    lines = (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
    (changed,) = [dict(row["started"]["changed"]) for row in map(json.loads, lines) if "started" in row]
    assert changed["save_n_epoch_ratio"] == "2"
    assert "save_every_n_epochs" not in changed
    assert [path.name for path in (tmp_path / "output").glob("x-00*.safetensors")] == ["x-000002.safetensors"]


def test_the_page_is_written_once_for_a_save_for_samples_and_at_the_end(tmp_path: Path) -> None:
    clock, written, full = [0.0], list[float](), list[bool]()
    history, start = History(tmp_path / "x-history.jsonl", 1), Start("toy", 4)

    def commands(best: Path | None, is_finished: bool) -> list[PageCommand]:
        written.append(clock[0])  # asked for by each page
        full.append(history.path.exists() and "a-ema" in history.path.read_text(encoding="utf-8"))
        return []

    reporter = RunReporter(history, start, 0, commands, list, now=lambda: clock[0])
    with reporter:
        for moment, step, name in [(1, 2, "a"), (3, 3, "b"), (5, 4, "x")]:
            clock[0] = 1000.0 * moment  # late enough for another one
            reporter.log_saved([tmp_path / f"{name}{end}.safetensors" for end in ("", "-ema")], step)
            if step == 3:
                clock[0] += 1000
                reporter.log_samples(step, "000003")
        clock[0] = 7000.0

    assert written == [0, 1000, 3000, 4000, 7000]
    assert full == [False, True, True, True, True]


def test_a_training_loads_nothing_that_draws_pages() -> None:
    drawn_by = "training.reports.page", "training.reports.sample_files", "training.reports.item_losses"
    program = f"import training.run, sys; print({{*{drawn_by}}} & {{*sys.modules}})"

    assert run_python("-c", program, folder=ROOT).stdout.strip() == "set()"


def test_the_page_changes_no_weight(tmp_path: Path, sampling: list[object]) -> None:
    assert same(train_toy(tmp_path, *sampling), train_toy(tmp_path, *sampling, has_page=True))


@pytest.mark.slow
def test_a_history_that_cannot_be_written_is_one_warning_and_the_training_goes_on(
    tmp_path: Path, sampling: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "output" / "x-history.jsonl" / "kept").mkdir(parents=True)

    train_toy(tmp_path, *sampling, "--save_every_n_steps", 2, has_page=True)

    assert caplog.text.count("x.html is not complete, the training continues") == 1
    assert list((tmp_path / "output" / "sample").glob("*.mp4"))


def test_a_page_that_cannot_be_drawn_is_one_warning_while_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.html" / "kept").mkdir(parents=True)
    reporter = RunReporter(History(tmp_path / "x-history.jsonl", 1), Start("toy", 4), 0, lambda *_: [], list)

    def is_said_after_samples() -> bool:
        reporter.log_samples(1, "000001")
        return "is not complete" in caplog.text

    with reporter:
        wait_for(is_said_after_samples)
        reporter.log_samples(2, "000002")

    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{tmp_path / 'x.html'} is not complete, the training continues: ")
    assert "x.html" in message.partition("continues: ")[2]


def test_a_recorder_that_fails_leaves_the_others_their_samples(tmp_path: Path) -> None:
    history = History(tmp_path / "x-history.jsonl", 1, is_written=False)
    reporter = RunReporter(history, Start("toy", 4), 0, lambda *_: [], list)
    failing, working = MagicMock(), MagicMock()
    failing.log_samples.side_effect = ValueError

    reporter.log_samples(3, "000003", recorders=[failing, working])

    working.log_samples.assert_called_once_with(3, {}, {}, {})


def test_a_run_that_ends_by_an_error_says_so_on_its_page(tmp_path: Path) -> None:
    write_caches(tmp_path, bad=2)

    with pytest.raises(UserError, match="clip2"):
        train_toy(tmp_path, has_page=True)

    assert re.search(r"ended by an error after step \d: step \d: the loss is", text_of(page_of(tmp_path)))


def test_samples_that_are_gone_or_broken_leave_a_note(tmp_path: Path, sampling: list[object]) -> None:
    options = [*sampling, "--save_state", "--resume", "latest"]
    train_toy(tmp_path, *options, "--max_train_steps", 6, has_page=True)
    first, second = sorted((tmp_path / "output" / "sample").glob("*.mp4"))
    first.unlink()
    second.write_bytes(b"no video")

    train_toy(tmp_path, *options, "--max_train_steps", 7, has_page=True)

    assert text_of(page_of(tmp_path)).count("the file is gone, or cannot be read") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_of_two_processes_one_writes_the_page_with_the_samples_of_both(
    tmp_path: Path, sampling: list[object]
) -> None:
    train_in_two_processes(tmp_path, 29647, *sampling, environment={"TOY_PAGE": "1"})

    page = page_of(tmp_path)
    assert columns_of(page) == ["step 3", "step 6"]
    assert page.count("<video") == 2
    assert page.count('<a href="./sample/') == 4
    assert "accelerate launch --quiet --num_processes 2" in text_of(page)
    assert (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8").count('"loss"') == 8


def test_the_numbers_of_pairs_are_curves_and_the_latest_ones_a_tile(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl", 1)
    (told,) = toy_options(tmp_path, "--preference", 2000).features.tallies
    history.add(0, started=asdict(Start("toy", 9, charts=told.charts, tiles=told.tiles)))
    for step in range(1, 5):
        pairs = {"preference/better": 0.5**step, "preference/worse": 2.0, "preference/right": step / 4}
        history.add(step, loss=0.7, rates={}, seconds=1.0, pairs=pairs)
    history.add(5, loss=0.7, rates={}, seconds=1.0, skipped="loss", pairs={"preference/right": None})
    history.flush()

    run_history = read_history(history.path, history.session)
    drawn = list_charts(run_history)
    charts = {chart.title: {curve.name: curve.y for curve in chart.curves} for chart in drawn}

    assert charts["Error at both of a pair"] == {
        "better one": [0.5, 0.25, 0.125, 0.0625],
        "worse one": [2, 2, 2, 2],
    }
    assert charts["Share of pairs that are right"] == {"right": [0.25, 0.5, 0.75, 1]}
    listed = list_tiles(Standing(Start("toy", 9), 5), run_history)
    tiles = {label: (value, note) for label, value, note in listed}
    assert tiles["Pairs that are right"][0] == "62%"
    assert tiles["Skipped steps"] == ("1", "not taken; the last: 5")


def test_numbers_whose_run_does_not_say_how_they_are_shown_are_curves_by_their_names(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl", 1)
    history.add(0, started=asdict(Start("toy", 9)))
    for step in (1, 2):
        numbers = {"preference/better": 0.5, "preference/right": step, "alone": 3.0}
        history.add(step, loss=0.7, rates={}, seconds=1.0, pairs=numbers)
    history.flush()

    drawn = list_charts(read_history(history.path, history.session))

    charts = {chart.title: {curve.name: curve.y for curve in chart.curves} for chart in drawn}
    assert charts["preference"] == {"better": [0.5, 0.5], "right": [1, 2]}
    assert charts["alone"] == {"alone": [3, 3]}


def page_with(folder: Path, saved: Mapping[str, int], validations: Mapping[int, float]) -> str:
    """The text of a page of a run that saved these files (of which b.safetensors is gone)."""
    history = History(folder / "h.jsonl", 1)
    for step, loss in validations.items():
        history.add(step, validation={"validation/loss": loss})
    for name, step in saved.items():
        history.add(step, saved=name)
        if name != "b.safetensors":
            (folder / name).write_bytes(b"x" * 2000)
    stands = Standing(Start("toy", 100), 9)
    write_training_page(folder / "x.html", history.path, history.run_history, stands)
    return text_of((folder / "x.html").read_text(encoding="utf-8"))


def test_the_best_file_is_the_one_with_the_lowest_validation_loss_of_those_that_are_there(
    tmp_path: Path,
) -> None:
    saved = {"a.safetensors": 10, "b.safetensors": 20, "c.safetensors": 30}

    page = page_with(tmp_path, saved, {10: 0.5, 20: 0.1, 28: 0.4})

    assert "Best file by validation loss: c.safetensors. The lowest loss of all is 0.1 at step 20" in page
    assert "0.4 (at step 28)" in page
    assert "b.safetensors" not in page


def test_an_average_is_never_the_best_file_because_no_loss_of_it_was_measured(tmp_path: Path) -> None:
    saved = {"x.safetensors": 10, "x-ema.safetensors": 10, "my-ema.safetensors": 4}

    page = page_with(tmp_path, saved, {4: 0.5, 10: 0.3})

    assert "Best file by validation loss: x.safetensors." in page
    assert page.count("not measured (average)") == 1


def test_without_validation_the_page_says_how_to_get_one(tmp_path: Path) -> None:
    page = page_with(tmp_path, {"a.safetensors": 10}, {})

    assert "--validation_split 0.1 --validate_every_n_steps 100" in page


@pytest.mark.parametrize("count", [1, 9, 10, 11, 1000])
def test_the_grid_keeps_the_first_the_last_and_the_best_column(count: int) -> None:
    rows = [SampleRow(10 * index, f"{index:06d}", {}, {}) for index in range(count)]
    best = 10 * (count * 2 // 3)

    chosen = [row.step for row in select_columns(rows, best, 10)]

    assert min(count, 5) <= len(chosen) <= 10
    assert {0, 10 * (count - 1), min(best, 10 * (count - 1))} <= set(chosen)
    assert chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("count", "best", "few"),
    [
        (1, None, {0}),
        (3, 1, {0, 1, 2}),
        (5, None, {0, 1, 2, 4}),
        (12, 8, {0, 4, 8, 11}),
        (12, 11, {0, 5, 8, 11}),
    ],
)
def test_a_row_shows_the_first_the_best_the_last_and_one_between(
    count: int, best: int | None, few: set[int]
) -> None:
    assert select_first_shown(count, best) == few


def test_a_sheet_shows_all_prompts_of_a_step_and_sorts_behind_their_samples(
    tmp_path: Path, sampling: list[object]
) -> None:
    train_toy(tmp_path, *sampling, "--max_train_steps", 3, has_page=True)

    video, image, sheet = sorted((tmp_path / "output" / "sample").iterdir())
    assert sheet.name == "x_000003_sheet.png"
    shown = read_image(sheet).astype(int)
    for row, frame in zip((0, 1), (next(iter(video_frames(video))), read_image(image)), strict=True):
        top = TITLE_SIZE + 3 * GAP + TEXT_SIZE + GAP + row * (TEXT_SIZE + GAP + 32 + 2 * GAP)
        assert abs(shown[top : top + 32, GAP : GAP + 32] - frame).mean() < 3


def test_a_sheet_of_any_prompt_can_be_drawn(tmp_path: Path) -> None:
    strips = {index: np.zeros((16, 16, 3), np.uint8) for index in range(3)}

    write_sheet(tmp_path / "s.png", HOSTILE, strips, {0: HOSTILE, 1: "\u732b " * 5000, 2: "\ud800 \n\0"})

    assert read_image(tmp_path / "s.png").shape[1] == MIN_WIDTH + 2 * GAP


def test_samples_go_to_tensorboard_with_and_without_a_page(tmp_path: Path, sampling: list[object]) -> None:
    for name, has_page in (("with", True), ("without", False)):
        logs = tmp_path / name
        train_toy(tmp_path, *sampling, "--logging_dir", logs, "--max_train_steps", 6, has_page=has_page)

        (events,) = logs.rglob("events.out.tfevents.*")
        accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
        accumulator.Reload()
        assert accumulator.Tags()["images"] == ["samples/00", "samples/01"]
        images = accumulator.Images("samples/00")
        assert [image.step for image in images] == [3, 6]
        assert (images[0].width, images[0].height) == (3 * 32 + 2 * 4, 32)


def test_a_sample_with_layers_is_what_they_show_together(tmp_path: Path) -> None:
    for ending in ("layer0", "layer1", "composite"):
        (tmp_path / f"x_000004_01_20260101000000_7_{ending}.png").touch()

    found = find_samples(tmp_path, "x", "000004")

    assert found == {1: tmp_path / "x_000004_01_20260101000000_7_composite.png"}


def test_a_sample_of_sound_alone_is_drawn_by_how_far_it_swings(tmp_path: Path) -> None:
    rate = 16000
    audio = np.sin(np.arange(2 * rate) * 0.2, dtype=np.float32) * np.repeat([0, 0.5], rate).astype(np.float32)
    path = tmp_path / "x_000004_00_20260101000000_1.wav"
    write_wav(path, (np.stack([audio, audio]), rate))

    assert find_samples(tmp_path, "x", "000004") == {0: path}
    (image,) = read_downscaled(path).frames
    light = (image[..., 0] > 200).mean(axis=0)  # of each moment
    assert light[:120].max() < 0.05
    assert 0.45 < light[140:250].min() < 0.55


@pytest.mark.parametrize(("changed", "is_explained"), [((("sample_prompts", "p.txt"),), False), ((), True)])
def test_only_a_run_without_prompts_says_how_to_get_samples(
    changed: tuple[tuple[str, str], ...], is_explained: bool, tmp_path: Path
) -> None:
    history = History(tmp_path / "h.jsonl", 1)
    stands = Standing(Start("toy", 100, changed), 0)
    write_training_page(tmp_path / "x.html", history.path, history.run_history, stands)
    page = text_of((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "No samples yet." in page
    assert ("--sample_every_n_steps" in page) == is_explained
