"""Generate videos with LTX-2 and LTX-2.3, with or without audio."""

from dataclasses import replace
from pathlib import Path

import modules.interpreter  # noqa: F401
from generation.options import GenerationOptions
from generation.prompt_lines import (
    CANCELS,
    GENERATION_OPTIONS,
    LineOption,
    read_fraction,
    read_path,
    read_switch,
)
from generation.script_options import IMAGE_OUTPUTS, UNDECODED, RequestOptions, ScriptDefaults
from generation.scripts import generation_script
from ltx_2.audio_reference_options import IDENTITY_SCALE
from ltx_2.model_options import VIDEO
from ltx_2.options import Ltx2GenerationOptions, resolve_generation
from modules.errors import OptionError
from modules.media.lengths import ClipLengths
from modules.media.options import FormatOptions

DEFAULTS = ScriptDefaults(
    fps=24,
    side_step=32,
    lengths=ClipLengths(8),
    sample_solver="vanilla",
    media=frozenset({"image_path"}),
    size=(512, 768),
    has_sound=True,
    defaults_from_model={"attn_mode": ""},  # whether torch is given counts
    spellings={"save_path": ("--output_dir",), "fp8": ("--fp8_base",)},
    line_options={
        **GENERATION_OPTIONS,
        "v": LineOption("reference_videos", read_path, CANCELS, repeats=True),
        "video_path": GENERATION_OPTIONS["v"],
        "im": LineOption("inpaint_mask", read_path, CANCELS),
        "ii": LineOption("inpaint_invert", read_switch),
        "it": LineOption("inpaint_threshold", read_fraction),
        "ra": LineOption("reference_audio", read_path, CANCELS),
        "gk": LineOption("keyframe", read_path, CANCELS, repeats=True),
        "gl": LineOption("latent_frame", read_path, CANCELS, repeats=True),
    },
)


def settle(
    shared: GenerationOptions, family_options: Ltx2GenerationOptions
) -> tuple[GenerationOptions, Ltx2GenerationOptions]:
    """Resolve options that have two names, and what LoRAs with references require.

    Factors of references are read from LoRAs that record them. Such LoRAs are left out of a second stage.
    """
    shared, family_options = resolve_generation(shared, family_options)
    if VIDEO not in family_options.streams:
        reject_image_options(shared)
    if family_options.given.paste_source is not None:
        check_decodes(shared)
    if not (shared.from_file or shared.interactive):  # prompt lines may name references
        require_references(family_options)
    paths = family_options.references.paths or None
    shared = replace(shared, request=add_extras(shared.request, paths))
    if not (paths or shared.lora.lora_weight):
        return shared, family_options
    family_options = resolve_from_loras(shared, family_options)
    if family_options.stages.sample_two_stage and not family_options.stages.skip_stage_2:
        from ltx_2.stages import move_ic_loras_to_first_stage  # with two stages

        return move_ic_loras_to_first_stage(shared, family_options)
    return shared, family_options


def require_references(options: Ltx2GenerationOptions) -> None:
    """Raise OptionError if an option for references is given, but no reference."""
    references = options.references
    is_about_references = references.reference_strength < 1 or references.conditioning_attention_mask
    if is_about_references and not references.paths:
        names = "--reference_strength, --conditioning-attention-mask"
        raise OptionError(f"{names}: no reference is given. Pass --reference_video")
    audio = options.audio_references
    if audio.identity_scale and audio.reference_audio is None:
        raise OptionError(f"--{IDENTITY_SCALE}: no reference is given. Pass --reference_audio")


def add_extras(request: RequestOptions, references: tuple[Path, ...] | None) -> RequestOptions:
    """Return the options of requests with LTX-2's own ones, which prompt lines can replace.

    Only a line sets the two of inpainting here: those of the command line are in LTX-2's own record.
    """
    extras = {
        **request.extras,
        "inpaint_invert": ("inpaint_invert", None),
        "inpaint_threshold": ("inpaint_threshold", None),
        "reference_videos": ("reference_video", references),
    }
    return replace(request, extras=extras)


def resolve_from_loras(shared: GenerationOptions, options: Ltx2GenerationOptions) -> Ltx2GenerationOptions:
    """Return the options with the factors and positions of references that the LoRAs record."""
    from ltx_2.audio_references import resolve_reference_positions  # with references or a LoRA
    from ltx_2.references import resolve_reference_factors

    loras = [Path(weight) for weight in shared.lora.lora_weight or ()]
    return replace(
        options,
        references=resolve_reference_factors(options.references, loras),
        audio_references=resolve_reference_positions(options.audio_references, loras),
    )


def check_decodes(shared: GenerationOptions) -> None:
    """Raise OptionError if --paste_source has no new pixels to change."""
    if shared.latent_path:
        raise OptionError(
            "--paste_source with --latent_path: a file of latents does not say what was kept. Omit it"
        )
    if shared.output.output_type in UNDECODED:
        raise OptionError(
            "--paste_source with --output_type latent: no frames are decoded. Use --output_type both, or "
            "omit it"
        )


def reject_image_options(shared: GenerationOptions) -> None:
    """Raise OptionError if an option for images is given, for a clip that is sound alone."""
    output = shared.output
    default = FormatOptions()
    given_options = {
        "--post": shared.post.tools,
        "--sheet": shared.sheet.sheet is not None,
        "--save_last_frame": output.save_last_frame,
        "--codec": output.format.codec != default.codec,
        "--container": output.format.container != default.container,
        "--keep_pngs": output.format.keep_pngs,
        "--preview_latent_every": shared.preview.preview_latent_every is not None,
        "--trim_tail_frames": output.trim_tail_frames,
        "--output_type images": output.output_type in IMAGE_OUTPUTS and output.save_audio is None,
    }
    options = ", ".join(name for name, is_given in given_options.items() if is_given)
    if options:
        raise OptionError(f"{options}: audio alone has no images. Omit what is for these")


main = generation_script("ltx_2", DEFAULTS, __doc__, adjust_options=settle)


if __name__ == "__main__":
    main.run()
