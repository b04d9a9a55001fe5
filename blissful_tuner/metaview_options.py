"""Options of metaview.py. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MetaviewOptions:
    """Files to read, and how to show what they say."""

    input_file: tuple[Path, ...]
    json: bool


def add_metaview_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `MetaviewOptions`."""
    parser.add_argument(
        "input_file",
        nargs="+",
        metavar="FILE",
        help="videos (mkv, mp4, mov), pictures (png), latents and LoRAs (safetensors), or folders of them",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: an object for one file, a list for several or a folder; values as they are stored",
    )
