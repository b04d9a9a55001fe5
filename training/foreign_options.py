"""Options of other trainers' scripts that mean nothing for flow models: refused, or answered in a line.

Scripts of image trainers take the same command lines for all their models; most of these are for Stable
Diffusion.
"""

from modules.options import Options, not_needed, unsupported

EPSILON = "it is for models that predict noise, such as Stable Diffusion; a flow model has no such schedule"
OFFSET = "it is for models that predict noise, such as Stable Diffusion; a flow learns brightness without it"
CLIP = "it is for the text encoders of Stable Diffusion"
DEEPSPEED = (
    "DeepSpeed is not used. Use --blocks_to_swap, --gradient_checkpointing and --fp8_base to save memory, "
    "and accelerate launch for several processes"
)
ROUNDING = "a LoRA's weights are kept in float32, which costs little; use --mixed_precision."
SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++"),
    *("dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)


class OtherModels(Options, title="for other models"):
    """Options of trainers of Stable Diffusion."""

    v2 = unsupported(CLIP)
    v_parameterization = unsupported(EPSILON)
    clip_skip = unsupported(CLIP, type=int)
    max_token_length = unsupported(CLIP, type=int, choices=(150, 225))
    tokenizer_cache_dir = unsupported(
        "tokenizers are looked for beside the text encoders and in the Hugging Face cache; set "
        "HF_HOME to move that",
        type=str,
    )
    weighted_captions = unsupported(
        "these models are trained with whole sentences; weights of words are for generation only"
    )
    noise_offset = unsupported(OFFSET, type=float)
    noise_offset_random_strength = unsupported(OFFSET)
    multires_noise_iterations = unsupported(OFFSET, type=int)
    multires_noise_discount = unsupported(OFFSET, type=float, default=0.3)
    adaptive_noise_scale = unsupported(OFFSET, type=float)
    zero_terminal_snr = unsupported(EPSILON)
    min_snr_gamma = unsupported(EPSILON, type=float)
    scale_v_pred_loss_like_noise_pred = unsupported(EPSILON)
    v_pred_like_loss = unsupported(EPSILON, type=float)
    debiased_estimation_loss = unsupported(EPSILON)
    save_model_as = unsupported(
        "only safetensors files are written: other forms can hold code",
        default="safetensors",
        choices=("ckpt", "pt", "safetensors"),
    )


class DeepspeedOptions(Options, title="DeepSpeed"):
    """Options of trainers with DeepSpeed."""

    deepspeed = unsupported(DEEPSPEED)
    zero_stage = unsupported(DEEPSPEED, type=int, default=2, choices=(0, 1, 2, 3))
    offload_optimizer_device = unsupported(DEEPSPEED, choices=("cpu", "nvme"))
    offload_optimizer_nvme_path = unsupported(DEEPSPEED, type=str)
    offload_param_device = unsupported(DEEPSPEED, choices=("cpu", "nvme"))
    offload_param_nvme_path = unsupported(DEEPSPEED, type=str)
    zero3_init_flag = unsupported(DEEPSPEED)
    zero3_save_16bit_model = unsupported(DEEPSPEED)
    fp16_master_weights_and_gradients = unsupported(DEEPSPEED)


class NotNeeded(Options, title="not needed"):
    """Options for behaviour that is always on here."""

    lowram = not_needed("weights are read in pieces, straight to the device.")
    highvram = not_needed("no cache of the device is emptied between steps.")
    full_fp16 = not_needed(ROUNDING, "train in fp16")
    full_bf16 = not_needed(ROUNDING, "train in bf16")
    no_half_vae = not_needed("the VAE's precision is chosen so that nothing overflows.", "VAE in float32")
    mem_eff_attn = not_needed("torch's own attention (--sdpa) is as lean.", "attention in pieces")
    disable_mmap_load_safetensors = not_needed("safetensors files are read in pieces, never mapped.")
    sample_sampler = not_needed(
        "samples are made with the Euler steps of the model's own flow.",
        "solver of samples",
        values=("euler", "k_euler"),
        default="ddim",
        choices=SAMPLERS,
    )


FOREIGN = (OtherModels, DeepspeedOptions, NotNeeded)
