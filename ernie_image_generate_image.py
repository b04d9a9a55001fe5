"""Make images with ERNIE-Image, base and Turbo."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from ernie_image.options import GUIDANCE, SHIFT, SIDE, STEPS, TURBO_STEPS
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    flow_shift=SHIFT,
    sample_solver="vanilla",
    defaults_from_model={
        "guidance_scale": "weight of the prompt: negative + weight * (positive - negative); 1 turns guidance "
        f"off; default: {GUIDANCE:g}, for a file that is named as Turbo 1",
        "infer_steps": f"number of denoising steps; default: {STEPS}, for a file that is named as Turbo "
        f"{TURBO_STEPS}",
    },
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    line_options=IMAGE_GENERATION_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("ernie_image", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
