"""How long a training takes, on the page New: from what runs of this machine have measured, or not at all."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.described_folder import read_described
from browser.folders.durations import _describe_time, describe_duration
from browser.runs.runs import Runs
from tests.browser.drafts import RUN, write_draft
from tests.browser.serving import serve_runs, write_run
from tests.chromium import open_page
from tests.waiting import MILLISECONDS, PATIENCE
from training.reports.history import History, describe_process, history_path

UNKNOWN = "How long it takes is known after the first steps."


def write_other(
    root: Path,
    name: str = "other",
    kind: str | None = "good",
    resolution: str = "[64, 64]",
    memory: Mapping[str, str] | None = None,
    **told: object,
) -> None:
    """Write a run of another folder, with steps of two seconds. memory: lines of its history."""
    folder = root / name
    folder.mkdir()
    (folder / "dataset.toml").write_text(
        f'[general]\nresolution = {resolution}\n[[datasets]]\nimage_directory = "."\n', encoding="utf-8"
    )
    options = [["dit", "elsewhere/dit.safetensors"], ["dataset_config", "dataset.toml"], ["task", "t2v-1.3B"]]
    info = {"changed": options, "unchanged": [["gradient_accumulation_steps", "1"]], **told}
    info = {"written_in": str(folder), "working_folder": str(folder), **info}
    write_run(folder, name, kind=kind, **info)
    if memory:
        history = History(history_path(folder, name), 1, 6)
        history.add(6, memory=[[label, value] for label, value in memory.items()])
        history.flush()


def shown(root: Path, folder: Path, *cards: str) -> str:
    return describe_duration(Runs([root]), read_described(folder), 2000, cards)


def test_a_finished_run_of_the_same_model_and_size_says_how_long(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    assert shown(tmp_path, folder) == ""

    write_other(tmp_path)

    measured = "2 seconds each, as measured in the run other with the same model and size."
    assert shown(tmp_path, folder) == f"2000 steps take about 1.1 hours: {measured}"


OTHERS: dict[str, dict[str, object]] = {
    "still runs": {"kind": None},
    "was stopped": {"kind": ""},
    "has other sizes": {"resolution": "[96, 64]"},
    "is of another model": {"changed": [["dit", "14b.safetensors"], ["dataset_config", "dataset.toml"]]},
    "is of another task": {
        "changed": [["dit", "dit.safetensors"], ["dataset_config", "dataset.toml"], ["task", "i2v-14B"]]
    },
    "takes more for a step": {"unchanged": [["gradient_accumulation_steps", "4"]]},
    "is of another machine": {"process": {"machine": 1, "number": 1, "born": 1}},
    "has no dataset file here": {"changed": [["dit", "dit.safetensors"], ["dataset_config", "gone.toml"]]},
}


@pytest.mark.parametrize("why", OTHERS)
def test_a_run_that_is_not_alike_says_nothing(tmp_path: Path, why: str) -> None:
    folder = write_draft(tmp_path)

    write_other(tmp_path, **OTHERS[why])  # type: ignore[arg-type]

    assert shown(tmp_path, folder) == ""


def test_a_run_of_before_the_boot_counts_if_its_card_is_here(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    process = {**describe_process(), "machine": 1}

    write_other(tmp_path, memory={"device": "NVIDIA A"}, process=process)

    assert shown(tmp_path, folder, "NVIDIA B") == ""
    assert "2 seconds each" in shown(tmp_path, folder, "NVIDIA A", "NVIDIA B")


def test_the_run_of_the_name_counts_before_others(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    write_other(tmp_path)
    write_run(folder / "output", "fluff", kind=None)

    assert (
        shown(tmp_path, folder) == "2000 steps take 1.1 hours: 2 seconds each, as measured in the run fluff."
    )


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [
        (30, 0.51, "30 steps take 15 seconds: 0.51 seconds each"),
        (1, 0.2, "1 step takes 1 second: 0.2 seconds each"),
        (30, 2.9, "30 steps take 87 seconds: 2.9 seconds each"),
        (30, 4, "30 steps take 2 minutes: 4 seconds each"),
    ],
)
def test_a_short_training_takes_seconds(steps: int, seconds: float, said: str) -> None:
    assert str(_describe_time(steps, seconds)) == said


def test_the_page_new_says_it_beside_the_steps(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    epochs = RUN.replace("max_train_steps = 2000", "max_train_epochs = 3")
    other = write_draft(tmp_path / "of epochs", epochs)
    with serve_runs(tmp_path) as served:

        def message(place: Path, **fields: str) -> str:
            page = served.ask(f"/new?{urlencode({'folder': str(place), **fields})}").text
            return re.findall(r'id="hours"[^>]*>(.*?)</p>', page)[0]

        assert UNKNOWN in message(folder)
        write_other(tmp_path)
        assert "2000 steps take about 1.1 hours" in message(folder)
        assert "90 steps take about 3 minutes" in message(folder, steps="90", family="wan", task="t2v-1.3B")
        assert UNKNOWN in message(folder, steps="many", family="wan", task="t2v-1.3B")
        assert UNKNOWN in message(other)
        assert UNKNOWN in message(tmp_path / "other")


@pytest.mark.slow
def test_the_hours_follow_what_is_typed(tmp_path: Path) -> None:
    folder = write_draft(tmp_path)
    write_other(tmp_path)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder={folder}") as page:
        page.get_by_label("Training steps", exact=True).fill("9000")
        page.wait_for_selector(
            "#hours >> text=9000 steps take about 5.0 hours", timeout=PATIENCE * MILLISECONDS
        )
        assert page.get_by_label("Training steps", exact=True).input_value() == "9000"
        assert page.problems == []
