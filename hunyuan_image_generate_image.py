"""Generate images with HunyuanImage-2.1. All options: python hunyuan_image_generate_image.py --help"""

from collections.abc import Callable, Sequence

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from families import identify
from generation.options import read_generation
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS
from generation.script_options import PICTURE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from hunyuan_image.options import HunyuanImageGenerationOptions
from modules.command import command_line

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=PICTURE_FPS,
    guidance_scale=3.5,
    infer_steps=50,
    flow_shift=5.0,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(share="strength", denoise=0.8, pad_mode=None),
    joins_guidance=True,
    size=(2048, 2048),
    pictures=True,
    noise_on_cpu=True,
    line_options=IMAGE_GENERATION_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, own_options = read_generation(__doc__, DEFAULTS, HunyuanImageGenerationOptions, argv)

    from generation.run import generate  # torch loads here, after every option has been read
    from hunyuan_image.family import family_for_generation

    (make or generate)(family_for_generation(own_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
