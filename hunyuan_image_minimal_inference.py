"""Generate images with HunyuanImage-2.1 by the command line of the image guides.

It has all options of hunyuan_image_generate_image.py. All of them:
python hunyuan_image_minimal_inference.py --help
"""

import argparse
from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from families import identify
from generation.options import read_generation
from hunyuan_image.options import HunyuanImageGenerationOptions
from hunyuan_image_generate_image import DEFAULTS
from modules.command import command_line


def set_defaults(parser: argparse.ArgumentParser) -> None:
    """Set what the guides have as defaults."""
    parser.set_defaults(negative_prompt="")


def main(argv: Sequence[str] | None = None) -> None:
    options, own_options = read_generation(
        __doc__, DEFAULTS, HunyuanImageGenerationOptions, argv, set_defaults
    )

    from generation.run import generate  # torch loads here, after every option has been read
    from hunyuan_image.family import family_for_generation

    generate(family_for_generation(own_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
