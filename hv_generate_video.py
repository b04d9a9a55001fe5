"""Generate videos and images with HunyuanVideo and SkyReels V1.

All options: python hv_generate_video.py --help
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from families import identify
from generation.options import read_generation
from generation.prompt_lines import EMBEDDED_GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from hunyuan_model.options import HunyuanGenerationOptions
from modules.command import command_line

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=24,
    guidance_scale=1.0,
    video_length=129,
    infer_steps=50,
    flow_shift=7.0,
    sample_solver="vanilla",
    solver_names={"default": "vanilla", "dpm++": "dpm++", "dpm++sde": "dpm++sde"},
    embedded_guidance=6.0,
    media=frozenset({"image_path"}),
    source=SourceDefaults(share="strength", denoise=0.8, pad_mode=None),
    joins_guidance=True,
    blocks_to_swap=None,
    has_second_prompt=True,
    line_options=EMBEDDED_GENERATION_OPTIONS,
    riflex_frequencies=8,
    riflex_beyond=50,
)


def main(argv: Sequence[str] | None = None, make: Callable[..., None] | None = None) -> None:
    """Read the options, then `make(family, options)`; None: generate."""
    options, hunyuan_options = read_generation(__doc__, DEFAULTS, HunyuanGenerationOptions, argv)
    if hunyuan_options.exclude_single_blocks:
        files = len(options.lora.lora_weight or ())
        options = replace(
            options, lora_patterns=options.lora_patterns.also_excluding("single_(transformer_)?blocks", files)
        )

    from generation.run import generate  # torch loads here, after every option has been read
    from hunyuan_model.family import family_for_generation
    from modules.devices import make_deterministic

    if hunyuan_options.reproduce:
        make_deterministic()
    (make or generate)(family_for_generation(hunyuan_options), options)


if __name__ == "__main__":
    command_line(main, explain=identify)
