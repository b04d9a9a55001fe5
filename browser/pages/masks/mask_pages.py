"""The page on which masks are reviewed: accepted, inverted, removed, and corrected with a brush."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import (
    NOT_FOUND,
    answer_body,
    answer_json,
    answer_not_found,
    answer_not_found_page,
    answer_template,
)
from browser.core.server_state import Site
from browser.folders.described_folder import ChangedMeanwhileError
from browser.folders.offered_folders import find_open_folder, list_dataset_media_folders
from browser.pages.masks.mask_review import ADDRESS, MASK_ACTIONS, MaskConflictError, MaskImage, MaskReview
from browser.pages.masks.mask_use import use_first_mask
from data_tools.masks.places import MaskEntry
from modules.errors import UserError
from modules.pages.language import say
from modules.text_files import parse_json

DRAWN_ADDRESS = f"{ADDRESS}/drawn"
MAX_DRAWN_MASK_BYTES = 32 << 20  # maximum bytes of a drawn mask
PAGE_SIZE = 24  # media on a page for browsers without scripts


class MaskPages:
    """Shows the masks of a folder, and changes one at a time."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.review = MaskReview(site.runs)

    def find_folder(self, query: Mapping[str, str]) -> Path | None:
        """Return the folder in a query; None if it is outside the roots or must not be changed."""
        return find_open_folder(self.site.runs, query.get("folder", ""))

    def show(self, request: Request) -> Response:
        """Return the Masks page. It shows one file at a time or, without JavaScript, PAGE_SIZE files."""
        query = request.query_params
        folder = self.find_folder(query)
        if folder is None:
            return answer_not_found_page(request)
        folders = [folder]
        problem = ""
        media_files: list[MaskEntry] = []
        try:
            folders = list_dataset_media_folders(self.site.runs, folder)
            if len(folders) == 1:  # for several folders, the page only lists links
                media_files = self.review.list_media(folders[0])
        except (UserError, OSError) as error:
            problem = str(error)
        first_index = read_number(query, "from", len(media_files))  # for browsers without scripts
        values = {
            "folder": folders[0] if len(folders) == 1 else folder,
            "folders": folders,
            "total": len(media_files),
            "first": first_index,
            "next": first_index + PAGE_SIZE if first_index + PAGE_SIZE < len(media_files) else None,
            "items": [
                self.review.describe(folders[0], media_file)
                for media_file in media_files[first_index : first_index + PAGE_SIZE]
            ],
            "can_write": not self.site.read_only,
            "problem": problem,
        }
        return answer_template("masks/masks.html", say("Masks"), values)

    def show_item(self, request: Request) -> Response:
        """Respond with one image or clip as JSON. The query has `at`, its index in the list."""
        query = request.query_params
        folder = self.find_folder(query)
        if folder is None:
            return answer_json({"error": NOT_FOUND}, 404)
        try:
            media_files = self.review.list_media(folder)
            index = read_number(query, "at", len(media_files))
            if not media_files:
                return answer_json({"error": NOT_FOUND}, 404)
            return answer_json(self.make_item(folder, media_files, index))
        except (UserError, OSError) as error:
            return answer_json({"error": str(error)}, 422)

    def make_item(
        self, folder: Path, media_files: list[MaskEntry], index: int, error: str = ""
    ) -> dict[str, Any]:
        """Return the JSON values for the image or clip at `index`; `error` is the last action's error."""
        return {
            **self.review.describe(folder, media_files[index]),
            "at": index,
            "total": len(media_files),
            "can_undo": self.review.has_changed(folder) and not self.site.read_only,
            "error": error,
        }

    def show_image(self, request: Request) -> Response:
        """Respond with a frame of an image or clip, as JPEG."""
        return self._answer_image(
            request, lambda media_file, number: self.review.read_picture(media_file, number)
        )

    def show_mask(self, request: Request) -> Response:
        """Respond with a mask as PNG: reduced, or in full size if the query has `whole`."""
        is_full = "whole" in request.query_params
        return self._answer_image(
            request, lambda media_file, number: self.review.read_mask(media_file, number, is_full)
        )

    def _answer_image(self, request: Request, read: Callable[[MaskEntry, int], MaskImage | None]) -> Response:
        query = request.query_params
        folder = self.find_folder(query)
        try:
            media_file = None if folder is None else self.review.find(folder, query.get("id", ""))
            image = None if media_file is None else read(media_file, read_number(query, "number"))
        except (UserError, OSError, StopIteration):
            image = None
        if image is None:
            return answer_not_found()
        headers = {"cache-control": "private, max-age=31536000, immutable"}  # the address has a stamp
        return Response(image.content, media_type=image.kind, headers=headers)

    def change(self, request: Request, body: bytes) -> Response:
        """Accept, invert or remove a mask, or undo the last change.

        The JSON body contains `folder`, `id`, and `have`, the version of the mask that the page shows.
        """
        action = request.path_params["what"]
        try:
            query = parse_json(body.decode())
            texts = {name: str(query.get(name, "")) for name in ("folder", "id", "have")}
        except (ValueError, AttributeError) as error:
            return answer_json({"error": f"This is not a request: {error}"}, 400)
        if action not in (*MASK_ACTIONS, "undo"):
            return answer_json({"error": say("There is no such request.")}, 404)

        if action == "undo":
            folder = self.find_folder(texts)
            if folder is None:
                return answer_json({"error": NOT_FOUND}, 404)
            try:
                return self._answer_item(folder, self.review.undo(folder))
            except (UserError, OSError) as problem:
                return answer_json({"error": str(problem), "can_undo": self.review.has_changed(folder)}, 422)

        def change_mask(folder: Path, media_file: MaskEntry) -> None:
            self.review.change(folder, media_file, action, version=texts["have"])

        return self._answer_change(texts, change_mask)

    def draw(self, request: Request, body: bytes) -> Response:
        """Store a drawn mask. The body is a PNG; the query has `folder`, `id` and `have`, the old version."""
        query = request.query_params

        def replace_mask(folder: Path, media_file: MaskEntry) -> None:
            self.review.draw(folder, media_file, body, query.get("have", ""))
            with contextlib.suppress(ChangedMeanwhileError, OSError, ValueError, UserError):
                use_first_mask(self.site.runs, folder)  # otherwise the form's checkbox decides

        return self._answer_change(query, replace_mask)

    def _answer_change(
        self, query: Mapping[str, str], change_mask: Callable[[Path, MaskEntry], None]
    ) -> Response:
        """Change the mask of the image or clip that `query` names, and respond with its new JSON values."""
        # If nothing could be changed, the JSON also contains the reason as `error`.
        folder = self.find_folder(query)
        id = query.get("id", "")
        media_file = None
        try:
            media_file = None if folder is None else self.review.find(folder, id)
            if folder is None or media_file is None:
                return answer_json({"error": NOT_FOUND}, 404)
            change_mask(folder, media_file)
            status, error = 200, ""
        except MaskConflictError:
            status, error = 409, say("The mask has changed since: look at it again.")
        except (UserError, OSError) as problem:
            status, error = 422, str(problem)
        return self._answer_item(folder, media_file, status, error)

    def _answer_item(
        self, folder: Path | None, media_file: MaskEntry | None, status: int = 200, error: str = ""
    ) -> Response:
        """Respond with the current state of an image or clip as JSON."""
        if folder is None or media_file is None:
            return answer_json({"error": error or NOT_FOUND}, status if error else 404)
        try:
            media_files = self.review.list_media(folder)
            index = [candidate.media_path for candidate in media_files].index(media_file.media_path)
            return answer_json(self.make_item(folder, media_files, index, error), status)
        except (UserError, OSError, ValueError) as problem:  # the file was removed
            return answer_json({"error": error or str(problem)}, max(status, 404))


def read_number(query: Mapping[str, str], name: str, count: int | None = None) -> int:
    """Return a number of a query, limited to 0..count - 1; 0 if it is missing or not a number."""
    text = query.get(name, "")
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    return number if count is None else max(0, min(number, count - 1))


def mask_routes(site: Site) -> list[Route]:
    """Return the routes of the Masks page."""
    pages = MaskPages(site)
    return [
        Route(ADDRESS, pages.show),
        Route(f"{ADDRESS}/item", pages.show_item),
        Route(f"{ADDRESS}/picture", pages.show_image),
        Route(f"{ADDRESS}/mask", pages.show_mask),
        Route(DRAWN_ADDRESS, answer_body(pages.draw), methods=["POST"]),
        Route(f"{ADDRESS}/{{what}}", answer_body(pages.change), methods=["POST"]),
    ]
