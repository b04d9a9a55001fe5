"""Write the frames of a video as PNG files, 000000.png and so on.

All options: python blissful_tuner/video_to_png.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_png_options import VideoToPngOptions, add_video_to_png_arguments
from modules.command import command_line
from modules.options import read_options
from modules.parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the frames of the file that the command line names. Raises UserError."""
    parser = Parser(description=__doc__)
    add_video_to_png_arguments(parser)
    options = read_options(VideoToPngOptions, parser.parse_args(argv))

    from post.run import write_frames

    write_frames(options.input, options.folder, options.num_frames)


if __name__ == "__main__":
    command_line(main)
