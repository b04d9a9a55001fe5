"""Generate images with Anima."""

import modules.interpreter  # noqa: F401
from anima.options import FLOW_SHIFT, GUIDANCE_SCALE, STEPS
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE_SCALE,
    infer_steps=STEPS,
    flow_shift=FLOW_SHIFT,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    size=(1024, 1024),
    pictures=True,
    line_options=IMAGE_GENERATION_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("anima", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
