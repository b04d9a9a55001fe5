"""Answer requests for datasets: their page, its files part by part, small pictures, and edited captions."""

import contextlib
import io
import shlex
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from browser.answers import GONE, NO_WRITING, answer_body, answer_gone, answer_json, answer_page
from browser.captions import CaptionConflictError, Captions, CaptionText
from browser.datasets import MODELS, Datasets, File, FoundDataset
from browser.options import PROJECT_CONFIG
from browser.runs import Runs
from browser.views import HERE, POLICY
from modules.command import as_typed
from modules.errors import MediaError, OutputError
from modules.media.reading import first_frame
from modules.pages.page import reduce_frame, render_page
from modules.text_files import parse_json, real_path

LARGEST_SIDE = 448  # pixels of a picture in the page
MOST_PICTURES = 1000  # kept in memory, some 20 KB each
MOST_AT_ONCE = 200  # files in an answer
TOLD = 200  # how many remarks about no single file are shown
ONLY = {  # filters by name; the words that the page says
    "": "all files",
    "dropped": "dropped",
    "told": "with faults or remarks",
    "uncaptioned": "without a caption",
    "outdated": "caches missing or out of date",
}
SHOWN = (
    *("table", "kind", "size", "frames", "fps", "fit", "cut_percent", "lengths", "dropped", "short"),
    *("captions", "faults", "remarks", "has_mask"),
)


def is_chosen(file: File, words: Sequence[str], only: str) -> bool:
    """Return whether filters keep a file. words: all must be in its name or caption. only: a key of ONLY."""
    if words:
        name = Path(file["parts"][0]["path"]).name
        whole = "\n".join([name, file["text"] or "", *file["captions"]]).lower()
        if not all(word in whole for word in words):
            return False
    if only == "dropped":
        return bool(file["dropped"])
    if only == "told":
        return bool(file["faults"] or file["remarks"])
    if only == "uncaptioned":
        return not any([file["edited"]] if "edited" in file else file["captions"] or [file["text"]])
    if only == "outdated":
        if "edited" in file and file["caches"]:
            return not file["dropped"]
        states = [state for one in file["caches"].values() for state, _ in one.values()]
        return not file["dropped"] and (not states or any(state != "valid" for state in states))
    return True


