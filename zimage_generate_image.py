"""Generate images with Z-Image."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, NO_TEXT, LineOption
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=0.0,
    infer_steps=25,
    defaults_from_model={
        "guidance_scale": "weight of the prompt, counted from 0, which turns guidance off: positive + weight "
        "* (positive - negative), so that 4 is what models that count from 1 call 5; default: 4 for a file "
        "that is named as the base, else 0",
        "infer_steps": "number of denoising steps; default: 28 for a file that is named as the base, 8 for "
        "Turbo, else 25",
    },
    flow_shift=3.0,
    sample_solver="vanilla",
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    size=(1024, 1024),
    pictures=True,
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        "ctr": LineOption("cfg_trunc_ratio", str, NO_TEXT),
        "rcfg": LineOption("renorm_cfg", str, NO_TEXT),
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("z_image", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
