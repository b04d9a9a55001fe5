"""Generate videos with audio, or single images, with MiniMax-H3."""

import modules.interpreter  # noqa: F401
from generation.prompt_lines import (
    CANCELS,
    GENERATION_OPTIONS,
    LineOption,
    read_name,
    read_number,
    read_path,
)
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from minimax_h3.options import FRAMES, SIZE, STEPS, resolve_generation
from modules.media.lengths import ClipLengths
from modules.option_values import parse_int

DEFAULTS = ScriptDefaults(
    fps=24,
    side_step=32,
    lengths=ClipLengths(17, 5),
    infer_steps=STEPS,
    video_length=FRAMES,
    flow_shift=12.0,
    sample_solver="vanilla",
    media=frozenset({"image_path", "end_image_path"}),
    builds_in_guidance=True,
    splits_attention=True,
    size=SIZE,
    has_sound=True,
    defaults_from_model={
        **dict.fromkeys(("video_size", "video_length"), ""),
        "image_path": "image that the clip begins with",
        "end_image_path": "image that it ends with; alone too",
        "flow_shift": "time shift of the images' schedule; 6 for LoRAs of four steps; default 12",
        "guidance_scale": "1: guidance is built into the model",
    },
    spellings={
        "image_path": ("--first_frame",),
        "end_image_path": ("--last_frame",),
        "infer_steps": ("--steps",),
        "fps": ("--output_fps",),
        "flow_shift": ("--h3_shift_video",),
        "save_path": ("--output",),
        "fp8": ("--fp8_base",),
        "convrot_int8": ("--int8_convrot_base",),
    },
    line_options={
        **GENERATION_OPTIONS,
        "fsa": LineOption("h3_shift_audio", read_number),
        "first_frame": GENERATION_OPTIONS["i"],
        "last_frame": GENERATION_OPTIONS["ei"],
        "task": LineOption("task", read_name),
        "of": LineOption("one_frame_inference", read_name),
        "ri": LineOption("reference_image", read_path, CANCELS, repeats=True),
        "rv": LineOption("reference_video", read_path, CANCELS, repeats=True),
        "ra": LineOption("reference_audio", read_path, CANCELS, repeats=True),
        "ref": LineOption("ref", read_path, CANCELS, repeats=True),
        "keyframe": LineOption("keyframe", read_path, CANCELS, repeats=True),
        "condition_image": LineOption("condition_image", read_path, CANCELS, repeats=True),
        "reference_jsonl": LineOption("reference_jsonl", read_path, CANCELS),
        "reference_index": LineOption("reference_index", parse_int),
    },
    output_types=("video", "images", "latent", "both", "latent_images"),
)
main = generation_script("minimax_h3", DEFAULTS, __doc__, adjust_options=resolve_generation)


if __name__ == "__main__":
    main.run()
