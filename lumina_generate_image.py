"""Generate images with Lumina-Image-2.0. All options: python lumina_generate_image.py --help"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from families import identify
from generation.options import read_generation
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, LineOption
from generation.script_options import PICTURE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from lumina.options import EXTRAS, LuminaGenerationOptions
from modules.command import command_line

DEFAULTS = ScriptDefaults(
    fps=PICTURE_FPS,
    guidance_scale=3.5,
    infer_steps=36,
    flow_shift=6.0,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(share="strength", denoise=0.8, pad_mode=None),
    blocks_to_swap=None,
    size=(1024, 1024),
    pictures=True,
    extras=EXTRAS,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        "ctr": LineOption("cfg_trunc_ratio", str),
        "rcfg": LineOption("renorm_cfg", str),
    },
    output_types=PICTURE_OUTPUTS,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, lumina_options = read_generation(__doc__, DEFAULTS, LuminaGenerationOptions, argv)

    from generation.run import generate  # torch loads here, after every option has been read
    from lumina.family import family_for_generation

    (make or generate)(family_for_generation(lumina_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
