"""Options of other trainers' scripts that mean nothing for flow models: refused, or answered in a line.

Scripts of image trainers take the same command lines for all their models; most of these are for Stable
Diffusion.
"""

import argparse
from typing import Any

from modules.parser import add_unneeded, add_unsupported

EPSILON = "it is for models that predict noise, such as Stable Diffusion; a flow model has no such schedule"
OFFSET = "it is for models that predict noise, such as Stable Diffusion; a flow learns brightness without it"
CLIP = "it is for the text encoders of Stable Diffusion"
DEEPSPEED = (
    "DeepSpeed is not used. Use --blocks_to_swap, --gradient_checkpointing and --fp8_base to save memory, "
    "and accelerate launch for several processes"
)
SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++"),
    *("dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


def add_foreign_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them all."""
    _add_diffusion_arguments(parser.add_argument_group("for other models"))
    _add_deepspeed_arguments(parser.add_argument_group("DeepSpeed"))
    group = parser.add_argument_group("not needed")
    switch: dict[str, Any] = {"action": "store_true"}
    add_unneeded(group, "--lowram", instead="weights are read in pieces, straight to the device.", **switch)
    add_unneeded(group, "--highvram", instead="no cache of the device is emptied between steps.", **switch)
    rounding = "a LoRA's weights are kept in float32, which costs little; use --mixed_precision."
    add_unneeded(group, "--full_fp16", instead=rounding, help="train in fp16", **switch)
    add_unneeded(group, "--full_bf16", instead=rounding, help="train in bf16", **switch)
    add_unneeded(
        group,
        "--no_half_vae",
        instead="the VAE's precision is chosen so that nothing overflows.",
        help="VAE in float32",
        **switch,
    )
    add_unneeded(
        group,
        "--mem_eff_attn",
        instead="torch's own attention (--sdpa) is as lean.",
        help="attention in pieces",
        **switch,
    )
    add_unneeded(
        group,
        "--disable_mmap_load_safetensors",
        instead="safetensors files are read in pieces, never mapped.",
        **switch,
    )
    add_unneeded(
        group,
        "--sample_sampler",
        instead="samples are made with the Euler steps of the model's own flow.",
        values=("euler", "k_euler"),
        default="ddim",
        choices=SAMPLERS,
        help="solver of samples",
    )


def _add_diffusion_arguments(group: argparse._ArgumentGroup) -> None:
    switch: dict[str, Any] = {"action": "store_true"}
    add_unsupported(group, "--v2", reason=CLIP, **switch)
    add_unsupported(group, "--v_parameterization", reason=EPSILON, **switch)
    add_unsupported(group, "--clip_skip", reason=CLIP, type=int)
    add_unsupported(group, "--max_token_length", reason=CLIP, type=int, choices=(150, 225))
    add_unsupported(
        group,
        "--tokenizer_cache_dir",
        reason="tokenizers are looked for beside the text encoders and in the Hugging Face cache; set "
        "HF_HOME to move that",
    )
    add_unsupported(
        group,
        "--weighted_captions",
        reason="these models are trained with whole sentences; weights of words are for generation only",
        **switch,
    )
    add_unsupported(group, "--noise_offset", reason=OFFSET, type=float)
    add_unsupported(group, "--noise_offset_random_strength", reason=OFFSET, **switch)
    add_unsupported(group, "--multires_noise_iterations", reason=OFFSET, type=int)
    add_unsupported(group, "--multires_noise_discount", reason=OFFSET, type=float, default=0.3)
    add_unsupported(group, "--adaptive_noise_scale", reason=OFFSET, type=float)
    add_unsupported(group, "--zero_terminal_snr", reason=EPSILON, **switch)
    add_unsupported(group, "--min_snr_gamma", reason=EPSILON, type=float)
    add_unsupported(group, "--scale_v_pred_loss_like_noise_pred", reason=EPSILON, **switch)
    add_unsupported(group, "--v_pred_like_loss", reason=EPSILON, type=float)
    add_unsupported(group, "--debiased_estimation_loss", reason=EPSILON, **switch)
    add_unsupported(
        group,
        "--save_model_as",
        reason="only safetensors files are written: other forms can hold code",
        default="safetensors",
        choices=("ckpt", "pt", "safetensors"),
    )


def _add_deepspeed_arguments(group: argparse._ArgumentGroup) -> None:
    switch: dict[str, Any] = {"action": "store_true"}
    add_unsupported(group, "--deepspeed", reason=DEEPSPEED, **switch)
    add_unsupported(group, "--zero_stage", reason=DEEPSPEED, type=int, default=2, choices=(0, 1, 2, 3))
    for name in ("optimizer", "param"):
        add_unsupported(group, f"--offload_{name}_device", reason=DEEPSPEED, choices=("cpu", "nvme"))
        add_unsupported(group, f"--offload_{name}_nvme_path", reason=DEEPSPEED)
    for name in ("zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients"):
        add_unsupported(group, f"--{name}", reason=DEEPSPEED, **switch)
