"""The Models page: released files on disk, what each task needs, downloading and removing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.bin_folder import FOLDER as BIN
from browser.core.responses import Form, answer_form, answer_move, answer_template, answer_unknown, read_query
from browser.core.server_state import Site, open_bin
from browser.jobs.model_files import (
    PartCache,
    TaskFiles,
    find_download,
    find_task,
    list_downloads,
    list_parts_on_disk,
    list_tasks,
    list_unknown_files,
    name_download,
    name_task,
    remove_parts,
)
from browser.pages.models.hub_login import describe_login
from browser.runs.runs import RUNNING
from downloads.listing import UNVERIFIED, gigabytes
from modules.atomic_write import free_bytes
from modules.errors import UserError
from modules.pages.language import refusal, say
from project.model_sizes import describe_fit, find_memory


@dataclass(frozen=True)
class SelectedTask:
    """The model and task that the Models page shows, with or without 8-bit text encoders."""

    family: str = ""
    task: str = ""
    in_fp8: bool = False

    @classmethod
    def from_fields(cls, fields: Mapping[str, Sequence[str]]) -> "SelectedTask":
        """Read the model's family and task from the fields of a form or a query."""
        family = "".join(fields.get("family", ()))
        task = "".join(fields.get("task", ()))
        return cls(family, task, in_fp8="fp8" in fields)

    @property
    def address(self) -> str:
        """URL of the page that shows the model."""
        query = {"family": self.family, "task": self.task}
        if self.in_fp8:
            query["fp8"] = "yes"
        return f"/models?{urlencode(query)}"


