"""Make images with Ideogram 4, with one network or both."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from ideogram4.options import FINAL_GUIDANCE, GUIDANCE, SIDE, STEPS

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    sample_solver="vanilla",
    defaults_from_model={
        "flow_shift": "e to the mean of the noise levels' logits; default: by preset and size, 2 at "
        "1024 x 1024",
        "guidance_scale": "weight of the prompt: other + weight * (positive - other), where other is "
        "the second network's prediction or that of the negative prompt; 1 turns guidance off; "
        f"default: {GUIDANCE:g}, in the last steps of a preset {FINAL_GUIDANCE:g}; 1 for files that are "
        "named as Instant or Fast",
        "infer_steps": f"number of denoising steps; default: that of --sampler_preset, {STEPS}",
    },
    splits_attention=True,
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    line_options=IMAGE_GENERATION_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("ideogram4", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
