"""Generate images with Lumina-Image-2.0 by the command line of the image guides.

lumina_generate_image.py has more.
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from lumina.official_options import TYPED, read_minimal, translate_to_generation_argv
from lumina_generate_image import main as generate_image
from modules.command import command_line, name_as_typed
from protocols.families import identify


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options of the guides, and run lumina_generate_image.py with them."""
    with name_as_typed(TYPED):
        generate_image(translate_to_generation_argv(read_minimal(__doc__, argv)))


if __name__ == "__main__":
    command_line(main, explain=identify)
