"""benchmarks/evening.py: a model from caching to scores through the commands, without personal data."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from benchmarks.evening import summarize_steps
from benchmarks.evening_data import CONTROL, draw_items
from benchmarks.evening_figures import (
    DRAWN,
    PHASES,
    VERSION,
    EveningFigures,
    FiguresError,
    MachineFigures,
    MemoryFigures,
    PhaseFigures,
    ScoreFigures,
    StepFigures,
    list_figures,
    make_proven_table,
    read_figures,
    write_figures,
)
from benchmarks.evening_page import write_evening_page
from docs.model_tables import PROVEN_HEADING, proven_part
from modules.media.reading import read_image, video_info
from project.options import find_models
from runtime.machine import MachineGpu, describe_machine
from tests.commands import QUIET, ROOT, run_program
from tests.tiny.new_models import write_new_model
from tests.training.scoring.making import write_clip
from tests.waiting import wait_for

SCRIPT = ROOT / "benchmarks" / "evening.py"
NAMES = ("zaphod", "beeblebrox")  # planted wherever a person's name may stand
VARIABLES = ("HOME", "USERPROFILE", "USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME", "HF_TOKEN")
ENVIRONMENT = dict.fromkeys(VARIABLES, "/home/zaphod/beeblebrox")
SHORT = ("--memory", "0", "--infer_steps", "1")


def make_figures(**changes: Any) -> EveningFigures:
    """Figures of an evening that might have been."""
    machine = replace(
        describe_machine(), gpus=(MachineGpu("Card 9", 24 << 30, "8.9"),), cuda="12.8", driver="580.65.06"
    )
    phases = tuple(PhaseFigures(name, 60.0, 1, 2 << 30, None) for name in PHASES)
    figures = EveningFigures(
        version=VERSION,
        family="wan",
        task="t2v-1.3B",
        data=DRAWN,
        items=12,
        width=832,
        height=480,
        frames=81,
        steps=200,
        precision="bf16",
        options={"network_dim": 32, "fp8_scaled": True},
        machine=MachineFigures.of(machine),
        phases=phases,
        step=StepFigures(2.5, 2.4, 2.75, 197),
        training_memory=MemoryFigures(11 << 30, 10 << 30),
        generation_memory=MemoryFigures(None, None),
        first_loss=0.2,
        last_loss=0.1,
        scores=ScoreFigures(0.25, 0.31, None, None),
    )
    return replace(figures, **changes)


def find_names(folder: Path) -> list[str]:
    """Files of a folder with a planted name: in their bytes, or in what a page embeds."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        embedded = re.findall(rb"base64,([A-Za-z0-9+/=]+)", content)
        texts = [str(path.relative_to(folder)).encode(), content, *map(base64.b64decode, embedded)]
        if any(name.encode() in text.lower() for text in texts for name in NAMES):
            found.append(path.name)
    return found


def test_the_figures_of_a_file_make_a_row_and_a_page(tmp_path: Path) -> None:
    figures = make_figures()
    read = write_figures(tmp_path / "a.json", figures)

    assert read == figures == read_figures(tmp_path / "a.json")
    (row,) = make_proven_table(list_figures(tmp_path)).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["wan t2v-1.3B", "Card 9, 24.00 GiB"]
    assert cells[2:5] == ["12 items (drawn), 832x480, 81 frames", "2.5 (2.4 to 2.75)", "11.00, 10.00"]
    assert cells[5:7] == ["120 s, 60 s for 200 steps", "0.250, 0.310"]
    assert cells[7].endswith("network_dim 32, fp8_scaled")
    write_evening_page(tmp_path / "page.html", read, [])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>+10.0%</td>" in page
    assert "http" not in page.partition("<body>")[2]


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


def change_machine(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["machine"].update(values)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (change(note="hello"), "note is not a figure"),
        (change(task="t2v-9B"), "not a model of the catalogue"),
        (change(family="../wan"), "family"),
        (change(steps=-1), "steps"),
        (change(steps=True), "steps"),
        (change(first_loss="0.1"), "first_loss"),
        (change(first_loss=float("nan")), "first_loss"),
        (change(options={"output_dir": 1}), "options"),
        (change(data="mine"), "data"),
        (change_machine(gpu="| <script>alert(1)</script>"), "gpu"),
        (change_machine(gpu="see www.example.com"), "gpu"),
        (change_machine(torch="2.9.0+zaphod"), "torch"),
        (change_machine(packages={"left-pad": "1.0"}), "packages"),
        (change(version=VERSION + 1), "version"),
        (lambda content: content.pop("step"), "step is missing"),
    ],
)
def test_a_file_with_anything_but_figures_is_rejected(
    spoil: Callable[[dict[str, Any]], Any], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    write_figures(path, make_figures())
    content = json.loads(path.read_text(encoding="utf-8"))
    spoil(content)
    path.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(FiguresError, match=re.escape(named)):
        read_figures(path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 60_000, '{"version": 1, "version": 1}', " " * 70_000])
def test_a_damaged_or_too_large_file_is_rejected(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(FiguresError, match=re.escape(str(path))):
        list_figures(tmp_path)


def test_figures_that_nobody_could_read_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FiguresError, match="first_loss"):
        write_figures(tmp_path / "a.json", make_figures(first_loss=float("inf")))
    assert [*tmp_path.iterdir()] == []


