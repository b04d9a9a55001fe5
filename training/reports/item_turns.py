"""The list of items that rest, were set aside or taken back in a run: read it, and show it on the page."""

import json
from pathlib import Path
from typing import NamedTuple

from modules.pages.language import say
from modules.text_files import parse_json, read_text
from training.reports.sections import PageSection, turns_path

RESTS, ASIDE, BACK, CAPTION = "rests", "aside", "back", "caption"
REQUESTED = "requested"  # reason of a change that a user asked for
MAX_SHOWN = 200  # changes on the page, the last ones
MAX_REQUEST_BYTES = 1 << 16  # largest file of requests that a run reads


class ItemChange(NamedTuple):
    """What happened to an item, and why."""

    step: int
    key: str  # of the item: the name of its cache
    change: str  # RESTS, ASIDE, BACK or CAPTION
    reason: str


def asked_path(folder: Path, name: str) -> Path:
    """Return the path of the file whose lines a run with --watch_items obeys and removes."""
    return folder / f"{name}.items"


def read_changes(path: Path) -> list[ItemChange]:
    """Return the changes in the list of a run; [] without one, or if it was not written by this program."""
    try:
        rows = parse_json(read_text(path))["changes"]
        return [ItemChange(int(row[0]), str(row[1]), str(row[2]), str(row[3])) for row in rows]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def read_items(path: Path) -> dict[str, str]:
    """Return the stem of the media file of each item in the list of a run, by key; {} without a list."""
    try:
        return {str(key): str(stem) for key, stem in parse_json(read_text(path))["items"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def read_requests(path: Path, session: int) -> dict[int, list[str]]:
    """Return the requests about items that were recorded for a run, by step; others are left out."""
    requests: dict[int, list[str]] = {}
    try:
        lines = read_text(path).splitlines() if path.is_file() else []
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            if row["session"] == session:
                requests.setdefault(int(row["step"]), []).append(str(row["line"]))
        except (ValueError, LookupError, TypeError):  # a killed run may have left half a line
            continue
    return requests


def make_section(folder: Path, name: str) -> PageSection | None:
    """Return the page section about items that changed their turns; None if none did."""
    changes = read_changes(turns_path(folder, name))
    if not changes:
        return None
    words = {
        RESTS: say("rests"),
        ASIDE: say("set aside"),
        BACK: say("taken back"),
        CAPTION: say("recaptioned"),
    }
    rows = [
        (f"{one.step:,}", one.key, words.get(one.change, one.change), one.reason)
        for one in changes[-MAX_SHOWN:]
    ]
    return PageSection(
        key="turns",
        title=say("Turns of items"),
        notes=[
            say(
                "An item that rests is drawn in a quarter of its turns; one that is set aside, in none. "
                "Others of its size take the rest."
            )
        ],
        headings=(say("step"), say("name"), say("change"), say("reason")),
        rows=rows,
    )
