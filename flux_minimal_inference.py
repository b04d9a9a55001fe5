"""Generate images with FLUX.1 and Chroma by the command line of the image guides.

flux_generate_image.py has more.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import modules.interpreter  # noqa: F401
from flux.official_options import LINE_CHARACTERS, TYPED, generation_argv, is_fp8, read_minimal
from flux_generate_image import main as generate_image
from generation.options import GenerationOptions
from generation.prompt_lines import NO_TEXT, LineOption
from modules.command import command_line, name_as_typed
from protocols.families import identify

if TYPE_CHECKING:
    from flux.family import Flux


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options of the guides, and run flux_generate_image.py with them."""
    minimal = read_minimal(__doc__, argv)

    def make(family: "Flux", options: GenerationOptions) -> None:
        """Generate with the prompt lines, file names and guidance of the image guides' command."""
        import torch

        from generation.run import generate

        # single-character options of a prompt line, such as --w
        line_options = dict(options.line_options)
        for character, (key, read, is_text) in LINE_CHARACTERS.items():
            line_options[character] = LineOption(key, read, NO_TEXT if is_text else ())
        # with --interactive, options of a prompt line apply to the next lines too
        options = replace(
            options,
            output=replace(options.output, naming="time"),
            line_options=line_options,
            remembers_lines=True,
        )
        # without a negative prompt there is no guidance, whatever --cfg_scale says
        family = replace(family, negative_is_empty=False)
        if is_fp8(minimal.model.dtype):
            family = replace(family, noise_dtype=torch.float32)
        generate(family, options)

    with name_as_typed(TYPED):
        generate_image(generation_argv(minimal), make)


if __name__ == "__main__":
    command_line(main, explain=identify)
