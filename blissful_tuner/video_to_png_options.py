"""Options of video_to_png.py. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.option_values import check_at_least


@dataclass(frozen=True)
class VideoToPngOptions:
    """Which frames are written, and where."""

    input: Path
    output: Path | None
    num_frames: int | None

    def __post_init__(self) -> None:
        check_at_least("--num_frames", self.num_frames, 1, "leave it out for all frames")

    @property
    def folder(self) -> Path:
        """Return the folder that the frames' folder is made in."""
        return self.input.parent if self.output is None else self.output


def add_video_to_png_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `VideoToPngOptions`."""
    parser.add_argument("--input", type=str, required=True, help="a video, or a picture for a single PNG")
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="folder in which a folder `frames` is made for 000000.png, 000001.png and so on (default: the "
        "input's folder)",
    )
    parser.add_argument(
        "--num_frames", type=int, default=None, help="write only so many from the beginning, and read no more"
    )
