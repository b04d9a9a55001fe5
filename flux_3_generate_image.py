"""Make and edit images with FLUX 3 Image Klein, base and distilled."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from flux_3.options import DISTILLED_STEPS, GUIDANCE, SHIFT, SIDE, STEPS
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, REFERENCES
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    flow_shift=SHIFT,
    sample_solver="vanilla",
    defaults_from_model={
        "video_size": f"size in pixels; default: {SIDE} {SIDE}, with reference images that of the first",
        "guidance_scale": "weight of the prompt: negative + weight * (positive - negative); 1 turns guidance "
        f"off; default: {GUIDANCE}, of the distilled model none",
        "infer_steps": f"number of denoising steps; default: {STEPS}, of the distilled model "
        f"{DISTILLED_STEPS}",
    },
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    line_options={**IMAGE_GENERATION_OPTIONS, **REFERENCES},
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("flux_3", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
