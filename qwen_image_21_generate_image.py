"""Generate or edit images with Qwen-Image-2.1, base and Turbo."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import (
    CANCELS,
    IMAGE_GENERATION_OPTIONS,
    NO_TEXT,
    REFERENCES,
    LineOption,
    read_path,
)
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from qwen_image_21.options import SIDE, STEPS, replace_empty_prompt, resolve_generation

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    side_step=32,
    guidance_scale=1.0,
    infer_steps=STEPS,
    defaults_from_model={
        "video_size": "size in pixels, multiples of 32; default: 1024 1024, with images to edit about a "
        "megapixel in the shape of the last one",
        "infer_steps": "number of denoising steps; default: for Turbo as many as it was distilled to (8), "
        f"else {STEPS}",
        "guidance_scale": "weight of the prompt; 1, the default, turns guidance off, as the model is made "
        "for. Other values need a --negative_prompt",
    },
    sample_solver="vanilla",
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    splits_attention=True,
    size=(SIDE, SIDE),
    pictures=True,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        "n": LineOption("negative_prompt", replace_empty_prompt, NO_TEXT),
        **dict.fromkeys(("m", "mask_path"), LineOption("mask_path", read_path, CANCELS)),
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("qwen_image_21", DEFAULTS, __doc__, adjust_options=resolve_generation)


if __name__ == "__main__":
    main.run()
