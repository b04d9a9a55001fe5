"""Copy a page that others may see: without folders, commands and links to your files."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.options import Options, option
from modules.output_files import check_place, reject_replacing
from protocols.families import plain_script


class ShareOptions(Options):
    """Which page to copy, and where to write the copy."""

    page: Path = option(
        "page of a training, a comparison, a check or a report: an .html file",
        positional=True,
        place="file",
        hint="a page that this program wrote, an .html file",
    )
    output: Path | None = option("file to write (default: NAME-shared.html next to the page)")

    def __post_init__(self) -> None:
        check_place("--output", self.copy)
        reject_replacing("--output", self.copy, [self.page])

    @property
    def copy(self) -> Path:
        """Return the path of the copy: --output, or the page's name followed by `-shared`."""
        return self.output or self.page.with_name(f"{self.page.stem}-shared.html")


main = plain_script(
    __doc__,
    "browser.runs.run_views.share_page",
    ShareOptions,
    prepare=lambda options: (options.page, options.copy),
)


if __name__ == "__main__":
    main.run()
