"""Generate images with Lumina-Image-2.0."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, NO_TEXT, LineOption
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=3.5,
    infer_steps=36,
    flow_shift=6.0,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    blocks_to_swap=None,
    size=(1024, 1024),
    pictures=True,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        "ctr": LineOption("cfg_trunc_ratio", str, NO_TEXT),
        "rcfg": LineOption("renorm_cfg", str, NO_TEXT),
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("lumina", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
