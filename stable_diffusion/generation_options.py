"""Options of sd_generate_image.py and sdxl_generate_image.py, and how they adopt the shared ones.

Standard library only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, LineOption, read_name, read_number, read_path
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from modules.options import NO_PIXELS, Options, make_request_facts, not_needed, option, unsupported
from runtime.options import SWAPPING
from runtime.ways.composing import list_block_options
from stable_diffusion.sampling_options import DEFAULT_STRENGTH, SAMPLERS
from stable_diffusion.training_options import (
    CKPT,
    CKPT_HELP,
    DEFAULT_SAMPLER,
    GUIDANCE_SCALE,
    STEPS,
    TOKENIZERS_HELP,
    VAE_HELP,
)

_PRECISION = "precision"
_USE_GEN_IMG = "gen_img.py has it. Use that script, which makes the same images"
_IN_BRACKETS = "brackets in prompts are weights for all models of Stable Diffusion, as in gen_img.py"
_BY_MODE = "torch's own kernels are usual; --attn_mode chooses others"
_OWN_LOOP = "the U-Net runs its blocks by itself, and cannot {}. Omit it"
_NO_SWAP = _OWN_LOOP.format("wait in host memory in part")
_NO_SKIP = _OWN_LOOP.format("skip some of them")
_NO_SECOND = _OWN_LOOP.format("attend to a second text")
_NO_SHARE = _OWN_LOOP.format("share them between processes")
# shared options that act on the blocks of a transformer
REJECTED: Mapping[str, str] = {
    **dict.fromkeys((*SWAPPING, "block_swap_ring_size"), _NO_SWAP),
    **dict.fromkeys(("slg_mode", "slg_layers", "slg_scale", "slg_start", "slg_end"), _NO_SKIP),
    **dict.fromkeys(("nag_prompt", "nag_scale", "nag_tau", "nag_alpha"), _NO_SECOND),
    **dict.fromkeys(list_block_options(), _NO_SHARE),
    **dict.fromkeys(
        (
            *("magcache_mag_ratios", "magcache_retention_ratio", "magcache_threshold", "magcache_k"),
            *("magcache_calibration", "teacache_threshold", "teacache_coefficients", "teacache_calibration"),
        ),
        _NO_SKIP,
    ),
    **dict.fromkeys(
        ("i2_extra_noise", "v2v_extra_noise"),
        "the sampler adds its noise by itself. Use a larger --strength for more change",
    ),
    "save_merged_model": "it would omit the text encoders. Use networks/sdxl_merge_lora.py",
    "prompt_weighting": f"{_IN_BRACKETS}, without an option. Omit it",
}
_LINE_OPTIONS: Mapping[str, LineOption] = {
    **{
        letter: line_option
        for letter, line_option in IMAGE_GENERATION_OPTIONS.items()
        if letter not in ("fs", "nag", "mcrr", "mct", "mck", "tct")
    },
    "ss": LineOption("sample_solver", read_name),
    "m": LineOption("mask_path", read_path),  # likewise
    "t": LineOption("denoise", read_number),  # as in lines of gen_img.py
}


def script_defaults(side: int, side_step: int) -> ScriptDefaults:
    """Return a script's defaults and limits for the options shared by all families.

    Args:
        side: Default width and height of the images, in pixels.
        side_step: Width and height must be multiples of this.
    """
    return ScriptDefaults(
        fps=IMAGE_FPS,
        guidance_scale=GUIDANCE_SCALE,
        infer_steps=STEPS,
        sample_solver=DEFAULT_SAMPLER,
        solvers={name: name for name in SAMPLERS},
        solver_help="how steps are made, as gen_img.py --sampler; k_NAME is the same as NAME",
        media=frozenset(),
        source=SourceDefaults(denoise_option="strength", denoise=DEFAULT_STRENGTH, takes_video=False),
        size=(side, side),
        side_step=side_step,
        pictures=True,
        noise_on_cpu=True,
        line_options=_LINE_OPTIONS,
        output_types=PICTURE_OUTPUTS,
        spellings={
            "infer_steps": ("--steps", "--infer_steps"),
            "guidance_scale": ("--guidance_scale", "--scale"),
            "sample_solver": ("--sampler", "--sample_solver"),
        },
        without=("flow_shift",),
        refused=REJECTED,
    )


def _unsupported_gen_img(**settings: Any) -> Any:
    return unsupported(_USE_GEN_IMG, **settings)


class StableDiffusionGenerationOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of the generation scripts, in addition to those shared by all families."""

    ckpt: Path = option(CKPT_HELP, flags=(CKPT, "--ckpt"), often=True, required=True)
    vae: Path | None = option(VAE_HELP, often=True)
    tokenizer_cache_dir: Path | None = option(TOKENIZERS_HELP, facts=NO_PIXELS)
    fp16: bool = option(
        "compute in float16, the VAE in float32; default: all in float32",
        title=_PRECISION,
        excludes="bf16",
        often=True,
    )
    bf16: bool = option("compute in bfloat16, the VAE in float32", title=_PRECISION, often=True)
    v_parameterization: bool = option(
        "the model predicts v, as Stable Diffusion 2.x of 768 pixels does; not needed if the checkpoint says "
        "it"
    )
    zero_terminal_snr: bool = option("the last timestep is pure noise, for models trained that way")
    clip_skip: int | None = option(
        "layer of the text encoders whose states are used, from the end: 1 is the last one; default: 1, for "
        "XL 2",
        minimum=1,
        hint="1 or 2",
        often=True,
    )
    max_embeddings_multiples: int | None = option(
        "how long a prompt may be, in chunks of 75 tokens; default: 1, the rest is cut off with a warning",
        minimum=1,
        often=True,
    )
    mask_path: Path | None = option(
        "with --i2i_path and an inpainting checkpoint: image whose white parts are repainted; without it, "
        "a random part",
        facts=make_request_facts("mask_path"),
    )
    no_half_vae = not_needed("the VAE always computes in float32.", "VAE in float32")
    sdpa = not_needed(f"{_BY_MODE}.")
    xformers = unsupported("pass --attn_mode xformers instead")
    diffusers_xformers = unsupported("pass --attn_mode xformers instead")
    control_net_models = _unsupported_gen_img(type=Path, nargs="*")
    control_net_lllite_models = _unsupported_gen_img(type=Path, nargs="*")
    XTI_embeddings = _unsupported_gen_img(type=Path, nargs="*")
    emb_normalize_mode = _unsupported_gen_img(type=str)
    clip_vision_strength = _unsupported_gen_img(type=float)
    clip_guidance_scale = _unsupported_gen_img(type=float)
    clip_image_guidance_scale = _unsupported_gen_img(type=float)
    vgg16_guidance_scale = _unsupported_gen_img(type=float)
    negative_scale = _unsupported_gen_img(type=float)
    highres_fix_scale = _unsupported_gen_img(type=float)
    ds_depth_1 = _unsupported_gen_img(type=int)
    gradual_latent_timesteps = _unsupported_gen_img(type=int)
    pyramid_noise_prob = _unsupported_gen_img(type=float)
    noise_offset_prob = _unsupported_gen_img(type=float)
    original_height = _unsupported_gen_img(type=int)
    original_width = _unsupported_gen_img(type=int)
    crop_top = _unsupported_gen_img(type=int)
    crop_left = _unsupported_gen_img(type=int)
    batch_size = unsupported(
        "each image is computed by itself here: --num_images makes several. For batches use gen_img.py",
        type=int,
    )
    network_merge = not_needed("LoRAs are always merged into the weights.")
