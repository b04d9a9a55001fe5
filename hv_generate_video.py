"""Generate videos and images with HunyuanVideo and SkyReels V1."""

import logging
from dataclasses import replace

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.options import GenerationOptions
from generation.prompt_lines import EMBEDDED_GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from hunyuan_model.options import HunyuanGenerationOptions

logger = logging.getLogger(__name__)

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
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    joins_guidance=True,
    blocks_to_swap=None,
    has_second_prompt=True,
    line_options=EMBEDDED_GENERATION_OPTIONS,
    riflex_frequencies=8,
    riflex_beyond=50,
)


def settle(
    options: GenerationOptions, family_options: HunyuanGenerationOptions
) -> tuple[GenerationOptions, HunyuanGenerationOptions]:
    """Make --exclude_single_blocks a pattern of the LoRAs."""
    files = len(options.lora.lora_weight or ())
    if family_options.exclude_single_blocks and not files:
        logger.warning("--exclude_single_blocks is ignored because --lora_weight is not given")
    elif family_options.exclude_single_blocks:
        patterns = options.lora_patterns.also_excluding("single_(transformer_)?blocks", files)
        options = replace(options, lora_patterns=patterns)
    return options, family_options


main = generation_script("hunyuan_video", DEFAULTS, __doc__, adjust_options=settle)


if __name__ == "__main__":
    main.run()
