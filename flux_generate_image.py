"""Generate pictures with FLUX.1 and Chroma. All options: python flux_generate_image.py --help"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from families import identify
from flux.options import USUAL_GUIDANCE, FluxGenerationOptions
from generation.options import read_generation
from generation.prompt_lines import EMBEDDED_IMAGE_OPTIONS
from generation.script_options import PICTURE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from modules.command import command_line

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=PICTURE_FPS,
    size=(1024, 1024),
    pictures=True,
    sample_solver="vanilla",
    embedded_guidance=USUAL_GUIDANCE,
    media=frozenset(),
    source=SourceDefaults(share="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    blocks_to_swap=None,
    has_second_prompt=True,
    line_options=EMBEDDED_IMAGE_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, flux_options = read_generation(__doc__, DEFAULTS, FluxGenerationOptions, argv)

    from flux.family import family_for_generation
    from generation.run import generate  # torch loads here, after every option has been read

    (make or generate)(family_for_generation(flux_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
