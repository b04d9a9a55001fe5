"""The page New: choose a folder and a model, have `new` describe it, check it, and start the training.

The form is kept nowhere but in the folder's own files and in the command that described it last, so that a
reload, a restart of the server and a terminal see the same.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from browser.answers import Form, answer_form, answer_move, answer_page
from browser.beginnings import CHECK, DESCRIBE, run_words
from browser.captions import mark_bytes
from browser.described import (
    FILES,
    TRAINING_TABLE,
    ChangedMeanwhileError,
    Described,
    change_keys,
    is_described,
    read_described,
)
from browser.errands import errand_name
from browser.folders import find_folder, list_media_folders, read_media_folder
from browser.jobs import Job
from browser.runs import RUNNING
from browser.site import Site
from browser.views import HERE, POLICY
from downloads.catalogue import ModelSet
from downloads.listing import gigabytes, total_bytes
from modules.errors import OptionError, UserError
from modules.option_values import option_words
from modules.pages.page import render_page
from modules.text_files import read_content
from project.fitting import describe_fit, find_memory
from project.options import MODELS, RUN_FILE, NewOptions, find_models

USUAL_STEPS = NewOptions.__dataclass_fields__["max_train_steps"].default


@dataclass(frozen=True)
class NewForm:
    """What the fields of the page New hold."""

    folder: str = ""
    family: str = ""
    task: str = ""
    trigger: str = ""
    name: str = ""
    steps: str = str(USUAL_STEPS)
    model_files: Mapping[str, str] = field(default_factory=dict)  # by option; only those that lie elsewhere

    @classmethod
    def of_fields(cls, form: Mapping[str, Sequence[str]]) -> "NewForm":
        """Return the form that a page has sent."""
        texts = {name: "".join(values).strip() for name, values in form.items()}
        family, _, task_of_family = texts.get("family", "").partition(" ")
        return cls(
            folder=texts.get("folder", ""),
            family=family,
            task=texts.get("task", task_of_family),
            trigger=texts.get("trigger", ""),
            name=texts.get("name", ""),
            steps=texts.get("steps", "") or str(USUAL_STEPS),
            model_files={
                name.removeprefix("file_"): text
                for name, text in texts.items()
                if name.startswith("file_") and text
            },
        )

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "NewForm":
        """Return the form that a command of `new_words` stands for."""
        texts: dict[str, str] = {}
        files: dict[str, str] = {}
        for option, value in zip(words, words[1:], strict=False):
            if option == "--model_file":
                name, _, path = value.partition("=")
                files[name] = path
            elif option.startswith("--"):
                texts[option] = value
        return cls(
            folder="".join(words[2:3]),
            family=texts.get("--family", ""),
            task=texts.get("--task", ""),
            trigger=texts.get("--trigger_word", ""),
            name=texts.get("--output_name", ""),
            steps=texts.get("--max_train_steps", str(USUAL_STEPS)),
            model_files=files,
        )

    @classmethod
    def of_described(cls, described: Described, models: Path) -> "NewForm":
        """Return the form of a described folder. models: folder of the files that need no field."""
        return cls(
            folder=str(described.folder),
            family=described.family,
            task=described.task,
            trigger=described.trigger,
            name=described.name,
            steps="" if described.steps is None else str(described.steps),
            model_files={
                name: path
                for name, path in described.model_files.items()
                if not Path(path).is_relative_to(models.absolute())
            },
        )


def new_words(form: NewForm, models: Path, overwrite: bool = False) -> list[str]:
    """Return the command that describes a folder as the form says."""
    options: dict[str, Any] = {
        "--family": form.family or None,
        "--task": form.task or None,
        "--trigger_word": form.trigger or None,
        "--output_name": form.name or None,
        "--max_train_steps": form.steps or None,
        "--models": None if models == MODELS else str(models),
        "--overwrite": overwrite or None,
    }
    words = ["reelsmith", "new", form.folder, *option_words(options)]
    for name, path in form.model_files.items():
        words += ["--model_file", f"{name}={path}"]
    return words


@dataclass(frozen=True)
class ModelRow:
    """A row of the table of models."""

    model: ModelSet
    size: str  # GB on disk, or to load
    is_there: bool
    fit: str

    @property
    def value(self) -> str:
        return f"{self.model.family} {self.model.task}"


def list_model_rows(models: Path, memory: float) -> list[ModelRow]:
    """Return all models that a folder can be described for. memory: GiB of the card, 0 without one."""
    rows = []
    for model in find_models():
        missing = [part for part in model.components if part.option and not (models / part.path).exists()]
        size = f"{gigabytes(total_bytes(missing))} to load" if missing else "on disk"
        rows.append(ModelRow(model, size, is_there=not missing, fit=describe_fit(model, memory)))
    return rows


@dataclass(frozen=True)
class SaidLine:
    """A line that a command has printed; a command of ours in it becomes a button."""

    text: str
    command: str = ""


def read_said(job: Job | None) -> list[SaidLine]:
    """Return what a command has printed, line by line. Indented lines of `new` and `run` are commands."""
    if job is None:
        return []
    lines = []
    for line in job.last_lines(400).splitlines():
        text = line.strip()
        is_command = line.startswith("  ") and text.startswith(("python ", "reelsmith "))
        if text:
            lines.append(SaidLine(text, text if is_command else ""))
    return lines


class NewPages:
    """Show the page New, and do what its buttons ask for."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, request: Request) -> Response:
        form = NewForm.of_fields({name: request.query_params.getlist(name) for name in request.query_params})
        if "folder" in request.query_params and set(request.query_params) <= {"folder", "name"}:
            described = self.read_form(form.folder)
            form = replace(described, name=form.name or described.name)
        return self.answer(form)

    def read_form(self, folder_text: str) -> NewForm:
        """Return the form of a folder: of its files, else of the command that described it last."""
        folder = find_folder(self.site.runs, folder_text)
        if folder is None:
            return NewForm(folder=folder_text)
        errand = self.site.errands.find(errand_name(DESCRIBE, folder))
        is_failed = errand is not None and errand.state not in (RUNNING,) and errand.code != 0
        if is_described(folder) and not is_failed:
            try:
                return NewForm.of_described(read_described(folder), self.site.models)
            except (OSError, ValueError):
                return NewForm(folder=str(folder))
        if errand is not None:
            return NewForm.of_words(shlex.split(errand.line))
        return NewForm(folder=str(folder))

    def answer(self, form: NewForm, error: str = "") -> Response:
        """Return the page with a filled form. error: a message to show."""
        site = self.site
        folder = find_folder(site.runs, form.folder)
        described = None
        problem = error
        if form.folder and folder is None and not error:
            problem = self.explain_folder(form.folder)
        if folder is not None and is_described(folder):
            try:
                described = read_described(folder)
            except (OSError, ValueError) as reason:
                problem = problem or str(reason)
        memory = find_memory()
        rows = list_model_rows(site.models, memory)
        chosen = next((row for row in rows if row.value == f"{form.family} {form.task}"), None)
        values = {
            "form": form,
            "folders": list_media_folders(site.runs),
            "content": None if folder is None else read_media_folder(folder),
            "rows": rows,
            "families": list(dict.fromkeys(row.model.family for row in rows)),
            "tasks": [row for row in rows if row.model.family == form.family],
            "chosen": chosen,
            "options": _file_options(chosen),
            "memory": memory,
            "roots": site.runs.tops,
            "command": shlex.join(new_words(form, site.models)),
            "described": described,
            "describing": self.find_errand(DESCRIBE, folder),
            "checking": self.find_errand(CHECK, folder),
            "run_command": self.run_command(described, rows),
            "job": self.find_job(folder),
            "is_paused": site.queue.worker == "",
            "read_said": read_said,
            "can_write": not site.read_only,
            "said": problem,
        }
        return answer_page(render_page(HERE / "new.html", "New", values, POLICY), 422 if error else 200)

    def explain_folder(self, text: str) -> str:
        """Return why a text names no folder that can be described here."""
        roots = ", ".join(str(top) for top in self.site.runs.tops)
        return f"{text}: no such folder below {roots}. Choose one from the list, or drop files below."

    def find_errand(self, kind: str, folder: Path | None) -> Job | None:
        return None if folder is None else self.site.errands.find(errand_name(kind, folder))

    def find_job(self, folder: Path | None) -> Job | None:
        """Return the newest job of the queue that runs a folder; None if there is none."""
        return None if folder is None else self.site.beginnings.find_job(folder)

    def run_command(self, described: Described | None, rows: Sequence[ModelRow]) -> str:
        return "" if described is None else shlex.join(self.run_words(described))

    def run_words(self, described: Described) -> list[str]:
        return run_words(described, self.site.models)

    def change(self, request: Request, form: Form) -> Response:
        """Do what a button asks for, and show the page of the folder again."""
        sent = NewForm.of_fields(form)
        folder = find_folder(self.site.runs, sent.folder)
        if folder is None:
            return self.answer(sent, self.explain_folder(sent.folder) if sent.folder else "Choose a folder.")
        try:
            what = request.path_params["what"]
            if what == "describe":
                self.describe(folder, sent, is_replacing="replace" in form)
            elif what == "check":
                words = ["reelsmith", "run", str(folder), "--check"]
                self.site.errands.start(errand_name(CHECK, folder), words, Path.cwd())
            elif what == "stop":
                self.site.errands.stop(errand_name(CHECK, folder))
            elif what == "start":
                self.start(folder)
            else:
                return PlainTextResponse("There is no such request.", 404)
        except UserError as error:
            return self.answer(sent, str(error))
        except ChangedMeanwhileError:
            return self.answer(sent, f"{folder / RUN_FILE} has changed meanwhile. Look at it again.")
        except (OSError, ValueError) as error:
            return self.answer(sent, str(error))
        return answer_move(f"/new?{urlencode({'folder': str(folder)})}")

    def describe(self, folder: Path, form: NewForm, is_replacing: bool) -> None:
        """Describe a folder; of a described one change name and steps alone, unless it is to be replaced."""
        existing = [name for name in FILES if (folder / name).exists()]
        if existing and not is_replacing:
            self.change_described(folder, form)
            return
        words = new_words(
            NewForm(**{**form.__dict__, "folder": str(folder)}), self.site.models, overwrite=bool(existing)
        )
        self.site.errands.start(errand_name(DESCRIBE, folder), words, Path.cwd())

    def change_described(self, folder: Path, form: NewForm) -> None:
        """Write name and steps into run.toml. Raises OptionError if another field has changed."""
        have = mark_bytes(read_content(folder / RUN_FILE))
        described = read_described(folder)
        before = NewForm.of_described(described, self.site.models)
        differing = [
            label
            for label, name in {
                "Model": "family",
                "Task": "task",
                "Trigger word": "trigger",
                "model files": "model_files",
            }.items()
            if getattr(before, name) != getattr(form, name)
        ]
        if differing:
            raise OptionError(
                f"{', '.join(differing)}: another one changes all three files. Tick Write all three anew to "
                "replace them; what you changed in them by hand is replaced too."
            )
        changes: dict[str, Any] = {}
        if form.name and form.name != before.name:
            changes["output_name"] = form.name
        if form.steps != before.steps:
            if not form.steps.isdecimal() or not int(form.steps):
                raise OptionError(f"Steps {form.steps}: give a whole number, such as {USUAL_STEPS}")
            changes["max_train_steps"] = int(form.steps)
        if changes:
            change_keys(folder / RUN_FILE, TRAINING_TABLE, changes, have)

    def start(self, folder: Path) -> None:
        """Put the run of a folder into the queue, and start the queue unless other jobs wait in it."""
        self.site.beginnings.start(folder, self.run_words(read_described(folder)))


def _file_options(row: ModelRow | None) -> list[str]:
    """Return the options that name the files of a model."""
    if row is None:
        return []
    return list(dict.fromkeys(part.option.lstrip("-") for part in row.model.components if part.option))


def new_routes(site: Site) -> list[Route]:
    """Return the routes of the page New."""
    pages = NewPages(site)
    return [
        Route("/new", pages.show),
        Route("/new/{what}", answer_form(pages.change), methods=["POST"]),
    ]
