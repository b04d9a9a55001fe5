"""A run with 10,000 samples: its page loads those that are in view."""

import os
from pathlib import Path

import numpy as np
import pytest

from modules.media.writing import write_video
from tests.browser.serving import serve_runs, write_run
from tests.chromium import open_page, wait_until
from training.reports.history import History, history_path

STEPS, PROMPTS = 102, 99


def write_samples(folder: Path) -> None:
    """A run with a clip of each prompt at each step; they are one file under many names."""
    write_run(folder)
    clip = folder / "sample" / "x.mp4"
    write_video(clip, iter(np.full((9, 32, 32, 3), 128, np.uint8)), 16.0)
    history = History(history_path(folder, "x"), 1, STEPS)
    for step in range(7, 7 + STEPS):
        files = {str(index): f"x_{step:06d}_{index:02d}.mp4" for index in range(PROMPTS)}
        for name in files.values():
            os.link(clip, clip.with_name(name))
        prompts = {index: f"prompt {index}" for index in files}
        history.add(step, samples=f"{step:06d}", files=files, prompts=prompts)
    history.flush()


@pytest.mark.slow
def test_of_10000_samples_those_in_view_are_loaded(tmp_path: Path) -> None:
    write_samples(tmp_path)
    places = "[...document.querySelectorAll('.grid [data-src]')]"
    loaded = f"{places}.filter(one => one.firstChild)"
    with serve_runs(tmp_path) as served, open_page(served.url + served.of("x")) as page:
        page.get_by_label(f"all {STEPS + 1} steps").check()
        wait_until(page, f"{loaded}.length > 0")
        assert page.evaluate(f"{places}.length") > 10_000
        for share in (0.5, 1):
            page.evaluate(
                f"scrollTo(0, {share} * document.querySelector('.grid').getBoundingClientRect().height)"
            )
            wait_until(page, f"{loaded}.length > 0 && {loaded}.every(one => one.firstChild.readyState > 1)")
            wait_until(page, f"{loaded}.every(one => Math.abs(one.getBoundingClientRect().top) < 2000)")
            assert page.evaluate(f"{loaded}.length") < 200
        page.evaluate("document.querySelector('.wide').scrollLeft = 1e6")
        wait_until(page, f"{places}.at(-1).firstChild?.readyState > 1")
        assert page.problems == []