class Thumbnails:
    """Make small pictures of the first frames of files, and cache the newest ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._two = threading.Semaphore(2)  # two at most are decoded at once

    def make(self, part: Mapping[str, Any], stamp: int) -> bytes:
        """Return a JPEG. part: as the report lists it. Raises MediaError or OSError if it cannot be read."""
        key = part["path"], stamp
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._two:
            frame = self._read(part)
        data = io.BytesIO()
        Image.fromarray(reduce_frame(frame, LARGEST_SIDE)[..., :3]).save(data, format="JPEG", quality=80)
        with self._lock:
            self._kept[key] = data.getvalue()
            while len(self._kept) > MOST_PICTURES:
                self._kept.popitem(last=False)
        return data.getvalue()

    def _read(self, part: Mapping[str, Any]) -> Any:
        path = Path(part["path"])
        if "in" not in part:
            return first_frame(path)
        if "offset" not in part:
            raise MediaError(f"{path} is in a table")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / f"copy{path.suffix}"
            with Path(part["in"]).open("rb") as file, copy.open("wb") as target:
                file.seek(part["offset"])
                shutil.copyfileobj(io.BytesIO(file.read(part["bytes"])), target)
            return first_frame(copy)


class DatasetPages:
    """Show datasets as pages and JSON. Raises OSError if files are gone."""

    def __init__(self, runs: Runs, read_only: bool) -> None:
        self.runs, self.read_only = runs, read_only
        self.datasets, self.captions, self.thumbnails = Datasets(runs), Captions(), Thumbnails()

    def items(self, dataset: FoundDataset, asked: Mapping[str, str]) -> dict[str, Any]:
        """Return files of a dataset, and its state. asked: text, only, from and count.

        Raises ValueError if `from` or `count` is not a number.
        """
        first, count = (int(asked.get(name) or 0) for name in ("from", "count"))
        try:
            outside = self.datasets.outside(dataset)
            measured = None if outside else self.datasets.measure(dataset)
        except OSError as error:
            return {"state": "gone", "error": f"{dataset.path}: {error.strerror or error}"}
        except ValueError as error:
            return {"state": "failed", "error": f"{dataset.path}: {error}"}
        if measured is None:
            folders = [str(each) for each in dict.fromkeys([*self.runs.tops, *outside])]
            return {"state": "outside", "command": as_typed(["python", "tools/run_browser.py", *folders])}
        words = asked.get("text", "").lower().split()
        only = asked.get("only", "")
        with self.datasets.lock:
            files = dict(measured.files)
            told = {
                "state": "measuring" if measured.is_running else "failed" if measured.error else "ready",
                "error": measured.error,
                "version": measured.version,
                "outside": measured.outside,
                "remarks": measured.remarks[:TOLD],
                "totals": measured.totals,
                "model": measured.model,
                "decodes": measured.decodes,
                "seconds": round(time.monotonic() - measured.began),
                "media": measured.num_media,
            }
        chosen = [(id, file) for id, file in files.items() if is_chosen(file, words, only)]
        part = chosen[max(0, first) : max(0, first) + min(max(0, count), MOST_AT_ONCE)]
        shown = [self.show(dataset, id, file) for id, file in part]
        counts = {name: sum(is_chosen(file, (), name) for file in files.values()) for name in ONLY}
        items = sum(number for file in files.values() for _, number in file["lengths"])
        return {**told, "counts": counts, "items": items, "chosen": len(chosen), "files": shown}

    def show(self, dataset: FoundDataset, id: str, file: File) -> dict[str, Any]:
        """Return the JSON values that the page shows of a file, with its current caption."""
        caption = self.caption(dataset, file)
        caches = {tag: dict(states) for tag, states in file["caches"].items()}
        if caption["can_edit"] and caption["text"] != (file["text"] or ""):
            for states in caches.values():
                if states["text"][0] == "valid":
                    states["text"] = ("stale", "the caption has changed since: cache the captions again")
        pictures = [
            {"name": Path(part["path"]).name, "address": self.address(dataset, id, number, part)}
            for number, part in enumerate(file["parts"])
        ]
        return {
            "id": id,
            **{name: file[name] for name in SHOWN},
            "caches": caches,
            "pictures": pictures,
            "caption": caption,
        }

    def address(self, dataset: FoundDataset, id: str, number: int, part: Mapping[str, Any]) -> str | None:
        place = Path(part.get("in", part["path"]))
        if not self.datasets.is_open(dataset, place) or ("in" in part and "offset" not in part):
            return None
        return f"/dataset/{dataset.id}/picture/{id}/{number}/{place.stat().st_mtime_ns}"

    def caption(self, dataset: FoundDataset, file: File) -> dict[str, Any]:
        """Return the current caption of a file, and whether it can be edited here, else the reason."""
        where, found, saves, mark = "", CaptionText(), 0, ""
        path = self.caption_path(dataset, file)
        if path is None:
            text = "\n".join(file["captions"])
            where = f"It stands in {file['caption_list']}: edit it there." if file["caption_list"] else GONE
            return {"text": text, "can_edit": False, "where": where, "mark": "", "saves": 0}
        try:
            found, mark, saves = self.captions.read(path)
        except UnicodeDecodeError:
            where = "It is not UTF-8: --check --repair_captions of the caching script converts it."
        except OSError as error:
            where = f"It cannot be read: {error.strerror or error}"
        where = where or (NO_WRITING if self.read_only else "")
        return {"text": found.text, "can_edit": not where, "where": where, "mark": mark, "saves": saves}

    def caption_path(self, dataset: FoundDataset, file: File) -> Path | None:
        """Return the real path of a caption file, which need not exist; None if not inside the folders."""
        if file["caption_file"] is None:
            return None
        path = Path(file["caption_file"])
        inside = path if path.exists() or path.is_symlink() else path.parent
        return real_path(path) if self.datasets.is_open(dataset, inside) else None

    def write_caption(self, dataset: FoundDataset, id: str, asked: Mapping[str, Any]) -> tuple[int, Any]:
        """Save or undo a caption; return status and answer. asked: what, have, and text to save."""
        file = self.datasets.measure(dataset).files.get(id)
        path = None if file is None else self.caption_path(dataset, file)
        if file is None or path is None:
            return 404, {"error": GONE}
        what, have, text = (str(asked.get(name, "")) for name in ("what", "have", "text"))
        before, status, error = self.datasets.mark(dataset), 200, ""
        try:
            if what == "save":
                self.captions.save(path, text, have)
            elif what in ("undo", "back"):
                self.captions.undo(path, have, what == "back")
            else:
                return 404, {"error": GONE}
            self.datasets.forgive(dataset, before)
            self.note_edited(dataset, file)
        except CaptionConflictError:
            status, error = 409, "The file has changed since it was read."
        except LookupError:
            status, error = 409, "There is nothing to undo."
        except (ValueError, OSError, OutputError) as problem:
            status, error = 500 if isinstance(problem, (OSError, OutputError)) else 400, str(problem)
        return status, {"error": error, "file": self.show(dataset, id, file)}

    def note_edited(self, dataset: FoundDataset, file: File) -> None:
        """Note in a measured file that its caption is another one now: counts are made of what is noted."""
        text = self.caption(dataset, file)["text"]
        with self.datasets.lock:
            file.pop("edited", None)
            if text != (file["text"] or ""):
                file["edited"] = text

    def show_list(self, _: Request) -> Response:
        found = [(dataset, *self.datasets.glance(dataset)) for dataset in self.datasets.look()]
        values = {"dataset": None, "found": found, "roots": self.runs.roots}
        return answer_page(render_page(HERE / "dataset.html", "Datasets", values, POLICY))

    def show_page(self, dataset: FoundDataset, _: Request) -> Response:  # its script asks for the files
        values = {
            "dataset": dataset,
            "folder": dataset.path.parent,
            "only": ONLY,
            "models": list(MODELS),
            "can_write": not self.read_only,
            "run_line": self.run_line(dataset),
        }
        return answer_page(render_page(HERE / "dataset.html", dataset.name, values, POLICY))

    def run_line(self, dataset: FoundDataset) -> str:
        """Return the line that trains on a folder that `new` has described; empty if it has not."""
        folder = dataset.path.parent
        is_described = dataset.path.name == PROJECT_CONFIG and (folder / "run.toml").is_file()
        return shlex.join(["reelsmith", "run", str(folder)]) if is_described else ""

    def show_items(self, dataset: FoundDataset, request: Request) -> Response:
        try:
            return answer_json(self.items(dataset, request.query_params))
        except ValueError:
            return PlainTextResponse("from and count are numbers of files.", 400)

    def show_first(self, dataset: FoundDataset, _: Request) -> Response:
        """Return a small picture of a dataset's first file, for the list."""
        media, _words = self.datasets.glance(dataset)
        try:
            if media.first is None or not self.datasets.is_open(dataset, media.first):
                return answer_gone()
            part = {"path": str(media.first)}
            picture = self.thumbnails.make(part, media.first.stat().st_mtime_ns)
        except MediaError:
            return answer_gone()
        return Response(picture, media_type="image/jpeg")

    def show_picture(self, dataset: FoundDataset, request: Request) -> Response:
        asked = request.path_params
        if self.datasets.outside(dataset):
            return answer_gone()
        file = self.datasets.measure(dataset).files.get(asked["item"])
        parts = file["parts"] if file else ()
        if asked["number"] >= len(parts):
            return answer_gone()
        part = parts[asked["number"]]
        if self.address(dataset, asked["item"], asked["number"], part) != request.url.path:
            return answer_gone()  # it lies elsewhere, or is not what the page was told of
        try:
            picture = self.thumbnails.make(part, asked["stamp"])
        except (MediaError, StopIteration):
            return answer_gone()
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        return Response(picture, media_type="image/jpeg", headers=headers)

    def write(self, dataset: FoundDataset, request: Request, body: bytes) -> Response:
        try:
            asked = parse_json(body.decode())
            if not isinstance(asked, dict):
                raise ValueError("it is no object")
            if self.datasets.outside(dataset):
                return answer_gone()
            if "item" not in request.path_params:
                model = str(asked.get("model"))
                self.datasets.start(dataset, bool(asked.get("decodes")), model if model in MODELS else None)
                return Response(status_code=204)
            status, answer = self.write_caption(dataset, request.path_params["item"], asked)
            return answer_json(answer, status)
        except ValueError as error:
            return PlainTextResponse(f"This is no request: {error}", 400)


def dataset_routes(runs: Runs, read_only: bool) -> list[Route]:
    """Return the routes of the pages for datasets. read_only: nothing can be written or asked for."""
    pages = DatasetPages(runs, read_only)

    def guard(show: Callable[..., Response]) -> Callable[..., Response]:
        def answer(request: Request, *body: bytes) -> Response:
            dataset = pages.datasets.find(request.path_params["id"])
            with contextlib.suppress(OSError):
                return answer_gone() if dataset is None else show(dataset, request, *body)
            return answer_gone()

        return answer

    place = "/dataset/{id}"
    return [
        Route("/datasets", pages.show_list),
        Route(f"{place}/", guard(pages.show_page)),
        Route(f"{place}/first", guard(pages.show_first)),
        Route(f"{place}/items", guard(pages.show_items)),
        Route(f"{place}/picture/{{item}}/{{number:int}}/{{stamp:int}}", guard(pages.show_picture)),
        Route(f"{place}/measure", answer_body(guard(pages.write)), methods=["POST"]),
        Route(f"{place}/caption/{{item}}", answer_body(guard(pages.write)), methods=["POST"]),
    ]
