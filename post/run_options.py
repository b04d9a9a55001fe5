"""Options of a run of a tool: what is read, and where the result goes. Standard library only."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.media.options import FormatOptions
from modules.option_values import to_path
from modules.parser import add_options


@dataclass(frozen=True)
class ToolRunOptions:
    """What is read, and where the result goes."""

    input: Path
    output: str | None  # a text, because a path does not keep the / at its end
    yes: bool
    device: str | None
    format: FormatOptions

    def __post_init__(self) -> None:
        if not self.input.exists():
            raise OptionError(f"--input {self.input} does not exist. Give a video, a picture, or a folder.")
        if self.output is not None and not self.output.strip():
            raise OptionError("--output is empty: give a file or a folder, or leave the option out")

    @property
    def output_path(self) -> Path | None:
        """Return --output as a path. Raises OptionError for a name that no file can have."""
        return None if self.output is None else to_path("--output", self.output)

    @property
    def means_folder(self) -> bool:
        """Return whether --output is written as a folder: `made/`."""
        ends = ("/", os.sep) if os.altsep is None else ("/", os.sep, os.altsep)
        return self.output is not None and self.output.endswith(ends)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ToolRunOptions`."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        type=str,
        required=True,
        help="a video, a picture, or a folder: then each video and each picture in it is worked on by itself",
    )
    group.add_argument(
        "--output",
        type=str,
        default=None,
        help="file of the result, whose ending is that of --container or .png, or folder for results "
        "(default: beside the input, with the name of the network added)",
    )
    group.add_argument(
        "-y", "--yes", action="store_true", help="overwrite results that exist, and ask nothing"
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu (default: the best there is)"
    )
    add_options(parser, FormatOptions, defaults={"codec": "prores", "container": "mkv"})
