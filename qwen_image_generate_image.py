"""Generate or edit images with Qwen-Image."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import (
    CANCELS,
    IMAGE_GENERATION_OPTIONS,
    REFERENCES,
    LineOption,
    read_path,
)
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from modules.option_values import parse_int

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=4.0,
    infer_steps=25,
    sample_solver="vanilla",
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    size=(1328, 1328),
    pictures=True,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        "mask_path": LineOption("mask_path", read_path, CANCELS),
        "f": LineOption("output_layers", parse_int),
    },
    output_types=PICTURE_OUTPUTS,
    defaults_from_model={"output_layers": ""},  # of no use to other releases, which warn of it
)
main = generation_script("qwen_image", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
