"""Generate videos with LTX-2 and LTX-2.3, with or without sound.

All options: python ltx2_generate_video.py --help
"""

from dataclasses import replace
from pathlib import Path

import modules.interpreter  # noqa: F401
from generation.options import GenerationOptions
from generation.prompt_lines import CANCELS, GENERATION_OPTIONS, LineOption, read_path
from generation.script_options import IMAGE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from ltx_2.model_options import VIDEO
from ltx_2.options import Ltx2GenerationOptions, settle_generation
from modules.errors import OptionError
from modules.media.options import FormatOptions

DEFAULTS = ScriptDefaults(
    fps=24,
    sample_solver="vanilla",
    media=frozenset({"image_path"}),
    size=(512, 768),
    has_sound=True,
    by_model={"attn_mode": ""},  # whether torch is given counts
    spellings={"save_path": ("--output_dir",), "fp8": ("--fp8_base",)},
    line_options={
        **GENERATION_OPTIONS,
        "v": LineOption("reference_videos", read_path, CANCELS, repeats=True),
        "video_path": GENERATION_OPTIONS["v"],
    },
)


def settle(
    shared: GenerationOptions, own: Ltx2GenerationOptions
) -> tuple[GenerationOptions, Ltx2GenerationOptions]:
    """Settle what has two names; take the factors of references from LoRAs that say them, and such LoRAs out
    of a second stage.
    """
    shared, own = settle_generation(shared, own)
    output = shared.output
    if VIDEO not in own.streams:
        shown = {
            "--post": shared.post.tools,
            "--sheet": shared.sheet.sheet is not None,
            "--save_last_frame": output.save_last_frame,
            "--codec": output.format.codec != FormatOptions().codec,
            "--container": output.format.container != FormatOptions().container,
            "--keep_pngs": output.format.keep_pngs,
            "--preview_latent_every": shared.preview.preview_latent_every is not None,
            "--trim_tail_frames": output.trim_tail_frames,
            "--output_type images": output.output_type in IMAGE_OUTPUTS and output.save_audio is None,
        }
        if options := ", ".join(name for name, is_given in shown.items() if is_given):
            raise OptionError(f"{options}: sound alone has no pictures. Leave out what is for these")
    paths = own.references.paths or None
    told = own.references.reference_strength < 1 or own.references.conditioning_attention_mask
    if told and paths is None and not (shared.from_file or shared.interactive):
        options = "--reference_strength, --conditioning-attention-mask"
        raise OptionError(f"{options}: no reference is given. Give --reference_video")
    request = replace(shared.request, extras={"reference_videos": ("reference_video", paths)})
    shared = replace(shared, request=request)
    if not (paths or shared.lora.lora_weight):
        return shared, own
    from ltx_2.references import settle_factors

    # prompt lines may have references too
    found = settle_factors(own.references, [Path(one) for one in shared.lora.lora_weight or ()])
    own = replace(own, references=found)
    if own.stages.sample_two_stage and not own.stages.skip_stage_2:
        from ltx_2.stages import keep_for_first_stage

        shared, own = keep_for_first_stage(shared, own)
    return shared, own


main = generation_script("ltx_2", DEFAULTS, __doc__, settle=settle)


if __name__ == "__main__":
    main.run()