class ModelPages:
    """Shows the Models page, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, request: Request) -> Response:
        """Return the Models page, with the model that the query selects."""
        query = request.query_params
        chosen = SelectedTask.from_fields(read_query(request))
        return self.answer(chosen, is_removing=query.get("ask") == "remove", moved=query.get("moved", ""))

    def answer(
        self, chosen: SelectedTask, error: str = "", is_removing: bool = False, moved: str = ""
    ) -> Response:
        """Return the Models page.

        Args:
            is_removing: Whether to ask which parts to remove.
            moved: Name of the bin's folder that contains the files that were just removed.
        """
        models = self.site.models
        part_cache: PartCache = {}  # each part is searched on disk once
        tasks = list_tasks(models, part_cache=part_cache)
        files = None
        if chosen.family:
            files = find_task(models, chosen.family, chosen.task, chosen.in_fp8, part_cache)
            if files is None and not error:
                error = say(
                    "%(family)s %(task)s: the list of models does not have this task.",
                    family=chosen.family,
                    task=chosen.task,
                )
        values = {
            "tasks": tasks,
            "memory": find_memory(),
            "describe_fit": describe_fit,
            "chosen": chosen,
            **self.task_values(files, part_cache),
            "downloads": list_downloads(self.site.background_jobs, models),
            "is_removing": is_removing,
            **self.disk_values(part_cache, moved),
            "gigabytes": gigabytes,
            "unverified": UNVERIFIED,
            "login": describe_login(),
            "can_write": not self.site.read_only,
            "message": error,
        }
        return answer_template("models/models.html", say("Models"), values, is_rejected=error != "")

    def disk_values(self, part_cache: PartCache, moved: str) -> dict[str, object]:
        """Return the template values for the files in the models folder and in the bin.

        `moved` is the name of the bin's folder that contains the files that were just removed.
        """
        models = self.site.models
        parts_on_disk = list_parts_on_disk(models, part_cache)
        return {
            "on_disk": parts_on_disk,
            "total": gigabytes(sum(part.size_bytes for part in parts_on_disk)),
            "unknown": list_unknown_files(models),
            "models": models.absolute(),
            "free": self.describe_free(),
            "bin": self.site.runs.root_folders[0] / BIN,
            "moved": self.find_bin_entry(moved),
        }

    def task_values(self, files: TaskFiles | None, part_cache: PartCache) -> dict[str, object]:
        """Return the template values for the files of the selected task. `files` is None without a task."""
        models = self.site.models
        if files is None:
            return {
                "files": None,
                "is_full": False,
                "can_be_smaller": False,
                "command": "",
                "download": None,
                "removable": [],
                "sharing": {},
            }
        tasks = list_tasks(models, files.in_fp8, part_cache)
        # titles of other complete models on disk that use the same part, by its path
        complete = {task.name for task in tasks if task.is_there and task.name != files.name}
        sharing = {
            part.path: [say(model.title) for model in part.models if name_task(model) in complete]
            for part in files.parts
        }
        return {
            "files": files,
            "is_full": _is_full(files),
            "can_be_smaller": files.in_fp8 or any(part.component.in_fp8 for part in files.parts),
            "command": files.shown_download(models),
            "download": find_download(self.site.background_jobs, files, models),
            "removable": [part for part in files.parts if part.size_bytes],
            "sharing": sharing,
        }

    def find_bin_entry(self, name: str) -> Path | str:
        """Return the path of a folder in the bin, which has a folder on each disk; "" if there is none."""
        for bin_folder in open_bin(self.site).folders:
            if name and (bin_folder / name).is_dir():
                return bin_folder / name
        return ""

    def describe_free(self) -> str:
        """Return the free disk space for models in GB, as text."""
        try:
            return gigabytes(free_bytes(self.site.models.absolute()))
        except OSError:
            return say("an unknown number of GB")

    def change(self, request: Request, form: Form) -> Response:
        """Download a model's files, stop a download, or remove parts; then show the page again."""
        selected_task = SelectedTask.from_fields(form)
        action = request.path_params["what"]
        files = find_task(self.site.models, selected_task.family, selected_task.task, selected_task.in_fp8)
        if files is None:
            return self.answer(selected_task, say("Choose a task from the list."))
        bin_entry = ""
        try:
            if action == "load":
                self.load(files, is_accepted="accept" in form)
            elif action == "stop":
                name = name_download(self.site.models, selected_task.family, selected_task.task)
                self.site.background_jobs.stop(name)
            elif action == "remove":
                bin_entry = self.remove(files, form.get("part", ()))
            else:
                return answer_unknown()
        except UserError as error:
            return self.answer(selected_task, str(error), is_removing=action == "remove")
        except OSError as error:
            return self.answer(selected_task, f"{error.filename or 'a file'}: {error.strerror or error}")
        return answer_move(
            f"{selected_task.address}&{urlencode({'moved': bin_entry})}"
            if bin_entry
            else selected_task.address
        )

    def load(self, files: TaskFiles, is_accepted: bool) -> None:
        """Start the download of a model's files. Raises UserError if its licenses are not accepted."""
        if not is_accepted:
            raise refusal("Read the licenses of its parts, and tick that you accept them.")
        if _is_full(files):
            raise refusal("All of its parts are on disk.")
        models = self.site.models
        name = name_download(models, files.model.family, files.model.task)
        self.site.background_jobs.start(name, files.download_words(models), Path.cwd())

    def remove(self, files: TaskFiles, parts: Sequence[str]) -> str:
        """Move model parts into the bin, and return the name of the bin's folder that contains them."""
        for download in list_downloads(self.site.background_jobs, self.site.models):
            if download.state != RUNNING:
                continue
            loading_files = find_task(self.site.models, download.family, download.task, files.in_fp8)
            # parts that a running download still writes
            shared_paths = (
                []
                if loading_files is None
                else [part.path for part in loading_files.parts if part.path in parts]
            )
            if shared_paths:
                raise refusal(
                    "%(shared)s is being downloaded for %(title)s: stop that first.",
                    shared=shared_paths[0],
                    title=say(download.files.model.title),
                )
        return remove_parts(self.site.models, files, parts, open_bin(self.site)).name


def _is_full(files: TaskFiles) -> bool:
    """Return whether all parts are on disk with their released size."""
    return files.is_there and not any(part.has_other_size for part in files.parts)


def model_routes(site: Site) -> list[Route]:
    """Return the routes of the Models page."""
    pages = ModelPages(site)
    return [
        Route("/models", pages.show),
        Route("/models/{what}", answer_form(pages.change), methods=["POST"]),
    ]
