"""Edit images with FLUX.1 Kontext."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from flux.kontext.options import GUIDANCE
from generation.prompt_lines import EMBEDDED_IMAGE_OPTIONS, REFERENCES
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=IMAGE_FPS,
    infer_steps=25,
    pictures=True,
    sample_solver="vanilla",
    embedded_guidance=GUIDANCE,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    has_second_prompt=True,
    line_options={**EMBEDDED_IMAGE_OPTIONS, **REFERENCES},
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("flux_kontext", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
