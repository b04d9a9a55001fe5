"""Answer requests for datasets: their page, their files part by part, small images, and edited captions."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.options import PROJECT_CONFIG
from browser.core.page_root import add_root
from browser.core.responses import (
    NO_WRITING,
    NOT_FOUND,
    answer_body,
    answer_json,
    answer_not_found,
    answer_not_found_page,
    answer_template,
    answer_text,
)
from browser.core.server_state import Site
from browser.folders.caption_keys import describe_formats, find_folder_caption_format
from browser.folders.captions import CaptionFiles, caption_values
from browser.folders.datasets import IMAGE_MODELS, MODELS, Datasets, File, FoundDataset, Measurement
from browser.folders.described_folder import is_described
from browser.folders.offered_folders import find_open_folder, list_table_folders
from browser.folders.thumbnails import Thumbnails, answer_cacheable_jpeg, answer_placeholder, read_page_slice
from browser.jobs.command_lines import format_command
from browser.runs.runs import Runs
from modules.errors import MediaError
from modules.pages.language import say
from modules.text_files import parse_json, real_path

MAX_FOLDERS = 100  # maximum number of a dataset's folders for which tools are offered
MAX_REMARKS = 200  # maximum number of general remarks shown
FILTERS = {  # filter -> label
    "": say("all files"),
    "dropped": "dropped",
    "told": say("with faults or remarks"),
    "uncaptioned": say("without a caption"),
    "outdated": say("caches missing or out of date"),
}
# fmt: off
REPORT_KEYS = (
    "table", "kind", "size", "frames", "fps", "fit", "cut_percent", "lengths", "dropped", "short",
    "captions", "faults", "remarks", "has_mask",
)
# fmt: on


def passes_filters(file: File, search_terms: Sequence[str], filter_key: str) -> bool:
    """Return whether a file of a dataset passes the filters of the dataset page.

    Args:
        search_terms: Strings that must all occur in the file's name or caption.
        filter_key: Key of FILTERS, the choices of the page.
    """
    if not _contains_terms(file, search_terms):
        return False
    if filter_key == "dropped":
        return bool(file["dropped"])
    if filter_key == "told":  # files about which the report has a message
        return bool(file["faults"] or file["remarks"])
    if filter_key == "uncaptioned":
        # the report does not contain a caption that was edited on the page later
        if "edited" in file:
            return not file["edited"]
        return not any(file["captions"] or [file["text"]])
    if filter_key == "outdated":
        return not file["dropped"] and _is_outdated(file)
    return True


def _contains_terms(file: File, search_terms: Sequence[str]) -> bool:
    """Return whether a file's name or caption contains every search term."""
    if not search_terms:
        return True
    name = Path(file["parts"][0]["path"]).name
    text = "\n".join([name, file["text"] or "", *file["captions"]]).lower()
    return all(word in text for word in search_terms)


def _is_outdated(file: File) -> bool:
    """Return whether a file's latent or text caches are missing or invalid."""
    if "edited" in file and file["caches"]:
        return True
    states = [state for parts in file["caches"].values() for state, _ in parts.values()]
    return not states or any(state != "valid" for state in states)


