"""Make and edit images with MOSS-Image, Base and SFT."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, REFERENCES, LineOption, read_name
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from moss_image.options import EXTRAS, GUIDANCE, SHIFT, SIDE, STEPS

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    flow_shift=SHIFT,
    sample_solver="vanilla",
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        **{name: LineOption(name, read_name) for name in EXTRAS},
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("moss_image", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