def test_the_page_of_what_came_has_the_figures_of_its_folder() -> None:
    text = (ROOT / "docs" / "proven.md").read_text(encoding="utf-8")
    assert text[text.index(PROVEN_HEADING) :] == proven_part()


def test_steps_of_the_warm_up_do_not_count() -> None:
    seconds = [90.0, 50.0, 9.0, *(float(number) for number in range(1, 12))]

    assert summarize_steps(seconds) == StepFigures(6.0, 2.0, 10.0, 11)
    assert summarize_steps([3.0]) == StepFigures(3.0, 3.0, 3.0, 1)
    assert summarize_steps([]).count == 0


def test_data_have_the_size_of_the_model_and_sources_if_it_edits(tmp_path: Path) -> None:
    models = {f"{model.family} {model.task}": model for model in find_models()}
    clips, edits = tmp_path / "clips", tmp_path / "edits"
    draw_items(clips, models["wan t2v-1.3B"], 1, None, 5)
    draw_items(edits, models["flux_kontext dev"], 1, 64, None)

    assert (video_info(clips / "000.mp4").width, video_info(clips / "000.mp4").height) == (832, 480)
    assert "blorp" in (clips / "000.txt").read_text(encoding="utf-8")
    target, source = read_image(edits / "000.png"), read_image(edits / CONTROL / "000.png")
    assert target.shape == source.shape == (64, 64, 3)
    assert (target != source).any()
    assert (source == source[0, 0]).all()


@pytest.mark.slow
def test_an_evening_that_is_interrupted_continues_and_names_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "Zaphod Beeblebrox"
    model = write_new_model("wan t2v-1.3B", folder / "tiny")[:4]
    files = [f"{name}={folder / 'tiny' / name}.safetensors" for name in ("dit", "vae", "t5")]
    words = [str(SCRIPT), *model, *(word for file in files for word in ("--model_file", file)), *SHORT]
    words += ["--models", str(folder / "models"), "--max_train_steps", "60", "--items", "2"]
    words += ["--size", "32", "--frames", "5"]
    write_clip(folder / "models" / "score_clip")
    work = folder / "evening" / "work"
    history = work / "data" / "output" / "evening-history.jsonl"

    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **QUIET, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        wait_for(
            lambda: process.poll() is not None or (history.exists() and b'"loss"' in history.read_bytes())
        )
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[0].decode()
    assert process.returncode == 130, said
    cached = {path: path.stat().st_mtime_ns for path in work.rglob("*_te.safetensors")}
    run_program(sys.executable, *words, folder=folder, environment=ENVIRONMENT)

    result = folder / "evening" / "result"
    assert sorted(path.name for path in result.iterdir()) == ["figures.json", "page.html"]
    figures = read_figures(result / "figures.json")
    assert [phase.name for phase in figures.phases] == [*PHASES]
    assert [phase.attempts for phase in figures.phases] == [1, 1, 1, 1, 2, 1, 1]
    assert all(phase.seconds > 0 and phase.host_bytes for phase in figures.phases)
    assert (figures.steps, figures.step.count, figures.items) == (60, 57, 2)
    assert (figures.width, figures.height, figures.frames) == (32, 32, 5)
    assert figures.training_memory.planned
    assert figures.scores is not None
    assert figures.scores.clip_after is not None
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*_te.safetensors")} == cached
    assert (result / "page.html").read_text(encoding="utf-8").count("<img ") == 6
    assert find_names(result) == []
    assert find_names(work)  # the search finds them where they may be


@pytest.mark.slow
def test_of_data_of_the_user_there_are_figures_alone(tmp_path: Path) -> None:
    folder = tmp_path / "zaphod"
    data = folder / "beeblebrox"
    data.mkdir(parents=True)
    written = PngImagePlugin.PngInfo()
    written.add_text("Author", "Zaphod Beeblebrox")
    for index in range(2):
        path = data / f"zaphod {index}.png"
        Image.new("RGB", (64, 64), (90 * index, 60, 30)).save(path, pnginfo=written)
        path.with_suffix(".txt").write_text("Zaphod Beeblebrox waves", encoding="utf-8")
    words = write_new_model("flux_2 klein-base-4b", folder / "tiny")
    before = sorted(data.iterdir())

    words += ["--data", str(data), "--max_train_steps", "2", "--infer_steps", "1"]
    run_program(sys.executable, str(SCRIPT), *words, folder=folder, environment=ENVIRONMENT)

    result = folder / "evening" / "result"
    figures = read_figures(result / "figures.json")
    assert (figures.data, figures.items, figures.steps) == ("own", 2, 2)
    assert figures.scores is None
    assert "<img " not in (result / "page.html").read_text(encoding="utf-8")
    assert find_names(result) == []
    assert find_names(folder / "evening" / "work")
    assert sorted(data.iterdir()) == before
    other = run_program(
        sys.executable, str(SCRIPT), *words, "--max_train_steps", "3", folder=folder, check=False
    )
    assert other.returncode == 2
    assert "an evening with other options" in other.stderr


@pytest.mark.slow
def test_without_files_of_the_model_it_says_how_to_download_them(tmp_path: Path) -> None:
    words = ("--family", "wan", "--task", "t2v-1.3B", "--items", "1", "--size", "32", "--frames", "5")
    done = run_program(sys.executable, str(SCRIPT), *words, *SHORT, folder=tmp_path, check=False)
    assert done.returncode == 2
    assert "is missing. Download it: python tools/download.py --family wan --task t2v-1.3B" in done.stderr