class DatasetPages:
    """Shows datasets as pages and JSON. Its methods raise OSError if files have been removed."""

    def __init__(self, runs: Runs, read_only: bool) -> None:
        self.runs = runs
        self.read_only = read_only
        self.datasets = Datasets(runs)
        self.captions = CaptionFiles()
        self.thumbnails = Thumbnails()

    def list_files(self, dataset: FoundDataset, query: Mapping[str, str]) -> dict[str, Any]:
        """Return one page of a dataset's files, and the state of its measurement, as JSON values.

        Args:
            query: `text` and `only` filter the files; `from` and `count` select a range.

        Raises:
            ValueError: If `from` or `count` is not a number.
        """
        page_slice = read_page_slice(query)
        try:
            hidden_folders = self.datasets.list_hidden_folders(dataset)
            if hidden_folders:
                return self._explain_hidden_folders(hidden_folders)
            measurement = self.datasets.measure(dataset)
        except OSError as error:
            return {"state": "gone", "error": f"{dataset.path}: {error.strerror or error}"}
        except ValueError as error:
            return {"state": "failed", "error": f"{dataset.path}: {error}"}
        with self.datasets.lock:
            files = dict(measurement.files)
            status = _describe_status(measurement)
        search_terms = query.get("text", "").lower().split()
        filter_key = query.get("only", "")
        chosen_ids = [id for id, file in files.items() if passes_filters(file, search_terms, filter_key)]
        file_values = [self.describe_file(dataset, id, files[id]) for id in chosen_ids[page_slice]]
        return {
            **status,
            "counts": {
                name: sum(passes_filters(file, (), name) for file in files.values()) for name in FILTERS
            },
            "items": sum(number for file in files.values() for _, number in file["lengths"]),
            "chosen": len(chosen_ids),
            "files": file_values,
        }

    def _explain_hidden_folders(self, folders: Sequence[Path]) -> dict[str, str]:
        """Return the command that shows folders the page may not read yet, as JSON values."""
        names = [str(folder) for folder in dict.fromkeys([*self.runs.root_folders, *folders])]
        return {"state": "outside", "command": format_command(["python", "tools/run_browser.py", *names])}

    def describe_file(self, dataset: FoundDataset, id: str, file: File) -> dict[str, Any]:
        """Return the JSON values of a file, with its current caption."""
        caption = self.describe_caption(dataset, file)
        is_edited = caption["can_edit"] and caption["text"] != (file["text"] or "")
        images = [
            {"name": Path(part["path"]).name, "address": self.image_address(dataset, id, index, part)}
            for index, part in enumerate(file["parts"])
        ]
        return {
            "id": id,
            **{key: file[key] for key in REPORT_KEYS},
            "caches": _with_stale_text(file["caches"]) if is_edited else file["caches"],
            "pictures": images,
            "caption": caption,
        }

    def image_address(
        self, dataset: FoundDataset, id: str, part_index: int, part: Mapping[str, Any]
    ) -> str | None:
        """Return the URL of a thumbnail of one file of a dataset item, such as its clip or control image.

        Returns None if the file may not be shown, or if it is in an archive at an unknown offset.
        """
        file_path = Path(part.get("in", part["path"]))
        if not self.datasets.may_show(dataset, file_path) or ("in" in part and "offset" not in part):
            return None
        return add_root(f"/dataset/{dataset.id}/picture/{id}/{part_index}/{file_path.stat().st_mtime_ns}")

    def describe_caption(self, dataset: FoundDataset, file: File) -> dict[str, Any]:
        """Return the JSON values of a file's current caption, with the reason if this page cannot edit it."""
        path = self.caption_path(dataset, file)
        if path is None:
            text = "\n".join(file["captions"])
            reason = NOT_FOUND
            if file["caption_list"]:
                reason = say(
                    "The caption is in %(caption_list)s: edit it there.", caption_list=file["caption_list"]
                )
            return caption_values(reason, text)
        remedy = say("--check --repair_captions of the caching script converts it.")
        return self.captions.describe(path, NO_WRITING if self.read_only else "", remedy)

    def caption_path(self, dataset: FoundDataset, file: File) -> Path | None:
        """Return the real path of a caption file, which need not exist.

        Returns None if it is outside the shown folders.
        """
        if file["caption_file"] is None:
            return None
        path = Path(file["caption_file"])
        inside = path if path.exists() or path.is_symlink() else path.parent
        return real_path(path) if self.datasets.may_show(dataset, inside) else None

    def write_caption(self, dataset: FoundDataset, id: str, query: Mapping[str, Any]) -> tuple[int, Any]:
        """Save a caption or undo saves, and return the HTTP status and the JSON response.

        `query` contains `what` (save, undo or back), `have` (checksum of the caption file) and `text`.
        """
        file = self.datasets.measure(dataset).files.get(id)
        path = None if file is None else self.caption_path(dataset, file)
        if file is None or path is None:
            return 404, {"error": NOT_FOUND}
        fingerprint_before = self.datasets.compute_fingerprint(dataset)
        status, error = self.captions.change(path, query)
        if not error:
            self.datasets.accept_edit(dataset, fingerprint_before)
            # mark the caption as edited, so that counts stay right without a new measurement
            text = self.describe_caption(dataset, file)["text"]
            with self.datasets.lock:
                file.pop("edited", None)
                if text != (file["text"] or ""):
                    file["edited"] = text
        return status, {"error": error, "file": self.describe_file(dataset, id, file)}

    def show_list(self, _: Request) -> Response:
        """Return the page that lists all datasets."""
        datasets = [(dataset, *self.datasets.describe(dataset)) for dataset in self.datasets.list_all()]
        values = {
            "dataset": None,
            "found": datasets,
            "roots": self.runs.roots,
            "can_write": not self.read_only,
        }
        return answer_template("datasets/dataset.html", say("Datasets"), values)

    # the page's script requests the files
    def show_page(self, dataset: FoundDataset, _: Request) -> Response:
        """Return the page of one dataset. The page's script requests the list of its files."""
        values = {
            "dataset": dataset,
            "folder": dataset.path.parent,
            "only": FILTERS,
            "models": {name: name.replace(IMAGE_MODELS, say("models of images")) for name in MODELS},
            "can_write": not self.read_only,
            "run_line": self.run_line(dataset),
            "tool_folders": self.list_tool_folders(dataset),
            "caption_format": dataset.caption_format or find_folder_caption_format(dataset.path.parent),
            "caption_formats": describe_formats(),
        }
        return answer_template("datasets/dataset.html", dataset.name, values)

    def run_line(self, dataset: FoundDataset) -> str:
        """Return the `run` command of a dataset that `new` has written; "" for other datasets."""
        argv = ["reelsmith", "run", str(dataset.path.parent)]
        return shlex.join(argv) if _is_project_dataset(dataset) else ""

    def list_tool_folders(self, dataset: FoundDataset) -> list[Path]:
        """Return the folders to tag or mask: the folder of run.toml, or else the dataset's media folders."""
        if _is_project_dataset(dataset):
            folder = find_open_folder(self.runs, str(dataset.path.parent))
            return [] if folder is None else [folder]
        return list_table_folders(self.runs, dataset.path, dataset.base_folder)[:MAX_FOLDERS]

    def show_items(self, dataset: FoundDataset, request: Request) -> Response:
        """Respond with a range of a dataset's files as JSON; 400 if the range is not valid."""
        try:
            return answer_json(self.list_files(dataset, request.query_params))
        except ValueError:
            return answer_text("from and count are numbers of files.", 400)

    def show_first(self, dataset: FoundDataset, _: Request) -> Response:
        """Respond with a thumbnail of a dataset's first file, for the list of datasets."""
        media, _words = self.datasets.describe(dataset)
        try:
            if media.shown_file is None or not self.datasets.may_show(dataset, media.shown_file):
                return answer_not_found()
            part = {"path": str(media.shown_file)}
            image = self.thumbnails.make(part, media.shown_file.stat().st_mtime_ns)
        except (MediaError, StopIteration):
            return answer_placeholder()
        return Response(image, media_type="image/jpeg")

    def show_image(self, dataset: FoundDataset, request: Request) -> Response:
        """Respond with a thumbnail of one file of a training item, such as its clip or control image.

        The status is 404 if the file is outside the roots, or has changed since the page was loaded.
        """
        item_id = request.path_params["item"]
        part_index = request.path_params["number"]
        if self.datasets.list_hidden_folders(dataset):
            return answer_not_found()
        item = self.datasets.measure(dataset).files.get(item_id)
        if item is None or part_index >= len(item["parts"]):
            return answer_not_found()
        part = item["parts"][part_index]
        current_address = self.image_address(dataset, item_id, part_index, part)
        if current_address != request.url.path:
            return answer_not_found()
        try:
            image = self.thumbnails.make(part, request.path_params["stamp"])
        except (MediaError, StopIteration):
            return answer_placeholder()
        return answer_cacheable_jpeg(image)

    def start_measuring(self, dataset: FoundDataset, _: Request, body: bytes) -> Response:
        """Measure a dataset in the background. The JSON body has `model`, a key of MODELS, and `decodes`."""
        try:
            query = _parse_object(body)
            if self.datasets.list_hidden_folders(dataset):
                return answer_not_found()
            model = str(query.get("model"))
            reads_whole_files = bool(query.get("decodes"))
            self.datasets.start_measuring(dataset, reads_whole_files, model if model in MODELS else None)
            return Response(status_code=204)
        except ValueError as error:
            return answer_text(f"This is not a request: {error}", 400)

    def change_caption(self, dataset: FoundDataset, request: Request, body: bytes) -> Response:
        """Save one file's caption, or undo a save, as the JSON body says (`CaptionFiles.change`)."""
        try:
            query = _parse_object(body)
            if self.datasets.list_hidden_folders(dataset):
                return answer_not_found()
            status, answer = self.write_caption(dataset, request.path_params["item"], query)
            return answer_json(answer, status)
        except ValueError as error:
            return answer_text(f"This is not a request: {error}", 400)


