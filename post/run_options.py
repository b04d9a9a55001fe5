"""Options of a run of a tool: what is read, and where the result goes. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.media.options import FormatOptions, add_format_arguments


@dataclass(frozen=True)
class RunOptions:
    """What is read, and where the result goes."""

    input: Path
    output: Path | None
    yes: bool
    device: str | None
    format: FormatOptions


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `RunOptions`."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input", type=str, required=True, help="a video, a picture, or a folder of videos and pictures"
    )
    group.add_argument(
        "--output", type=str, default=None, help="file or folder of the result (default: beside the input)"
    )
    group.add_argument(
        "-y", "--yes", action="store_true", help="overwrite results that exist, and ask nothing"
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu (default: the best there is)"
    )
    add_format_arguments(parser, codec="prores", container="mkv")
