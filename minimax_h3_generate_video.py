"""Generate videos with sound, or single pictures, with MiniMax-H3.

All options: python minimax_h3_generate_video.py --help
"""

import modules.interpreter  # noqa: F401
from generation.prompt_lines import GENERATION_OPTIONS, LineOption, read_number
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from minimax_h3.options import FRAMES, SIZE, STEPS, settle_generation

DEFAULTS = ScriptDefaults(
    fps=24,
    infer_steps=STEPS,
    video_length=FRAMES,
    flow_shift=12.0,
    sample_solver="vanilla",
    media=frozenset(),
    splits_attention=True,
    size=SIZE,
    has_sound=True,
    by_model={
        **dict.fromkeys(("video_size", "video_length"), ""),
        "flow_shift": "time shift of the pictures' schedule; 6 for LoRAs of four steps; default 12",
        "guidance_scale": "1: guidance is built into the model",
    },
    spellings={
        "infer_steps": ("--steps",),
        "fps": ("--output_fps",),
        "flow_shift": ("--h3_shift_video",),
        "save_path": ("--output",),
        "fp8": ("--fp8_base",),
        "convrot_int8": ("--int8_convrot_base",),
    },
    line_options={**GENERATION_OPTIONS, "fsa": LineOption("h3_shift_audio", read_number)},
    output_types=("video", "images", "latent", "both", "latent_images"),
)
main = generation_script("minimax_h3", DEFAULTS, __doc__, settle=settle_generation)


if __name__ == "__main__":
    main.run()
