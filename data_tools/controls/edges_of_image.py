"""Draw the edges of one image, as tools/canny.py does."""

import logging
from pathlib import Path

from modules.errors import OptionError
from modules.media.edges import draw_edges
from modules.media.reading import read_image
from modules.media.writing import STILL_FORMATS, write_still
from modules.options import Options, option

logger = logging.getLogger(__name__)


class DrawEdgesOptions(Options, title="what to do"):
    """Options for drawing the edges of an image."""

    input: Path = option(
        "image to read; for a folder use tools/control_pictures.py",
        place="file",
        required=True,
        by_place=True,
    )
    output: Path = option(
        f"image to write: {', '.join(STILL_FORMATS)}",
        place="new file",
        must_not_replace="input",
        required=True,
        by_place=True,
    )
    thres1: int = option("lower threshold of the gradient", default=32, minimum=0, maximum=99_999)
    thres2: int = option("upper threshold", default=224, minimum=0, maximum=99_999)

    def __post_init__(self) -> None:
        suffix = self.output.suffix.lower()
        if suffix not in STILL_FORMATS:
            raise OptionError(f"--output {self.output}: pass a name that ends in {', '.join(STILL_FORMATS)}")


def draw_image_edges(options: DrawEdgesOptions) -> None:
    """Write an image with the edges of another image, white on black.

    Raises:
        MediaError: If the image cannot be read.
        OutputError: If the result cannot be written.
    """
    low, high = sorted((options.thres1, options.thres2))
    write_still(options.output, draw_edges(read_image(options.input), low=low, high=high))
    logger.info("wrote %s", options.output)
