"""Generate videos and images with Wan2.1 and Wan2.2."""

import modules.interpreter  # noqa: F401
from generation.prompt_lines import (
    CANCELS,
    GENERATION_OPTIONS,
    REFERENCES,
    LineOption,
    read_name,
    read_number,
    read_path,
)
from generation.script_options import FASTER, ScriptDefaults
from generation.scripts import generation_script
from wan.bernini_options import IMAGE_SCALE, MODE_KEY, PROMPT_KEY, VIDEO_SCALE
from wan.options import MASK, SCALE

DEFAULTS = ScriptDefaults(
    fps=16,
    defaults_from_model={
        "fps": "frames per second of the video file; default: the task's, 24 for ti2v-5B, else 16"
    },
    output_types=("video", "images", "latent", "both", "latent_images"),
    has_experts=True,
    optimized={**FASTER, "fp16_accumulation": True, "rope_func": "comfy"},
    riflex_frequencies=22,
    line_options={
        **GENERATION_OPTIONS,
        **dict.fromkeys(("sv", "src_video"), GENERATION_OPTIONS["cn"]),
        "sm": LineOption(MASK, read_path, CANCELS),
        **dict.fromkeys(("ci", "sr", "src_ref_images"), REFERENCES["ci"]),
        "vs": LineOption(SCALE, read_name),
        "of": LineOption("one_frame_inference", read_name),
        "bp": LineOption(PROMPT_KEY, read_name),
        "bg": LineOption(MODE_KEY, read_name),
        "gv": LineOption(VIDEO_SCALE, read_number),
        "gi": LineOption(IMAGE_SCALE, read_number),
    },
    spellings={
        "control_path": ("--control_path", "--src_video", "--vace_video"),
        "control_image_path": ("--control_image_path", "--src_ref_images", "--vace_reference_image"),
    },
    media=frozenset({"image_path", "end_image_path", "control_path", "control_image_path"}),
)
main = generation_script("wan", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
