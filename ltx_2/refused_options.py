"""Options of musubi-tuner's LTX-2 fork that are rejected or not needed here. Standard library only.

An option is written as NAME (a switch), NAME:TYPE or NAME=DEFAULT. NAME* and NAME+ take several words, NAME?
also has --no-NAME, which is accepted because it asks for nothing, and NAME:switch is None if it is not given.
A,B are two spellings of the same option.
"""

import argparse
import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from modules.options import Options, Rejection, not_needed, unsupported

R = TypeVar("R", bound=type[Options])
TYPES: dict[str, Any] = {"int": int, "float": float, "path": Path, "str": str}

# reasons, which follow "--flag is refused: "
ALWAYS_GIVEN = "a first frame that is given has time 0, as it has in training"
ATTENTION = "attention is that of the released model, in both directions between video and audio"
AVERAGE = "--ema_decay 0.9999 turns the average of the weights on, and --ema_update_every thins it out"
BALANCE = "the two losses are added by --video_loss_weight and --audio_loss_weight, in each batch"
BITS = (
    "Gemma in 4 bits is not built. --gemma_load_in_8bit keeps it in 8 bits, and what does not fit on the "
    "device waits in host memory"
)
BLANK = "what the model makes without a prompt is kept by --blank_prior_weight 1"
BLANK_CACHE = "--empty_prompt caches the empty prompt, which --blank_prior_weight compares"
CONNECTORS = "texts are cached behind the connectors, which are not trained"
DATA = "the dataset configuration says how clips, audio and captions are read"
DROPOUT = "caption_dropout_rate is a key of the tables of the dataset configuration"
DURATION = "LTX-2.5's network that chooses the duration is not built. Pass --video_length"
DEVICES = "devices share a model by accelerate launch, with --shard_base or --context_parallel"
FROZEN = "a LoRA that does not learn is merged by --base_weights FILE --base_weights_multiplier 1"
HUBER = "--huber_c and --huber_scale are the threshold of --loss_type huber"
MANIFEST = "a training needs the caches and the dataset configuration, and no other list"
MODULES = (
    "all modules learn with the same dropout, decay and clipping: --network_args, --optimizer_args, "
    "--max_grad_norm. --lora_target_preset says which ones they are"
)
PRESERVED = (
    "the model's answer to a class prompt is not preserved. --blank_prior_weight 1 keeps what it makes "
    "without a prompt, and a table with prior_loss_weight what it makes of other captions"
)
PRESET = (
    "the defaults are those of the release. Steps, scales, --sample_solver and --negative_prompt change them"
)
RATES = (
    "rates and ranks of some modules are set by their names: --network_args network_reg_lrs=audio=1e-5 "
    "network_reg_dims=audio=16"
)
ONE_AUDIO = "a clip has one audio reference. Set reference_audio_directory in its table"
APART = "a sample's video has what was made alone; references are files that one can look at beside it"
REPORTS = "--log_with, --show_timesteps and --check report on a run"
RESUMING = "--resume STATE_FOLDER continues a whole state, --network_weights starts a new run from a LoRA"
AUDIO_DTYPE = "audio is cached in float32, as its VAE computes"
SPEED = (
    "kernels and memory are chosen by --flash_attn and the like, --compile, --gradient_checkpointing "
    "and --blocks_to_swap"
)
TERMS = "this change of the loss is not built"
TILES = "the edge of tiles is --vae_spatial_tile_sample_min_size, or that of --vae_tiling"
TREAD = "--tread 0.5 --tread_blocks 3 -4 are the share of tokens, and the first and the last block"
WEIGHTS = (
    "weights are kept in 8 bits by --fp8_base (generation: --fp8), --fp8_scaled and --convrot_int8, in 4 "
    "bits by --nf4_base; other formats are not built"
)
# what happens anyway, for options that are not needed
ALONE_SO = (
    "--ltx2_mode audio trains and generates audio alone, whose length, at target_fps of its table, and whose "
    "noise levels need no images."
)
DECODER_SO = "videos are decoded by PyAV, on the CPU."
FILES_SO = "files are read tensor by tensor, written whole or not at all, and say how they were made."
FLOATS_SO = "a LoRA's weights are kept in float32, which costs little; use --mixed_precision."
KERNELS_SO = "torch's own kernels are the default of --attn_mode."
PER_SAMPLE_SO = "the loss of a clip is the mean over its tokens that are not given."
SAMPLES_SO = "a training encodes the texts and images of its samples itself."
AUDIO_NAMES_SO = "a file of the clip's name is its audio, whatever it ends with."
AUDIO_SO = (
    "audio keeps its speed, clips without it do not affect the audio of other clips in their batch, and a "
    "video file contains its audio."
)
WORK_SO = "processes share the work, and weights wait in host memory, where that is of use."

