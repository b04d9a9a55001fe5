"""Generate videos and images with Kandinsky 5, and videos with sound with Kandinsky 6."""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.options import GenerationOptions
from generation.prompt_lines import GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from kandinsky.options import KandinskyGenerationOptions
from modules.errors import OptionError

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=24,
    sample_solver="vanilla",
    media=frozenset({"image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    size=(512, 768),
    defaults_from_model={
        "video_size": "size in pixels; default: the task's, or of the image that the clip begins with"
    },
    has_second_prompt=True,
    has_sound=True,
    line_options=GENERATION_OPTIONS,
    riflex_frequencies=8,
    spellings={
        "image_path": ("--image",),
        "infer_steps": ("--steps",),
        "guidance_scale": ("--guidance",),
        "video_length": ("--frames",),
        "flow_shift": ("--scheduler_scale",),
        "save_path": ("--output",),
    },
)


def settle(
    shared: GenerationOptions, family_options: KandinskyGenerationOptions
) -> tuple[GenerationOptions, KandinskyGenerationOptions]:
    """Take --width and --height for --video_size."""
    height, width = family_options.height, family_options.width
    if height is None or width is None:
        return shared, family_options
    if shared.request.video_size not in (None, (height, width)):
        raise OptionError(f"--height {height} --width {width} and --video_size: pass one of them")
    return replace(shared, request=replace(shared.request, video_size=(height, width))), family_options


main = generation_script("kandinsky", DEFAULTS, __doc__, adjust_options=settle)


if __name__ == "__main__":
    main.run()
