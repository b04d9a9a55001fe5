"""Make videos and images with Wan2.1. All options: python wan_generate_video.py --help"""

from collections.abc import Sequence

from families import identify
from generation.options import GenerationOptions, ScriptDefaults, generation_parser, read_arguments
from modules.command import command_line
from modules.options import read_options
from wan.options import WanGenerationOptions, add_generation_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = generation_parser(__doc__, ScriptDefaults(fps=16, guidance_scale=5.0))
    add_generation_arguments(parser)
    args = read_arguments(parser, argv)
    options, wan_options = read_options(GenerationOptions, args), read_options(WanGenerationOptions, args)

    from generation.run import generate  # torch loads here, after every option has been read
    from wan.family import family_for_generation

    generate(family_for_generation(wan_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
