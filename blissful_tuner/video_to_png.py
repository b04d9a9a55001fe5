"""Write the frames of a video as PNG files, 000000.png and so on."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import Options, option
from modules.script_options import parse_options


class VideoToPngOptions(Options):
    """Options for which frames to write, and where."""

    input: Path = option("a video, or an image for a single PNG", required=True, by_place=True)
    output: Path | None = option(
        "folder in which a folder `frames` is made for 000000.png, 000001.png and so on (default: the "
        "input's folder)"
    )
    num_frames: int | None = option(
        "write only this many frames from the beginning, and read no more",
        minimum=1,
        hint="omit it for all frames",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write a video's frames as PNG files, as the command line asks.

    Raises UserError if the video cannot be read or a frame cannot be written.
    """
    (options,) = parse_options(__doc__, argv, VideoToPngOptions)

    from postprocessing.run import write_frames

    folder = options.input.parent if options.output is None else options.output
    write_frames(options.input, folder, options.num_frames)


if __name__ == "__main__":
    command_line(main)
