"""Copy a page that others may see: without folders, commands and links to your files.

All options: python share_page.py --help
"""

from pathlib import Path

import modules.interpreter  # noqa: F401
from modules.families import plain_script
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


main = plain_script(
    __doc__,
    "browser.views.share_page",
    ShareOptions,
    prepare=lambda options: (options.page, options.copy),
)


if __name__ == "__main__":
    main.run()
