"""Make and edit images with Fibo 2.0, dev and edit-turbo."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from fibo_2.options import (
    GUIDANCE,
    MASK,
    SIDE,
    STEPS,
    TURBO_GUIDANCE,
    TURBO_STEPS,
)
from generation.prompt_lines import CANCELS, IMAGE_GENERATION_OPTIONS, REFERENCES, LineOption, read_path
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    sample_solver="vanilla",
    defaults_from_model={
        "video_size": f"size in pixels; default: {SIDE} {SIDE}, with images to edit about a megapixel in "
        "the shape of the first",
        "flow_shift": "time shift of the schedule; default: by size, e^1.15 at 1024 x 1024",
        "guidance_scale": "weight of the prompt: negative + weight * (positive - negative); 1 turns guidance "
        f"off; default: {GUIDANCE:g}, of edit-turbo {TURBO_GUIDANCE:g}",
        "infer_steps": f"number of denoising steps; default: {STEPS}, of edit-turbo {TURBO_STEPS}",
    },
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        **dict.fromkeys(("m", MASK), LineOption(MASK, read_path, CANCELS)),
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("fibo_2", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
