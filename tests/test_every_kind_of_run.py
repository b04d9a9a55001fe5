"""Each model and each kind of run that it trains: from a folder to a result, by commands and by clicks.

A folder of pictures or clips is described by `new`, the commands that `run` starts are done, then the page of
the run leads to a result: by *Generate with it* and *Make*, or, for kinds of files that the page Generate has
no field for, by the command that it shows. Models are tiny and random.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from browser.jobs.jobs import JobQueue
from browser.jobs.render_queue import RenderJob
from browser.jobs.render_worker import RenderWorker
from modules.text_files import parse_toml
from project.kinds.composing import BY_NAME, KINDS, list_kinds
from project.kinds.contract import RunKind
from project.options import RUN_FILE, find_models
from tests.browser.forms import find_form, list_forms
from tests.browser.serving import Answer, Served, serve_runs
from tests.browser.test_render_worker import start_fake
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.project.test_kinds_of_folders import KINDS as FOLDERS
from tests.project.test_kinds_of_folders import default_kind, write_photos
from tests.tiny.new_models import MODELS, write_new_model
from training.config_options import PROJECT_TABLE

WORD = "zorb"
MEDIA = {".mp4", ".png", ".wav"}
CELLS = [(name, kind.name) for name in MODELS for kind in KINDS]
# cells that are tried each day: each kind once
DAILY = {("anima base", "lllite"), ("stable_diffusion 1.5", "embedding"), ("stable_diffusion xl", "lora")}


def find_model(name: str) -> Any:
    family, task = name.split()
    return next(model for model in find_models() if (model.family, model.task) == (family, task))


def write_folder(folder: Path, name: str, kind: RunKind) -> None:
    """Write what a kind of run learns from."""
    if kind.uses_control_images:
        write_photos(folder)
        write_photos(folder / "conditioning", captions=False)
    elif name == "ltx_2 av":
        FOLDERS["heard"](folder)
    else:
        FOLDERS[default_kind(name)](folder)


def train(folder: Path) -> None:
    """Do what `run` does, for one short sample."""
    prompts = folder / "prompts.txt"
    first, *_ = prompts.read_text(encoding="utf-8").splitlines()
    prompts.write_text(f"{first} --s 1\n", encoding="utf-8")
    _, *commands = parse_toml((folder / RUN_FILE).read_text(encoding="utf-8"))[PROJECT_TABLE]["commands"]
    for _, script, *words in commands:
        succeed_here(script, *words, folder=folder)


def printed_command(folder: Path) -> list[str]:
    """Return the words of the last command that generates, which the training has printed and noted."""
    (history,) = (folder / "output").glob("*-history.jsonl")
    rows = [json.loads(row) for row in history.read_text(encoding="utf-8").splitlines()]
    listed = [command for row in rows for command in row.get("commands", ())]
    return shlex.split([line for title, line, *_ in listed if title == "Generate with it"][-1])


def list_results(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("generated/**/*") if path.suffix in MEDIA}


def ask_form(served: Served, what: str, fields: dict[str, list[str]]) -> Answer:
    return served.ask(what, "POST", urlencode(fields, doseq=True), Origin=served.url)


def complain(answer: Answer) -> str:
    """Return what the page says below *Make*."""
    text = answer.text.partition('id="said"')[2].partition(">")[2].partition("</p>")[0]
    return re.sub("<!--.*?-->", "", text)


def press_generate(served: Served, worker: RenderWorker, page: str, prompt: str) -> RenderJob:
    """Press *Generate with it* on the page of a run, and *Make*; return what is to be made."""
    (fields,) = [fields for attributes, fields in list_forms(page) if attributes.get("action") == "/generate"]
    form = served.ask(f"/generate?{urlencode(fields, doseq=True)}")
    assert form.status == 200
    filled = find_form(form.text, "/generate/make")
    filled |= {"prompt": [filled["prompt"][0] or prompt], "steps": ["1"], "count": ["1"], "seed": ["7"]}
    answer = ask_form(served, "/generate/make", filled)
    assert (complain(answer), answer.status) == ("", 200)
    (making,) = worker.list_all()
    return making


def find_queued_command(page: str) -> list[str]:
    """Return the command of the button below *Generate with it* on the page of a run."""
    lines = [fields["line"][0] for _, fields in list_forms(page) if "line" in fields]
    (line,) = [line for line in lines if re.search(r"gen(erate)?_", line)]
    return shlex.split(line)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny models ü")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RenderWorker]:
    """A worker that only notes what it is asked for."""
    worker = RenderWorker(JobQueue(tmp_path / "queue"), start_fake)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*cell, marks=[] if cell in DAILY else pytest.mark.slow) for cell in CELLS],
)
def test_a_folder_becomes_a_result(
    name: str, kind: str, models: Path, tmp_path: Path, worker: RenderWorker
) -> None:
    run_kind, model = BY_NAME[kind], find_model(name)
    folder = tmp_path / "Bilder von Jörg"
    write_folder(folder, name, run_kind)
    words = [*write_new_model(name, models / name), "--train", kind, "--max_train_steps", "2"]
    words += ["--output_name", "own"] if not run_kind.trains_embedding else ["--trigger_word", WORD]
    answer = run_here("new_project.py", folder, *words, folder=tmp_path)
    if run_kind not in list_kinds(model) or run_kind.why_unsupported(model, 0) is not None:
        assert_one_message(*answer)
        return
    assert answer == (0, ""), answer[1]

    train(folder)
    typed = printed_command(folder)
    succeed_here(typed[1], *typed[2:], folder=folder)
    by_command = list_results(folder)
    assert by_command

    with serve_runs(folder, queue=worker.queue, render_worker=worker) as served:
        run = served.of(WORD if run_kind.trains_embedding else "own")
        deeds = served.ask(f"{run}deeds").text
        if 'id="generate_with"' in deeds:
            making = press_generate(served, worker, deeds, "a red square")
            typed, place = [*making.command], Path(making.folder)
        else:
            typed, place = find_queued_command(served.ask(run).text), folder
    said = succeed_here(typed[1], *typed[2:], folder=place)

    assert len(list_results(tmp_path)) > len(by_command), said
