"""Options of share_page.py. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.output_files import check_place, refuse_replacing


@dataclass(frozen=True)
class ShareOptions:
    """Which page to copy, and where to."""

    page: Path
    output: Path | None  # None: beside the page

    def __post_init__(self) -> None:
        check_place("--output", self.copy)
        refuse_replacing("--output", self.copy, [self.page])

    @property
    def copy(self) -> Path:
        """Return the file to write."""
        return self.output or self.page.with_name(f"{self.page.stem}-shared.html")


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ShareOptions`."""
    parser.add_argument("page", help="page of a training, a comparison, a check or a report: an .html file")
    parser.add_argument("--output", help="file to write (default: NAME-shared.html beside the page)")
