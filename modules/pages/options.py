"""Options of share_page.py. Standard library only."""

from pathlib import Path

from modules.options import Options, option
from modules.output_files import check_place, refuse_replacing


class ShareOptions(Options):
    """Which page to copy, and where to."""

    page: Path = option(
        "page of a training, a comparison, a check or a report: an .html file", positional=True
    )
    output: Path | None = option("file to write (default: NAME-shared.html beside the page)")

    def __post_init__(self) -> None:
        check_place("--output", self.copy)
        refuse_replacing("--output", self.copy, [self.page])

    @property
    def copy(self) -> Path:
        """Return the file to write."""
        return self.output or self.page.with_name(f"{self.page.stem}-shared.html")
