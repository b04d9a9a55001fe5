"""Generate videos and images with Kandinsky 5."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script

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
main = generation_script("kandinsky", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
