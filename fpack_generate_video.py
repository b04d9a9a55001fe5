"""Generate videos and images with FramePack and FramePack-F1."""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from frame_pack.options import FramePackGenerationOptions, parse_section_texts
from generation.options import GenerationOptions
from generation.prompt_lines import SECTIONED_GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=30,
    guidance_scale=1.0,
    infer_steps=25,
    sample_solver="unipc",
    embedded_guidance=10.0,
    media=frozenset({"end_image_path", "control_image_path"}),
    source=SourceDefaults(takes_image=False),
    has_second_prompt=True,
    noise_on_cpu=True,
    line_options=SECTIONED_GENERATION_OPTIONS,
    output_types=("video", "images", "latent", "both", "latent_images"),
    numbers_single=True,
    in_sections=True,
)


def settle(
    options: GenerationOptions, family_options: FramePackGenerationOptions
) -> tuple[GenerationOptions, FramePackGenerationOptions]:
    """Check the texts of sections, and take the window that given latents were made with."""
    prompts = options.prompts
    # with random parts, the section that a text is for may be drawn
    if prompts.prompt_wildcards is None and not prompts.prompt_alternatives:
        for name in ("prompt", "prompt_2"):  # raises OptionError if one cannot be parsed
            parse_section_texts(getattr(options.request, name) or "", f"--{name}")

    from frame_pack.files import read_window_size

    window = read_window_size(options.latent_path or (), family_options.latent_window_size)
    return options, replace(family_options, latent_window_size=window)


main = generation_script("framepack", DEFAULTS, __doc__, adjust_options=settle)


if __name__ == "__main__":
    main.run()
