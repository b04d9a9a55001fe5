"""Generate videos and images with Wan2.1 and Wan2.2. All options: python wan_generate_video.py --help"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from families import identify
from generation.options import read_generation
from generation.script_options import FASTER, ScriptDefaults
from modules.command import command_line
from wan.options import WanGenerationOptions

DEFAULTS = ScriptDefaults(
    fps=16,
    output_types=("video", "images", "latent", "both", "latent_images"),
    has_experts=True,
    optimized={**FASTER, "fp16_accumulation": True, "rope_func": "comfy"},
    riflex_frequencies=22,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, wan_options = read_generation(__doc__, DEFAULTS, WanGenerationOptions, argv)

    from generation.run import generate  # torch loads here, after every option has been read
    from wan.family import family_for_generation

    (make or generate)(family_for_generation(wan_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
