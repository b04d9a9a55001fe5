"""Additional sections of a run's page, each a heading with notes and a table; names of their files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

SAMPLES = "sample"  # folder of samples, in the output folder


@dataclass(frozen=True)
class PageSection:
    """A section of a run's page; `str` is HTML-escaped, and `Markup` is inserted unchanged."""

    key: str  # anchor of its address on the page
    title: str
    notes: Sequence[str] = ()
    headings: Sequence[str] = ()
    rows: "Sequence[Sequence[str | Markup]]" = ()


def page_path(folder: Path, name: str) -> Path:
    """Return the path of a run's HTML page.

    Args:
        folder: Value of --output_dir.
        name: Value of --output_name.
    """
    return folder / f"{name}.html"


def scores_path(folder: Path, name: str) -> Path:
    """Return the path of the file with a run's sample scores.

    Args:
        folder: Value of --output_dir.
        name: Value of --output_name.
    """
    return folder / f"{name}-scores.json"


def items_path(folder: Path, name: str, process: int = 0) -> Path:
    """Return the path of the file in which a process of a run records item losses."""
    return folder / f"{name}-items{f'-{process}' if process else ''}.jsonl"


def images_path(folder: Path, name: str) -> Path:
    """Return the path of the file with item thumbnails of a run."""
    return folder / f"{name}-items.json"


def turns_path(folder: Path, name: str) -> Path:
    """Return the path of the list of items of a run that rest, were set aside or taken back."""
    return folder / f"{name}-turns.json"


def captions_folder(folder: Path, name: str) -> Path:
    """Return the folder with the text caches of items that a run has recaptioned."""
    return folder / f"{name}-captions"


def requests_path(folder: Path, name: str) -> Path:
    """Return the path of the file with the requests about items that a run has obeyed, by step."""
    return folder / f"{name}-turns.txt"


def is_section_file(file: str, name: str) -> bool:
    """Return whether `file` is the name of a run's file of scores, item losses, thumbnails or turns."""
    endings = r"(scores\.json|items\.json|items(-\d+)?\.jsonl|turns\.(json|txt))"
    return re.fullmatch(rf"{re.escape(name)}-{endings}", file) is not None
