"""Make and edit images with FLUX.2 dev and klein."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import EMBEDDED_IMAGE_OPTIONS, IMAGE_GENERATION_OPTIONS, REFERENCES
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    sample_solver="vanilla",
    size=(1024, 1024),
    pictures=True,
    embedded_guidance=4.0,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    line_options={**IMAGE_GENERATION_OPTIONS, "g": EMBEDDED_IMAGE_OPTIONS["g"], **REFERENCES},
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("flux_2", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