# reason -> options. Reasons of refused options come first; a reason that ends with a period belongs to
# options that are not needed, and states what happens without them
Table = Mapping[str, str]

# options of both training and generation
_TILES = """
    sample_tiled_vae sample_vae_tile_size=512 sample_vae_tile_overlap=64 sample_vae_temporal_tile_size=0
    sample_vae_temporal_tile_overlap=8
"""

LATENTS: Table = {
    MANIFEST: "save_dataset_manifest:str",
    DECODER_SO: "video_decode_backend:str video_decode_device:str",
    ALONE_SO: """
        audio_video_latent_channels:int audio_video_latent_dtype:str audio_only_target_resolution:int
        audio_only_target_fps=25.0 audio_only_sequence_resolution=64
    """,
    AUDIO_DTYPE: "ltx2_audio_dtype:str",
    AUDIO_NAMES_SO: "ltx2_audio_ext=.wav",
    TILES: """
        vae_chunk_size:int vae_spatial_tile_size:int vae_spatial_tile_overlap=64 vae_temporal_tile_size:int
        vae_temporal_tile_overlap=24
    """,
    FILES_SO: "cpu_staged_checkpoint_loading atomic_cache_writes",
    SAMPLES_SO: """
        precache_sample_latents sample_prompts:str sample_latents_cache:str
        sample_sampling_preset,sampling_preset=defaults
        height=512 width=768 sample_num_frames=45
    """,
    AUDIO_SO: "preserve_audio_timing:switch",
    WORK_SO: "cache_distributed",
}
TEXTS: Table = {
    BITS: """
        gemma_load_in_4bit gemma_bnb_4bit_quant_type=nf4 gemma_bnb_4bit_disable_double_quant
        gemma_bnb_4bit_compute_dtype=auto
    """,
    CONNECTORS: "cache_before_connector",
    DATA: "caption_field:str",
    BLANK_CACHE: "blank_preservation",
    PRESERVED: "dop dop_class_prompt= dop_args*:str",
    FILES_SO: "cpu_staged_checkpoint_loading atomic_cache_writes",
    SAMPLES_SO: """
        precache_sample_prompts sample_prompts:str sample_prompts_cache:str
        sample_sampling_preset,sampling_preset=defaults sample_use_default_negative_prompt?
        guidance_scale=3.0 video_cfg_scale:float audio_cfg_scale:float precache_preservation_prompts
        preservation_prompts_cache:str
    """,
    WORK_SO: "cache_distributed gemma_fp8_weight_offload?",
}
TRAINING: Table = {
    ATTENTION: """
        av_cross_attention_mode=both ltx2_causal_temporal_attention ltx2_soft_av_alignment
        ltx2_soft_av_alignment_sigma=1.0
    """,
    AVERAGE: "use_ema ema_update_after_step=100 save_ema_only ema_cpu_offload",
    BALANCE: """
        accumulation_group_by=none accumulation_group_remainder=drop av_curriculum_mode=none
        av_curriculum_interval_steps=1 av_curriculum_start_modality=video av_curriculum_stage1_steps=0
        av_curriculum_stage1_policy=video av_curriculum_stage2_policy=joint audio_loss_balance_mode=none
        audio_loss_balance_beta=0.01 audio_loss_balance_eps=0.05 audio_loss_balance_min=0.05
        audio_loss_balance_max=4.0 audio_loss_balance_ema_init=1.0 audio_loss_balance_target_ratio=0.33
        audio_loss_balance_ema_decay=0.99 uncertainty_lr:float ogm_ge_alpha=0.3 ogm_ge_noise_std=0.0
        audio_supervision_mode=off audio_supervision_warmup_steps=50 audio_supervision_check_interval=50
        audio_supervision_min_ratio=0.9 min_audio_batches_per_accum=0 audio_batch_probability:float
        modality_freeze_check_interval=0 modality_freeze_ratio_threshold=0.5
        modality_freeze_warmup_steps=100 modality_freeze_ema_decay=0.99
    """,
    BITS: """
        gemma_load_in_4bit gemma_bnb_4bit_quant_type=nf4 gemma_bnb_4bit_disable_double_quant
        gemma_bnb_use_local_rank
    """,
    CONNECTORS: "train_connectors",
    BLANK: "blank_preservation blank_preservation_args*:str",
    DATA: "caption_field:str audio_bucket_strategy:str audio_bucket_interval:float",
    DROPOUT: "caption_dropout_rate=0.0 video_caption_dropout_rate=0.0 audio_caption_dropout_rate=0.0",
    MANIFEST: "dataset_manifest:path",
    DEVICES: """
        ltx2_model_parallel ltx2_model_parallel_devices:str ltx2_model_parallel_splits:str
        ltx2_mp_profile_transfers ltx2_mp_profile_log_every=20 ltx2_mp_activation_codec=none
        ltx2_mp_grad_codec=none ltx2_mp_int8_block_size=256 ltx2_remote_stage
        ltx2_remote_stage_host=127.0.0.1 ltx2_remote_stage_port=7788 ltx2_remote_stage_split=-1
        ltx2_remote_stage_specs:str ltx2_remote_stage_timeout=600.0 ltx2_remote_stage_codec=none
        ltx2_remote_stage_grad_codec=none ltx2_remote_stage_int8_block_size=256
        ltx2_remote_stage_metadata_cache?=True ltx2_remote_stage_metadata_cache_size=8
        ltx2_remote_stage_aq_key_mode=sample ltx2_remote_stage_aq_stochastic?=True
        ltx2_remote_stage_aq_cache_size=0 ltx2_remote_stage_trainable ltx2_remote_stage_trainable_scope=auto
        ltx2_remote_stage_learning_rate:float ltx2_remote_stage_weight_decay=0.01
        ltx2_remote_stage_max_grad_norm=0.0 ltx2_remote_stage_checkpoint_dir:str
        ltx2_remote_stage_prune_local_blocks
    """,
    PER_SAMPLE_SO: "ltx2_per_sample_loss",
    FLOATS_SO: "full_fp16 full_bf16",
    FROZEN: "frozen_network_weights*:str frozen_network_multiplier*:float",
    HUBER: "huber_delta=1.0",
    RATES: "audio_lr:float lr_args*:str audio_dim:int audio_alpha:float",
    MODULES: """
        network_freeze_surplus_modules lycoris_config:str init_lokr_norm:float
        lycoris_quantized_base_check_mode=warn lr_group_warmup_args*:str
        lr_group_scheduler_args*:str video_rank_dropout:float
        video_module_dropout:float video_max_grad_norm:float video_weight_decay:float
        audio_rank_dropout:float audio_module_dropout:float audio_max_grad_norm:float
        audio_weight_decay:float cross_modal_rank_dropout:float cross_modal_module_dropout:float
        cross_modal_max_grad_norm:float cross_modal_weight_decay:float
    """,
    PRESET: """
        av_bimodal_cfg?=False av_bimodal_scale:float sample_sampling_preset,sampling_preset=defaults
        sample_use_default_negative_prompt? sample_sigma_schedule=auto sample_sampler=auto
        sample_disable_flash_attn
    """,
    ONE_AUDIO: "av_multi_ref?=False",
    APART: "sample_include_reference",
    REPORTS: """
        log_cuda_memory_every_n_steps:int log_grad_metrics log_timestep_distribution_interval=100
        debug_dataset ltx2_validate_training_tensors audio_metrics audio_metrics_args*:str
        noise_scale_probe=0 noise_scale_probe_rounds=5 noise_scale_probe_param_frac=1.0
    """,
    RESUMING: "autoresume reset_optimizer reset_optimizer_params reset_dataloader save_state_mode=full",
    ALONE_SO: "ltx2_audio_only_model audio_only_sequence_resolution=64 sample_audio_only",
    SPEED: """
        cudnn_attn inductor_config*:str compile_auto_cache_size_limit compile_fallback_to_eager
        compile_cudagraph_mark_step cuda_memory_fraction:float dynamo_use_regional_compilation
        ltx2_fused_norm_rope:switch ltx2_fused_norm_rope_backward:switch ltx2_compact_av_cross_adaln:switch
        ltx2_fp8_placement_scope:switch ltx2_attn_auto_dispatch:switch ltx2_flash_attn_4:switch
        ltx2_prompt_kv_checkpoint:switch ltx2_padded_prompt_trim:switch
        ltx2_partial_gradient_checkpointing:switch ltx2_compile_inner_blocks:switch
        ltx2_bounded_activation_offload:switch ltx2_block_swap_async_backward:switch
        ltx2_block_swap_trainable_ring:switch ltx2_compact_av_cross_adaln_min_tokens:int
        ltx2_prompt_kv_checkpoint_max_mb:int ltx2_activation_offload_max_inflight:int
        ltx2_activation_offload_keep_trailing:int ltx2_activation_offload_min_mb:float split_attn_target:str
        split_attn_mode:str split_attn_chunk_size=0 ffn_chunk_target:str ffn_chunk_size=0
        blockwise_checkpointing blocks_to_checkpoint=-1
    """,
    TERMS: """
        weight_noise_mode=none weight_noise_scale=0.01 differential_guidance
        differential_guidance_scale=3.0 differential_guidance_schedule=constant
        differential_guidance_start_scale=1.0 differential_guidance_end_scale=1.0
        differential_guidance_warmup_steps=0 differential_guidance_hold_steps=0
        differential_guidance_decay_steps=0 differential_guidance_timestep_mode=none
        differential_guidance_timestep_floor=1.0 differential_guidance_normalize_residual
        differential_guidance_residual_clip=0.0 differential_guidance_adaptive_target_norm=0.0
        differential_guidance_adaptive_target_ratio=0.0 differential_guidance_adaptive_ema=0.95
        differential_guidance_adaptive_rate=0.1 differential_guidance_adaptive_min=0.25
        differential_guidance_adaptive_max=4.0 ltx2_xm_k=1 audio_silence_regularizer
        audio_silence_regularizer_weight=1.0 prior_divergence prior_divergence_args*:str tarp
        tarp_args*:str dcr dcr_args*:str av_cross_grad_surgery av_cross_grad_surgery_args*:str
        av_attention_loss_weighting av_attention_loss_max=1.5 av_attention_loss_warmup_steps=400 crepa
        crepa_args*:str self_flow self_flow_args*:str latent_temporal_weighting
        latent_temporal_weighting_args*:str latent_delta_loss latent_delta_loss_args*:str hfato
        hfato_args*:str cts_lambda_video_driven=0.0 cts_lambda_audio_driven=0.0
    """,
    PRESERVED: "dop dop_args*:str audio_dop audio_dop_args*:str",
    TREAD: "tread_args*:str",
    TILES: _TILES,
    WEIGHTS: """
        fp8_keep_blocks:str fp8_w8a8 w8a8_mode=int8 w8a8_backend:str int8_base int8_base_dynamic
        int8_convrot_base int8_convrot_dynamic int8_convrot_groupsize=auto int8_convrot_no_mse_clip
        int8_convrot_quality_report:str w4a4g4 w4a8 int4_convrot_base int4_convrot_dynamic w4a4g8
        w4a4g4_stabilizer_rank:int w4a4g4_container=auto int4_convrot_groupsize=auto
        int4_convrot_no_mse_clip int4_convrot_quality_report:str int4_convrot_scale_refine_steps=0
        int4_convrot_group_scales=0 int4_convrot_group_ratio_q8 int4_convrot_compare_group_scales=
        convrot_policy:str int4_convrot_awq_calibration int4_convrot_awq_scales:str
        int4_convrot_awq_alpha=0.25 int4_convrot_activation_calibration_report:str
        int4_convrot_activation_calibration_batches=1 int4_convrot_activation_calibration_regex:str
        int4_convrot_activation_calibration_max_rows=128 int4_convrot_activation_calibration_max_layers=0
        int4_convrot_activation_calibration_only int8_fused_quant fp8_gemm fp8_gemm_targets=video
        fp8_gemm_grad_dtype=e4m3 fp8_gemm_min_numel=16384 fp8_gemm_compile?=True fp8_gemm_scaling=tensor
        int8_weights int8_weights_targets=video int8_weights_min_numel=16384 int8_weights_group_size=0
        int8_weights_outlier_quantile=1.0 int8_weights_sparse_ratio=0.0 int8_weights_convrot=
        int8_weights_w8a8 int8_weights_prequant:str nf4_block_size=32 quantize_device:str
        loftq_init loftq_iters=2 awq_calibration awq_alpha=0.25 awq_num_batches=8
    """,
    FILES_SO: "save_checkpoint_metadata ltx2_low_ram_load",
    SAMPLES_SO: """
        precache_sample_prompts use_precached_sample_prompts sample_prompts_cache:str
        use_precached_sample_latents sample_latents_cache:str use_precached_preservation
        preservation_prompts_cache:str
    """,
    AUDIO_SO: "separate_audio_buckets:switch preserve_audio_timing:switch sample_merge_audio",
    WORK_SO: """
        dataloader_pin_memory dataloader_prefetch_factor:int ddp_find_unused_parameters
        offload_optimizer_during_validation gemma_fp8_weight_offload? sample_with_offloading
        sample_audio_subprocess?=True
    """,
}
GENERATION: Table = {
    ATTENTION: """
        ltx2_causal_temporal_attention ltx2_soft_av_alignment ltx2_soft_av_alignment_sigma=1.0
        av_cross_attention_mode=both
    """,
    BITS: "gemma_load_in_4bit gemma_bnb_4bit_quant_type=nf4 gemma_bnb_4bit_disable_double_quant",
    PRESET: """
        sampling_preset,sample_sampling_preset=defaults
        use_default_negative_prompt,sample_use_default_negative_prompt? sample_sigma_schedule=auto
        sample_sampler=auto av_bimodal_cfg? av_bimodal_scale:float sample_disable_flash_attn
    """,
    APART: "sample_include_reference",
    DURATION: "ltx2_duration_head,duration-head-path:str",
    SPEED: """
        cudnn_attn split_attn_target*:str split_attn_mode:str
        split_attn_chunk_size=0 ffn_chunk_target*:str ffn_chunk_size=0
    """,
    TILES: _TILES,
    WEIGHTS: """
        fp8_keep_blocks:str fp8_w8a8 w8a8_mode=int8 fp8_upcast fp8_upcast_stochastic
        fp8_upcast_seed=0 nf4_block_size=64 int4_convrot_base int4_convrot_dynamic
        int4_convrot_groupsize=auto int4_convrot_no_mse_clip int4_convrot_scale_refine_steps=0
        int4_convrot_group_scales=0 int4_convrot_group_ratio_q8 quantize_device:str loftq_init loftq_iters=2
        awq_calibration awq_alpha=0.25 awq_num_batches=8 network_dim=0
    """,
    KERNELS_SO: "sdpa",
    SAMPLES_SO: """
        use_precached_sample_prompts,precache_sample_prompts sample_prompts_cache:str
        use_precached_sample_latents sample_latents_cache:str
    """,
    AUDIO_SO: "sample_merge_audio",
    WORK_SO: "gemma_fp8_weight_offload? sample_with_offloading sample_audio_subprocess?=True",
}


