"""Generate images with HunyuanImage-2.1."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=IMAGE_FPS,
    side_step=32,
    guidance_scale=3.5,
    infer_steps=50,
    flow_shift=5.0,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    joins_guidance=True,
    size=(2048, 2048),
    pictures=True,
    noise_on_cpu=True,
    line_options=IMAGE_GENERATION_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("hunyuan_image", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
