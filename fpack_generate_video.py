"""Generate videos and images with FramePack and FramePack-F1.

All options: python fpack_generate_video.py --help
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from families import identify
from frame_pack.options import REQUEST_OPTIONS, FramePackGenerationOptions
from frame_pack.section_syntax import parse_entries
from generation.options import read_generation
from generation.prompt_lines import SECTIONED_GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from modules.command import command_line

DEFAULTS = ScriptDefaults(
    fps=30,
    guidance_scale=1.0,
    infer_steps=25,
    sample_solver="unipc",
    embedded_guidance=10.0,
    media=frozenset({"end_image_path"}),
    source=SourceDefaults(takes_image=False),
    has_second_prompt=True,
    has_length=False,
    noise_on_cpu=True,
    extras=REQUEST_OPTIONS,
    line_options=SECTIONED_GENERATION_OPTIONS,
    output_types=("video", "images", "latent", "both", "latent_images"),
    numbers_single=True,
    in_sections=True,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, fpack_options = read_generation(__doc__, DEFAULTS, FramePackGenerationOptions, argv)
    if not options.prompts.draws:  # else it may be drawn for which sections a text is
        for name in ("prompt", "prompt_2"):  # raises OptionError if one cannot be parsed
            parse_entries(getattr(options.request, name) or "", f"--{name}")

    from frame_pack.family import family_for_generation
    from frame_pack.files import saved_window
    from generation.run import generate  # torch loads here, after every option has been read
    from modules.devices import make_deterministic

    if fpack_options.reproduce:
        make_deterministic()
    window = saved_window(options.latent_path or (), fpack_options.latent_window_size)
    (make or generate)(family_for_generation(replace(fpack_options, latent_window_size=window)), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