def declare_all(record: R, table: Table) -> R:
    """Add a table's options to a record and return it."""
    for reason, words in table.items():
        make: Callable[..., Rejection] = not_needed if reason.endswith(".") else unsupported
        for word in words.split():
            names, settings = _read_word(word)
            name, *aliases = names
            flags = tuple(f"--{alias}" for alias in aliases)
            setattr(record, name, make(reason, **settings, flags=flags))
    return record


def _read_word(word: str) -> tuple[list[str], dict[str, Any]]:
    """Parse a compact option declaration into its names and its settings for `add_argument`."""
    # A word is `name,alias:type=default`, in which only the name is required. `?` after the names means
    # --name and --no-name (which is accepted), `*` and `+` mean several values. An option without type and
    # default is a switch, which is False if it is not given; declared as `:switch`, it is None.
    word, has_default, default_text = word.partition("=")
    word, _, type_name = word.partition(":")
    suffix = word[-1] if word[-1] in "?*+" else ""
    names = word.removesuffix(suffix).split(",")
    if suffix == "?":
        default = {"": None, "True": True, "False": False}[default_text]
        action = argparse.BooleanOptionalAction
        return names, {"action": action, "default": default, "values": (False,)}
    if type_name == "switch":
        return names, {"action": "store_true", "default": None}
    if not has_default and not type_name:
        return names, {"action": "store_true", "default": False}
    default = _read_default(default_text) if has_default else None
    settings = {
        "type": TYPES[type_name] if type_name else type(default),
        "default": default,
        "metavar": "VALUE",
    }
    if suffix:
        settings["nargs"] = suffix
    return names, settings


def _read_default(text: str) -> Any:
    """Convert a text that is a number to that number; return other texts unchanged."""
    if not text[:1].isdigit() and text[:1] != "-":
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