def _parse_object(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in the body of a request. Raises ValueError if the body is not a JSON object."""
    query = parse_json(body.decode())
    if not isinstance(query, dict):
        raise ValueError("it is not an object")
    return query


def _is_project_dataset(dataset: FoundDataset) -> bool:
    """Return whether `new` has written the dataset's file, next to a run.toml."""
    return dataset.path.name == PROJECT_CONFIG and is_described(dataset.path.parent)


def _with_stale_text(caches: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the states of a file's caches after its caption was edited: valid text caches become stale."""
    stale = ("stale", say("the caption has changed since: cache the captions again"))
    result = {}
    for tag, states in caches.items():
        result[tag] = dict(states)
        if states["text"][0] == "valid":
            result[tag]["text"] = stale
    return result


def _describe_status(measurement: Measurement) -> dict[str, Any]:
    """Return the JSON values that show the state of a measurement."""
    state = "failed" if measurement.error else "ready"
    if measurement.is_running:
        state = "measuring"
    return {
        "state": state,
        "error": measurement.error,
        "version": measurement.version,
        "outside": measurement.num_hidden_files,  # number of files that may not be shown
        "remarks": measurement.remarks[:MAX_REMARKS],
        "totals": measurement.totals,
        "model": measurement.model,
        "decodes": measurement.reads_whole_files,  # whether whole files were read, not only headers
        "seconds": round(time.monotonic() - measurement.started_at),
        "media": measurement.num_media,
    }


def dataset_routes(site: Site) -> list[Route]:
    """Return the routes of the dataset pages."""
    pages = DatasetPages(site.runs, site.read_only)

    def with_dataset(handler: Callable[..., Response]) -> Callable[..., Response]:
        """Return a request handler that calls `handler` with the dataset whose id is in the URL."""

        def handle(request: Request, *body: bytes) -> Response:
            dataset = pages.datasets.find(request.path_params["id"])
            if dataset is not None:
                return handler(dataset, request, *body)
            is_page = request.url.path.count("/") == 3  # "/dataset/ID/"
            return answer_not_found_page(request) if is_page else answer_not_found()

        return handle

    address = "/dataset/{id}"
    return [
        Route("/datasets", pages.show_list),
        Route(f"{address}/", with_dataset(pages.show_page)),
        Route(f"{address}/first", with_dataset(pages.show_first)),
        Route(f"{address}/items", with_dataset(pages.show_items)),
        Route(f"{address}/picture/{{item}}/{{number:int}}/{{stamp:int}}", with_dataset(pages.show_image)),
        Route(f"{address}/measure", answer_body(with_dataset(pages.start_measuring)), methods=["POST"]),
        Route(
            f"{address}/caption/{{item}}", answer_body(with_dataset(pages.change_caption)), methods=["POST"]
        ),
    ]
