"""Options of what is written, and where. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError


@dataclass(frozen=True)
class PictureOutputOptions:
    """Where pictures are written, and under which names."""

    outdir: Path
    sequential_file_name: bool
    use_original_file_name: bool

    def __post_init__(self) -> None:
        if self.outdir.exists() and not self.outdir.is_dir():
            raise OptionError(f"--outdir {self.outdir}: it is a file; give a folder, it will be created")
        if self.sequential_file_name and self.use_original_file_name:
            raise OptionError("--sequential_file_name and --use_original_file_name: give one of them")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `PictureOutputOptions`."""
    group = parser.add_argument_group("output")
    group.add_argument("--outdir", default="outputs", help="output folder; created if missing")
    group.add_argument(
        "--sequential_file_name",
        action="store_true",
        help="number the files: im_000001.png and so on, after those that are there",
    )
    group.add_argument(
        "--use_original_file_name",
        action="store_true",
        help="image to image: name files as the input pictures are named",
    )
