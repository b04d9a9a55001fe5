"""Options of tools/dataset_report.py."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_most
from modules.output_files import check_place

STDOUT = "-"  # of --json without a value
MOST_WORKERS = 1024
MOST_STEP = 1024


@dataclass(frozen=True)
class ReportOptions:
    """What to look at, where to write what was found, and for which model."""

    dataset_config: Path
    output: Path | None
    json: Path | None  # Path(STDOUT): standard output
    items: int
    fps: float
    pixel_step: int
    no_decode: bool
    num_workers: int | None  # None: the machine's cores minus one

    def __post_init__(self) -> None:
        if self.output is None and self.json is None:
            raise OptionError("nothing would be written: give --output page.html, --json, or both")
        _check_file("--output", self.output, (".html", ".htm"))
        if not self.prints:
            _check_file("--json", self.json, (".json",))
        if self.items < 0:
            raise OptionError(f"--items {self.items}: give 0 (no thumbnails) or more")
        if not self.fps > 0:
            raise OptionError(f"--fps {self.fps:g}: give a positive number of frames per second")
        if not 1 <= self.pixel_step <= MOST_STEP:
            raise OptionError(f"--pixel_step {self.pixel_step}: give 16, or 32 for Wan2.2 TI2V-5B")
        if self.num_workers is not None and self.num_workers < 1:
            raise OptionError(f"--num_workers {self.num_workers}: give at least 1")
        check_at_most("--num_workers", self.num_workers, MOST_WORKERS, "threads that read files")

    @property
    def prints(self) -> bool:
        """Return whether the JSON goes to standard output."""
        return self.json is not None and str(self.json) == STDOUT


def _check_file(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"{option} {path}: name a file that ends in {suffixes[0]}")
    check_place(option, path)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools/dataset_report.py."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--dataset_config", type=str, required=True, help="dataset configuration, .toml or .json"
    )
    group.add_argument(
        "--output", type=str, default=None, metavar="FILE", help="the HTML page to write; it is one file"
    )
    group.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        default=None,
        metavar="FILE",
        help="write the same numbers as JSON; without FILE, or with -, to standard output",
    )
    group.add_argument(
        "--items",
        type=int,
        default=200,
        help="most files with thumbnails on the page: those with something to tell first, then an even "
        "choice; 0 for none",
    )
    group.add_argument(
        "--fps",
        type=float,
        default=16.0,
        help="frames per second of the model, for tables with source_fps: 16 for Wan, 24 for HunyuanVideo "
        "and Wan2.2 TI2V-5B, 30 for FramePack",
    )
    group.add_argument(
        "--pixel_step",
        type=int,
        default=16,
        help="sides of buckets are multiples of this: 16, or 32 for Wan2.2 TI2V-5B",
    )
    group.add_argument(
        "--no_decode",
        action="store_true",
        help="read headers only, for very large datasets: nothing is measured and no copies are found; only "
        "files with thumbnails are decoded",
    )
    group.add_argument(
        "--num_workers",
        type=int,
        default=None,
        help="threads that read files; default: all cores but one. The result does not depend on it",
    )
