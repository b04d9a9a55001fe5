"""Values of options for `tests.sweeping`, where none follows from their declaration.

By the option's name, or the script's and the option's. `also`: what stands in the command without it too.
"""

import sys

from tests.sweeping import SIGN, Setting

PROMPTS = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3")
VALIDATION = ("--validation_split", "0.5", "--validate_every_n_steps", "1")
CHECKPOINTING = ("--gradient_checkpointing",)
EPOCHS = ("--max_train_epochs", "2", "--save_every_n_epochs", "1")
TEACHER = ("--teacher", "base")
TEACHER_LORA = ("--teacher", "dit", "--teacher_lora", "given/x.safetensors")
HUBER = ("--loss_type", "huber")
LOGS = ("--logging_dir", "logs")
LORA = "given/x.safetensors"
GIVEN_LORA = ("--lora_weight", LORA)
EAGER = ("--compile", "--compile_backend", "eager")
NAG = ("--nag_scale", "5")
SLG = ("--slg_mode", "original", "--slg_layers", "1")
MAG = ("--magcache_mag_ratios", "1.0", "1.0", "1.0", "--magcache_retention_ratio", "0")
TEA = ("--teacache_threshold", "10")
VELOCITY = ("--v_parameterization",)
TEXTS = ("--sample_prompts", "prompts.txt", "--sample_at_first")
NETWORK = ("--network_module", "networks.lora", "--network_weights", LORA)
HIGHRES = ("--highres_fix_scale", "0.5", "--W", "64", "--H", "64")
SHRUNK = ("--ds_depth_1", "1", "--W", "64", "--H", "64")
GRADUAL = ("--gradual_latent_timesteps", "900", "--W", "128", "--H", "128", "--steps", "6")
GRADUAL += ("--sampler", "euler_a")
H3_GUIDED = ("--h3_guidance_loss_scale", "3")
H3_FOCUSED = ("--h3_timestep_focus_prob", "0.5", "--h3_timestep_focus_min", "0.1")
H3_FOCUSED += ("--h3_timestep_focus_max", "0.9")
H3_MATCHED = ("--h3_teacher_matching",)
H3_REFERENCE = ("--dit", "model/minimax_h3_ref2va_bf16.safetensors", "--reference_image", "start.png")
H3_REFERENCE += ("--reference_image_short_edge", "32")
H3_VIDEO = (*H3_REFERENCE[:2], "--reference_video", "clips/clip 0.mkv", "--reference_video_short_edge", "32")
UNSIZED = ("--sample_prompts", "unsized.txt", "--sample_at_first", "--height", "32", "--width", "32")
UNSIZED += ("--sample_num_frames", "9")
SPATIOTEMPORAL = ("--stg_scale", "2")
SOUND = "ltx_2 with sound"
APG = ("--guidance_scale", "5")
BY_LINE = ("--from_file", "long.txt")
STRETCHED = ("--shifted_logit_mode", "stretched")
# given parts of clips: a table with times of audio
STATES = ("--save_state", "--save_every_n_steps", "1")
OFTEN = ("--max_train_steps", "8")  # so that clips with audio are among them
IN_TABLE = ("--dataset_config", "given.toml")
TIMES = (*OFTEN, *IN_TABLE, "--ltx2_audio_inpaint_mask", "--ltx2_audio_inpaint_mask_p", "1")
ENDS = ("--ltx2_extend_prefix_frames", "1", "--ltx2_extend_suffix_frames", "0")
AUDIO_ENDS = (*OFTEN, "--ltx2_audio_extend_prefix_frames", "1", "--ltx2_audio_extend_suffix_frames", "1")
ANCHORS = ("--video_anchor_training", "--video_anchor_strategy", "random", "--video_anchor_probability", "1")
KEYFRAMES = ("--keyframe_endpoint_training",)
INTERIOR = ("--keyframe_random_interior_p", "1", "--keyframe_max_random_interior", "1")

SETTINGS: dict[str, Setting] = {
    # caching
    "num_shards": Setting(("2", "--shard_index", "0")),
    "shard_index": Setting(("1",), also=("--num_shards", "2", "--shard_index", "0")),
    "repair_captions": Setting(("cp1252",), also=("--check",)),
    "html": Setting(("page.html",), also=("--check",)),
    "html_items": Setting(("1",), also=("--check", "--html", "page.html")),
    "console_width": Setting(("40",), also=("--debug_mode", "console")),
    "console_back": Setting(("red",), also=("--debug_mode", "console")),
    "console_num_images": Setting(("1",), also=("--debug_mode", "console")),
    "vae_dtype": Setting(("bfloat16",)),
    "vae_spatial_tile_sample_min_size": Setting(("32",)),
    "flf2v": Setting((), also=("--clip", "model/clip.safetensors")),
    "text_encoder_dtype": Setting(("bfloat16",)),
    "device": Setting(("cuda",)),
    # training
    "config_file": Setting(("options.toml",)),
    "ddp_timeout": Setting(("5",)),
    "network_module": Setting(("networks.loha",)),
    "network_args": Setting(("rank_dropout=0.5",)),
    "network_weights": Setting((LORA,)),
    "dim_from_weights": Setting(("--network_weights", LORA, "--network_dim", "2")),
    "base_weights": Setting((LORA,)),
    "base_weights_multiplier": Setting(("0.5",), also=("--base_weights", LORA)),
    "lora_rounding": Setting(("nearest",), also=("--base_weights", LORA)),
    "lora_format": Setting(("diffusers",)),
    "make_adapter": Setting(("own",)),
    "training_adapter": Setting((LORA,)),
    "training_adapter_multiplier": Setting(("0.5",), also=("--training_adapter", LORA)),
    "teacher_weight": Setting(also=TEACHER),
    "teacher_dit": Setting(("model/other.safetensors",), also=TEACHER_LORA),
    "teacher_lora": Setting((LORA, "--teacher", "dit")),
    "teacher_delta": Setting(also=TEACHER_LORA),
    "teacher_min_timestep": Setting(
        ("700",), also=(*TEACHER, "--teacher_max_timestep", "999", "--teacher_anchor_weight", "0")
    ),
    "teacher_max_timestep": Setting(
        ("300",), also=(*TEACHER, "--teacher_min_timestep", "1", "--teacher_anchor_weight", "0")
    ),
    "teacher_anchor_weight": Setting(("0.1",), also=(*TEACHER_LORA, "--teacher_min_timestep", "900")),
    "teacher_split": Setting(also=TEACHER),
    "teacher_size_weight": Setting(also=(*TEACHER, "--teacher_split")),
    "teacher_colour_weight": Setting(also=(*TEACHER, "--teacher_split")),
    "teacher_sees": Setting(also=TEACHER),
    "slider": Setting(("slider.toml",)),
    "gradient_checkpointing_cpu_offload": Setting(also=CHECKPOINTING),
    "gradient_checkpointing_keep": Setting(also=CHECKPOINTING),
    "validation_split": Setting(("0.5",)),
    "validate_every_n_steps": Setting(("2",), also=VALIDATION),
    "validate_every_n_epochs": Setting(("2",), also=("--validation_split", "0.5", *EPOCHS)),
    "max_validation_steps": Setting(("1",), also=VALIDATION),
    "validation_seed": Setting(also=VALIDATION),
    "optimizer_type": Setting(("SGD",)),
    "optimizer_args": Setting(("weight_decay=0.9",)),
    "lr_scheduler": Setting(("cosine",)),
    "lr_scheduler_type": Setting(("CosineAnnealingLR", "--lr_scheduler_args", "T_max=3")),
    "lr_scheduler_args": Setting(
        ("T_max=2",), also=("--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=9")
    ),
    "lr_warmup_steps": Setting(("2",), also=("--lr_scheduler", "constant_with_warmup")),
    "lr_decay_steps": Setting(("2",), also=("--lr_scheduler", "warmup_stable_decay")),
    "lr_scheduler_num_cycles": Setting(("2",), also=("--lr_scheduler", "cosine_with_restarts")),
    "lr_scheduler_power": Setting(("3",), also=("--lr_scheduler", "polynomial")),
    "lr_scheduler_timescale": Setting(
        ("2",), also=("--lr_scheduler", "inverse_sqrt", "--lr_warmup_steps", "1")
    ),
    "lr_scheduler_min_lr_ratio": Setting(
        ("0.5",), also=("--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.1")
    ),
    "max_grad_norm": Setting(("0.001",), also=("--optimizer_type", "SGD")),
    "discrete_flow_shift": Setting(("5",), also=("--timestep_sampling", "shift")),
    "timestep_sampling": Setting(("uniform",)),
    "sigmoid_scale": Setting(also=("--timestep_sampling", "sigmoid")),
    "weighting_scheme": Setting(("logit_normal",)),
    "logit_mean": Setting(also=("--weighting_scheme", "logit_normal")),
    "logit_std": Setting(also=("--weighting_scheme", "logit_normal")),
    "mode_scale": Setting(("0.5",), also=("--weighting_scheme", "mode")),
    "min_timestep": Setting(("500",)),
    "max_timestep": Setting(("500",)),
    "preserve_distribution_shape": Setting(also=("--min_timestep", "800", "--timestep_sampling", "sigmoid")),
    "timestep_focus_range": Setting(("10", "20"), also=("--timestep_focus", "0.9")),
    "ip_noise_gamma_random_strength": Setting(also=("--ip_noise_gamma", "0.5")),
    "huber_schedule": Setting(also=HUBER),
    "huber_c": Setting(also=HUBER),
    "huber_scale": Setting(also=(*HUBER, "--huber_schedule", "constant")),
    "guided_target_min_timestep": Setting(("900",), also=("--guided_target", "3")),
    "tread_blocks": Setting(("1", "1"), also=("--tread", "0.5", "--tread_blocks", "1", "-2")),
    "tread": Setting(("0.5", "--tread_blocks", "1", "-2")),
    "mixed_precision": Setting(("bf16",)),
    "output_name": Setting(("other",)),
    "overwrite": Setting(also=("--output_dir", "given")),
    "save_precision": Setting(("fp16",)),
    "save_every_n_steps": Setting(("1",)),
    "save_every_n_epochs": Setting(("1",), also=("--max_train_epochs", "2")),
    "save_n_epoch_ratio": Setting(("2",), also=("--max_train_epochs", "2")),
    "save_every_n_minutes": Setting(("0.00001",)),
    "save_last_n_epochs": Setting(("1",), also=(*EPOCHS, "--max_train_epochs", "3")),
    "save_last_n_epochs_state": Setting(("1",), also=(*EPOCHS, "--max_train_epochs", "3", "--save_state")),
    "save_last_n_steps": Setting(("1",), also=("--save_every_n_steps", "1")),
    "save_last_n_steps_state": Setting(("1",), also=("--save_every_n_steps", "1", "--save_state")),
    "resume": Setting(("given/x-state",)),
    "resume_changed": Setting(also=("--resume", "given/x-state")),
    "sample_prompts": Setting(("prompts.txt", "--sample_at_first")),
    "sample_every_n_steps": Setting(("1",), also=PROMPTS),
    "sample_every_n_epochs": Setting(
        ("1",), also=("--sample_prompts", "prompts.txt", "--max_train_epochs", "1")
    ),
    "sample_at_first": Setting(also=PROMPTS),
    "sample_strengths": Setting(("0.5", "1"), also=PROMPTS),
    "sample_trigger_word": Setting(also=PROMPTS, shows="no table of the dataset has a trigger_word"),
    "sample_lora": Setting((LORA,), also=PROMPTS),
    "save_workflow": Setting(also=PROMPTS),
    "preview_latent_every": Setting(("1",), also=PROMPTS),
    "sample_ema": Setting(also=(*PROMPTS, "--ema_decay", "0.5")),
    "ema_update_every": Setting(("2",), also=("--ema_decay", "0.5")),
    "log_prefix": Setting(also=LOGS),
    "log_tracker_name": Setting(also=LOGS),
    "log_config": Setting(also=LOGS),
    "log_with": Setting(("tensorboard", "--logging_dir", "logs")),
    "on_end": Setting((f"{sys.executable} end.py",)),
    "score_samples": Setting(("scorer",), also=PROMPTS, shows="samples are no longer scored"),
    "score_likeness_model": Setting(
        ("scorer",), also=(*PROMPTS, "--score_samples", "scorer"), shows="likeness by scorer"
    ),
    "score_tagger": Setting(
        ("scorer",), also=(*PROMPTS, "--score_samples", "scorer"), shows="tags by scorer"
    ),
    "score_device": Setting(
        ("meta",), also=(*PROMPTS, "--score_samples", "scorer"), shows="nothing here computes on meta"
    ),
    "metadata_reso": Setting(("832,480",)),
    "sdpa": Setting(),
    "fp8_scaled": Setting(also=("--fp8_base",)),
    "fp8_fast": Setting(also=("--fp8_base", "--fp8_scaled")),
    "generation.upcast_quantization": Setting(also=("--fp8_scaled",)),
    "generation.fp8_scaled": Setting(),
    "generation.fp8_fast": Setting(also=("--fp8_scaled",)),
    "generation.lora_rounding": Setting(("nearest",), also=GIVEN_LORA),
    "upcast_quantization": Setting(also=("--fp8_base", "--fp8_scaled", "--dit_dtype", "bfloat16")),
    "convrot_int8_bwd": Setting(also=("--convrot_int8", "--optimizer_type", "SGD")),
    "blocks_to_swap": Setting(("1",)),
    "compile": Setting(("--compile_backend", "eager")),
    "compile_args": Setting(("eager", "default", "false", "False"), also=EAGER[:1]),
    "compile_backend": Setting(("eager",), also=EAGER),
    "compile_mode": Setting(also=EAGER),
    "compile_dynamic": Setting(also=EAGER),
    "compile_fullgraph": Setting(also=EAGER),
    "compile_cache_size_limit": Setting(also=EAGER),
    "dynamo_mode": Setting(also=("--dynamo_backend", "eager")),
    "dynamo_fullgraph": Setting(also=("--dynamo_backend", "eager")),
    "dynamo_dynamic": Setting(also=("--dynamo_backend", "eager")),
    "plan": Setting(("24",)),
    "dit_dtype": Setting(("bfloat16",)),
    "rope_func": Setting(also=()),
    "huggingface_repo_id": Setting(("owner/name",), shows="not uploaded to owner/name"),
    # generation
    "video_size": Setting(("48", "32")),
    "video_length": Setting(("9",)),
    "nag_prompt": Setting(also=NAG),
    "nag_scale": Setting(("5",)),
    "nag_tau": Setting(("0.5",), also=NAG),
    "nag_alpha": Setting(also=NAG),
    "cfg_schedule": Setting(("1",)),
    "video_path": Setting(("clips/clip 0.mp4",)),
    "i2i_path": Setting(("start.png",), also=("--video_length", "1")),
    "from_latent": Setting(("junk.bin",)),
    "v2v_denoise": Setting(("0.9",), also=("--video_path", "clips/clip 0.mp4")),
    "v2v_noise_mode": Setting(also=("--denoise_strength", "0.7", "--video_path", "clips/clip 0.mp4")),
    "v2v_pad_mode": Setting(also=("--video_path", "clips/clip 0.mp4", "--video_length", "17")),
    "v2v_extra_noise": Setting(also=("--video_path", "clips/clip 0.mp4")),
    "i2_extra_noise": Setting(also=("--i2i_path", "start.png", "--video_length", "1")),
    "prompt_wildcards": Setting(("colours",), also=("--prompt", "a __colour__ cat")),
    "prompt_alternatives": Setting(also=("--prompt", "a {red|blue} cat")),
    "prompt_weighting": Setting(also=("--prompt", "a (red:1.5) cat")),
    "cfg_skip_mode": Setting(("early",), also=("--cfg_apply_ratio", "0.5")),
    "cfg_apply_ratio": Setting(("0.3",), also=("--cfg_skip_mode", "early", "--cfg_apply_ratio", "0.9")),
    "slg_mode": Setting(("uncond",), also=(*SLG, "--slg_end", "1")),
    "slg_layers": Setting(("0",), also=(*SLG, "--slg_end", "1")),
    "slg_scale": Setting(also=(*SLG, "--slg_end", "1")),
    "slg_start": Setting(("1",), also=(*SLG, "--slg_end", "1")),
    "slg_end": Setting(("1",), also=SLG),
    "cfgzerostar_init_steps": Setting(("1",)),
    "cfgzerostar_multiplier": Setting(also=("--cfgzerostar_init_steps", "1")),
    "from_file": Setting(("lines.txt",)),
    "num_videos": Setting(("2",)),
    "lora_weight": Setting((LORA,)),
    "lora_multiplier": Setting(("0.5",), also=GIVEN_LORA),
    "include_patterns": Setting(("attn",), also=GIVEN_LORA),
    "exclude_patterns": Setting(("attn",), also=GIVEN_LORA),
    "lora_blocks": Setting(("0=0.5",), also=GIVEN_LORA),
    "save_merged_model": Setting(("merged.safetensors",), also=GIVEN_LORA),
    "upcast_linear": Setting(also=("--fp8_scaled",)),
    "magcache_mag_ratios": Setting(("1.0", "1.0", "1.0", "--magcache_retention_ratio", "0")),
    "magcache_retention_ratio": Setting(("1",), also=MAG),
    "magcache_threshold": Setting(("0",), also=MAG),
    "magcache_k": Setting(("0",), also=MAG),
    "teacache_threshold": Setting(("10", "--teacache_coefficients", "1", "0")),
    "teacache_coefficients": Setting(("1", "99"), also=(*TEA, "--teacache_coefficients", "1", "0")),
    "save_path": Setting(("elsewhere",)),
    "trim_tail_frames": Setting(("1",)),
    "sheet": Setting(("seed=1,2",)),
    "generation.preview_latent_every": Setting(("1",)),
    "generation.preview_vae": Setting(also=("--preview_latent_every", "1")),
    "magcache_calibration": Setting(shows="MagCache's ratios"),
    "teacache_calibration": Setting(also=("--infer_steps", "7"), shows="TeaCache's"),
    "riflex_index": Setting(("1",), also=("--rope_func", "comfy")),
    # of training, for samples alone
    **{
        f"training.{name}": Setting(value, also=PROMPTS)
        for name, value in {
            "vae_dtype": ("bfloat16",),
            "vae_spatial_tile_sample_min_size": ("32",),
            "text_encoder_dtype": ("bfloat16",),
            **dict.fromkeys(
                (
                    "vae_tiling",
                    "vae_cache_cpu",
                    "vae_chunk_size",
                    "bulk_decode",
                    "text_encoder_form",
                    "fp8_t5",
                ),
            ),
            **dict.fromkeys(
                ("fp8_llm", "fp8_vl", "fp8_text_encoder", "text_encoder_cpu", "gemma_load_in_8bit")
            ),
            "t5xxl_max_token_length": ("2",),
            "gemma2_max_token_length": ("2",),
            "system_prompt": ("word",),
            "apply_t5_attn_mask": None,
        }.items()
    },
    "train_data_dir": Setting(("empty", "--resolution", "32")),
    "fused_backward_pass": Setting(also=("--max_grad_norm", "0.001")),
    "use_8bit_adam": Setting(),
    # Stable Diffusion
    "noise_offset_random_strength": Setting(also=("--noise_offset", "0.5")),
    "adaptive_noise_scale": Setting(also=("--noise_offset", "0.5")),
    "multires_noise_iterations": Setting(("4",)),
    "multires_noise_discount": Setting(also=("--multires_noise_iterations", "4")),
    "scale_v_pred_loss_like_noise_pred": Setting(also=VELOCITY),
    "training.zero_terminal_snr": Setting(also=VELOCITY),
    "sample_sampler": Setting(("heun",), also=PROMPTS),
    "texts.max_token_length": Setting(("150",)),
    "training.max_token_length": Setting(("150",), also=TEXTS),
    "training.clip_skip": Setting(("2",), also=(*TEXTS, "--skip_cache_check")),
    "sample_solver": Setting(("heun",)),
    "max_embeddings_multiples": Setting(("2",), also=("--prompt", "a cat " * 60)),
    "image_path": Setting(("start.png",)),
    "gen_img.clip_skip": Setting(("1",)),
    "no_half_vae": Setting(also=("--bf16",)),
    "gen_img.mask_path": Setting(("mask.png",), also=("--image_path", "start.png")),
    "guide_image_path": Setting(("start.png",)),
    "gen_img.from_file": Setting(("lines.txt",)),
    "gen_img.max_embeddings_multiples": Setting(("2",), also=BY_LINE),
    "gen_img.strength": Setting(also=("--image_path", "start.png")),
    "images_per_prompt": Setting(("2",)),
    "n_iter": Setting(("2",)),
    "iter_same_seed": Setting(also=("--n_iter", "2", "--images_per_prompt", "2")),
    "shuffle_prompts": Setting(also=("--from_file", "many.txt")),
    "gen_img.batch_size": Setting(("2",), also=("--images_per_prompt", "2")),
    "use_original_file_name": Setting(also=("--image_path", "start.png")),
    "sampler": Setting(("heun",)),
    "pyramid_noise_prob": Setting(("1", "--pyramid_noise_discount_range", "0.5", "0.9")),
    "pyramid_noise_discount_range": Setting(
        ("0.1", "0.2"), also=("--pyramid_noise_prob", "1", "--pyramid_noise_discount_range", "0.5", "0.9")
    ),
    "noise_offset_prob": Setting(("1", "--noise_offset_range", "0.1", "0.2")),
    "noise_offset_range": Setting(
        ("0.5", "0.9"), also=("--noise_offset_prob", "1", "--noise_offset_range", "0.1", "0.2")
    ),
    "gen_img.network_module": Setting(NETWORK),
    "gen_img.network_weights": Setting(NETWORK),
    "gen_img.network_mul": Setting(("0.5",), also=NETWORK),
    "gen_img.network_args": Setting(("word=1",), also=NETWORK),
    "network_show_meta": Setting(also=NETWORK, shows="metadata of"),
    "clip_guidance_scale": Setting(("1", "--clip_guidance_model", "empty")),
    "network_merge": Setting(also=NETWORK),
    "network_merge_n_models": Setting(("1",), also=NETWORK),
    "network_pre_calc": Setting(also=NETWORK),
    "gen_img.lora_rounding": Setting(("nearest",), also=(*NETWORK, "--network_merge")),
    "highres_fix_scale": Setting(("0.5",), also=("--W", "64", "--H", "64")),
    "highres_fix_steps": Setting(("2",), also=HIGHRES),
    "highres_fix_strength": Setting(also=HIGHRES),
    "highres_fix_save_1st": Setting(also=HIGHRES),
    "highres_fix_latents_upscaling": Setting(also=HIGHRES),
    "ds_depth_1": Setting(("1",)),
    "ds_timesteps_1": Setting(("900",), also=SHRUNK),
    "ds_depth_2": Setting(("0",), also=SHRUNK),
    "ds_timesteps_2": Setting(("900",), also=(*SHRUNK, "--ds_depth_2", "0")),
    "ds_ratio": Setting(("0.25",), also=SHRUNK),
    "gradual_latent_timesteps": Setting(
        ("750",), also=("--W", "128", "--H", "128", "--sampler", "euler_a", "--steps", "6")
    ),
    "gradual_latent_ratio": Setting(("0.75",), also=GRADUAL),
    "gradual_latent_ratio_step": Setting(("0.5",), also=GRADUAL),
    "gradual_latent_every_n_steps": Setting(("1",), also=GRADUAL),
    "gradual_latent_s_noise": Setting(also=GRADUAL),
    "gradual_latent_unsharp_params": Setting(("3,0.5,0.5,1",), also=GRADUAL),
    "console_log_file": Setting(("log.txt",)),
    # MiniMax-H3
    "h3_guidance_loss_scale": Setting(("3",)),
    "h3_guidance_loss_scale_audio": Setting(("5",), also=H3_GUIDED),
    "h3_guidance_loss_sigma_min": Setting(("0.9",), also=H3_GUIDED),
    "h3_timestep_focus_prob": Setting(("0.5",)),
    "h3_qkv_layout": Setting(("interleaved",)),
    "h3_visual_cond_clean": Setting(("0.5",)),
    "text_encoder_quantization": Setting(("int8",)),
    "training.text_encoder_quantization": Setting(("int8",), also=PROMPTS),
    "h3_audio_cond_clean": Setting(("0.5",)),
    **dict.fromkeys(
        (
            "h3_teacher_conditions",
            "h3_teacher_condition_sigma_max",
            "h3_teacher_loss_dc_weight",
            "h3_teacher_loss_mag_weight",
            "h3_teacher_preservation_weight",
        ),
        Setting(also=H3_MATCHED),
    ),
    "h3_allow_experimental_sample_duration": Setting(also=PROMPTS),
    "texts.teacher_conditions": Setting(("ref",)),
    "hv_1_5_train_network.py.task": Setting(("t2v",), family="hunyuan_video_15 i2v"),
    "minimax_h3_cache_latents.py.task": Setting(("t2va",)),
    "minimax_h3_cache_text_encoder_outputs.py.task": Setting(("fl2va", "--teacher_conditions", "first,last")),
    "minimax_h3_generate_video.py.reference_image": Setting((*H3_REFERENCE[3:], *H3_REFERENCE[:2])),
    "minimax_h3_generate_video.py.reference_video": Setting((*H3_VIDEO[3:], *H3_REFERENCE[:2])),
    "minimax_h3_generate_video.py.reference_image_short_edge": Setting(("64",), also=H3_REFERENCE),
    "minimax_h3_generate_video.py.reference_video_short_edge": Setting(("64",), also=H3_VIDEO),
    "h3_timestep_focus_min": Setting(("0.4",), also=H3_FOCUSED),
    "h3_timestep_focus_max": Setting(("0.2",), also=H3_FOCUSED),
    "h3_shift_video": Setting(("5",)),
    "max_validation_items": Setting(("1",), also=VALIDATION),
    "h3_fp8_quantization_mode": Setting(also=("--fp8_base", "--fp8_scaled")),
    "ref": Setting((*H3_REFERENCE[3:], *H3_REFERENCE[:2])),
    "reference_image": Setting(("start.png",)),
    "keyframe": Setting(("0:start.png",)),
    "duration": Setting(("0.9",)),
    # LTX-2
    "ltx_mode": Setting(("av",)),
    "generation.stg_mode": Setting(("audio",)),
    "ltx2_first_frame_conditioning_p": Setting(("1",)),
    "rest_learned": Setting(("0.5",)),
    "items_every": Setting(("2",), also=("--rest_learned", "0.5")),
    "items_floor": Setting(("0.8",), also=("--rest_learned", "0.5")),
    "rollback_on_spike": Setting(("2",), also=STATES),
    "rollback_rate": Setting(("0.3",), also=(*STATES, "--rollback_on_spike", "2")),
    "rollback_times": Setting(("2",), also=(*STATES, "--rollback_on_spike", "2")),
    "early_stopping_patience": Setting(("1",), shows="needs a validation loss"),
    "ltx2_extend_prefix_frames": Setting(("1",)),
    "ltx2_extend_suffix_frames": Setting(("1",)),
    **dict.fromkeys(("ltx2_extend_p", "ltx2_extend_prefix_p"), Setting(("0",), also=ENDS)),
    "ltx2_extend_suffix_p": Setting(("0",), also=("--ltx2_extend_suffix_frames", "1")),
    "ltx2_spatial_crop_p": Setting(("1",), also=("--ltx2_spatial_crop",), shows="needs spatial_crop_region"),
    "ltx2_inpaint_mask_p": Setting(("1",), also=("--ltx2_inpaint_mask",), shows="needs masks"),
    "ltx2_audio_extend_prefix_frames": Setting(("1",), also=OFTEN, family=SOUND),
    "ltx2_audio_extend_suffix_frames": Setting(("1",), also=OFTEN, family=SOUND),
    **dict.fromkeys(
        ("ltx2_audio_extend_p", "ltx2_audio_extend_prefix_p", "ltx2_audio_extend_suffix_p"),
        Setting(("0",), also=AUDIO_ENDS, family=SOUND),
    ),
    "ltx2_audio_inpaint_mask": Setting(also=IN_TABLE, family=SOUND),
    "ltx2_audio_inpaint_mask_p": Setting(("1",), also=TIMES[:-2], family=SOUND),
    "ltx2_audio_inpaint_mask_invert": Setting(also=TIMES, family=SOUND),
    "ltx2_audio_inpaint_mask_threshold": Setting(("0.9",), also=TIMES, family=SOUND),
    "video_anchor_training": Setting(also=ANCHORS[1:]),
    "video_anchor_probability": Setting(("0",), also=ANCHORS),
    "video_anchor_strategy": Setting(("endpoints",), also=ANCHORS),
    "video_anchor_count": Setting(("2",), also=ANCHORS),
    "video_anchor_strength": Setting(("0.5",), also=(*ANCHORS, "--ltx2_graded_conditioning")),
    "ltx2_graded_conditioning": Setting(
        also=(*ANCHORS, "--video_anchor_strength", "0.5", "--ltx2_graded_conditioning")
    ),
    "keyframe_endpoint_training": Setting(),
    **dict.fromkeys(("keyframe_first_frame_p", "keyframe_last_frame_p"), Setting(("0",), also=KEYFRAMES)),
    "keyframe_random_interior_p": Setting(("0.01",), also=(*KEYFRAMES, *INTERIOR)),
    "keyframe_max_random_interior": Setting(("2",), also=(*KEYFRAMES, *INTERIOR)),
    "ltx2_conditioning_config": Setting(("recipe.toml",)),
    "extend_prefix": Setting(("start.png",)),
    "extend_prefix_frames": Setting(
        ("1",), also=("--extend_prefix", "clips/clip 0.mp4", "--video_length", "17")
    ),
    "extend_suffix": Setting(("clips/clip 0.mp4",), also=("--video_length", "17")),
    "extend_suffix_frames": Setting(
        ("99",), also=("--extend_suffix", "clips/clip 0.mp4", "--video_length", "33")
    ),
    "ltx2_generate_video.py.keyframe": Setting(("0:start.png",)),
    "latent_frame": Setting(("0:start.png:0.5",)),
    "outpaint_source": Setting(("clips/clip 0.mp4", "--outpaint_region", "0,0,32,32")),
    "outpaint_region": Setting(("0,0,32,32", "--outpaint_source", "clips/clip 0.mp4")),
    "inpaint_source": Setting(("clips/clip 0.mp4", "--retake", "0,0.02")),
    "inpaint_mask": Setting(("mask.png", "--inpaint_source", "clips/clip 0.mp4")),
    "paste_source": Setting(("4", "--inpaint_source", "clips/clip 0.mp4", "--inpaint_mask", "mask.png")),
    "retake": Setting(("0,0.02", "--inpaint_source", "clips/clip 0.mp4")),
    "drive_audio": Setting(("clips/clip 0.mp4",), family=SOUND),
    "audio_prefix": Setting(("clips/clip 0.mp4", "--audio_prefix_seconds", "0.2"), family=SOUND),
    "audio_prefix_seconds": Setting(("0.1", "--audio_prefix", "clips/clip 0.mp4"), family=SOUND),
    "audio_inpaint_audio": Setting(("clips/clip 0.mp4", "--audio_inpaint_interval", "0.1,0.2"), family=SOUND),
    "audio_inpaint_interval": Setting(("0.1,0.2", "--audio_inpaint_audio", "clips/clip 0.mp4"), family=SOUND),
    "ltx_version_check_mode": Setting(("error",), also=("--ltx_version", "2.0")),
    "ltx2_checkpoint": Setting(family=SOUND),
    "ltx2_train_network.py.video_loss_weight": Setting(("5",), family=SOUND),
    "ltx2_train_network.py.audio_loss_weight": Setting(("5",), family=SOUND),
    "ic_lora_ref_probability": Setting(("0",)),
    "sample_audio_only": Setting(),
    "ltx2_generate_video.py.sample_disable_audio": Setting(family=SOUND),
    "ltx2_generate_video.py.reference_image": Setting(("mask.png",)),
    "generation.discrete_flow_shift": Setting(("7",)),
    "shifted_logit_eps": Setting(("0.4",), also=STRETCHED),
    "shifted_logit_uniform_prob": Setting(("0.9",), also=STRETCHED),
    "shifted_logit_shift": Setting(("3",)),
    "lora_target_preset": Setting(("full",)),
    **{
        f"training.{name}": Setting(value, also=PROMPTS)
        for name, value in {
            **dict.fromkeys(("video_cfg_scale", "audio_cfg_scale", "stg_scale"), ("4",)),
            **dict.fromkeys(("video_modality_scale", "audio_modality_scale"), ("2",)),
            **dict.fromkeys(("rescale_scale", "video_rescale_scale", "audio_rescale_scale"), ("0.9",)),
            "stg_blocks": ("1",),
            "gemma_root": ("empty",),
            "gemma_safetensors": ("junk.bin",),
            "ltx2_text_encoder_checkpoint": ("junk.bin",),
        }.items()
    },
    "training.sample_disable_audio": Setting(also=PROMPTS, family=SOUND),
    "training.stg_mode": Setting(("audio",), also=(*PROMPTS, *SPATIOTEMPORAL)),
    "training.height": Setting(("64",), also=UNSIZED),
    "training.width": Setting(("64",), also=UNSIZED),
    "training.sample_num_frames": Setting(("17",), also=UNSIZED),
    **dict.fromkeys(("reference_image", "reference_video"), Setting(("start.png",))),
    "drive_video": Setting(("clips/clip 0.mp4",)),
    "frame_count": Setting(("17",)),
    # other families
    "hv_generate_video.py.v2v_pad_mode": Setting(
        ("end", "--video_length", "17"), also=("--video_path", "clips/clip 0.mp4")
    ),
    "hv_generate_video.py.riflex_index": Setting(("1",)),
    "hv_1_5_generate_video.py.riflex_index": Setting(("1",)),
    "hidream_o1_train_network.py.model_type": Setting(("dev",)),
    **{
        f"{script}.task": Setting(("t2i",), family="hidream_o1 edit")
        for script in (
            *("hidream_o1_cache_latents.py", "hidream_o1_cache_text_encoder_outputs.py"),
            "hidream_o1_generate_image.py",
        )
    },
    **dict.fromkeys(
        ("hidream_o1_train_network.py.task", "hidream_o1_train.py.task"),
        Setting(("i2i",), family="hidream_o1"),
    ),
    "hidream_o1_generate_image.py.editing_scheduler": Setting(
        ("flash",), also=("--model_type", "dev"), family="hidream_o1 edit"
    ),
    "hidream_o1_generate_image.py.layout_bboxes": Setting(
        ("[[0.1, 0.5, 0.1, 0.9]]",), family="hidream_o1 edit"
    ),
    "hidream_o1_generate_image.py.keep_original_aspect": Setting(family="hidream_o1 edit"),
    "kandinsky_generate_video.py.riflex_index": Setting(("1",)),
    "hv_generate_video.py.scheduler": Setting(("dpm++",)),
    "exclude_single_blocks": Setting(also=GIVEN_LORA),
    "te_multiplier": Setting(("2", "1")),
    "training.latent_window_size": Setting(also=PROMPTS),
    "fpack_generate_video.py.image_path": Setting(("mask.png",)),
    "training.no_resize_control": Setting(also=PROMPTS),
    "texts.model_version": Setting(("dev",)),
    "hunyuan_image_train_network.py.attn_mode": Setting(("xformers",)),
    "hunyuan_image_generate_image.py.video_size": Setting(("64", "64")),
    "qwen_image_21_generate_image.py.video_size": Setting(("64", "64")),
    "apg_start_step_general": Setting(("0",), also=APG),
    "apg_start_step_ocr": Setting(("0",), also=(*APG, "--prompt", 'a sign "hi"')),
    "guidance_rescale_apg": Setting(("1",), also=(*APG, "--apg_start_step_general", "0")),
    "cfg_trunc_ratio": Setting(("0.1",)),
    **{
        f"{script}.{name}": Setting(family=family)
        for script, family, names in (
            ("qwen_image_cache_latents.py", "qwen_image edit-2511", ("model_version",)),
            ("qwen_image_train_network.py", "qwen_image edit-2511", ("model_version", "edit", "edit_plus")),
            ("qwen_image_generate_image.py", "qwen_image edit-2511", ("model_version", "edit", "edit_plus")),
            (
                "qwen_image_cache_text_encoder_outputs.py",
                "qwen_image edit-2511",
                ("model_version", "edit", "edit_plus"),
            ),
            (
                "qwen_image_generate_image.py",
                "qwen_image layered",
                ("output_layers", "remove_first_image_from_target"),
            ),
            ("qwen_image_train_network.py", "qwen_image layered", ("remove_first_image_from_target",)),
            ("qwen_image_train.py", "qwen_image layered", ("remove_first_image_from_target",)),
            ("qwen_image_generate_image.py", "qwen_image layered", ("cfg_norm",)),
            ("krea2_cache_latents.py", "krea2 edit", ("match_target_res",)),
            ("krea2_train_network.py", "krea2 edit", ("edit", "kv_cache", "match_target_res")),
            ("krea2_generate_image.py", "krea2 edit", ("kv_cache", "match_target_res")),
            ("moss_image_train_network.py", "moss_image edit", ("joint_references",)),
            ("moss_image_generate_image.py", "moss_image edit", ("joint_references",)),
            (
                "qwen_image_21_generate_image.py",
                "qwen_image_21 edit",
                ("resize_control_to_image_size", "resize_control_to_official_size"),
            ),
        )
        for name in names
    },
    "fibo_2_generate_image.py.mask_path": Setting(
        ("mask.png",), also=("--control_image_path", "mask.png"), family="fibo_2 edit"
    ),
    **{
        f"ideogram4_train_network.py.{name}": Setting(
            words, also=("--sample_prompts", "plain.txt", "--sample_at_first")
        )
        for name, words in (
            ("unconditional_lora", (LORA,)),
            ("sampler_preset", ("V4_TURBO_12",)),
            ("initial_sigma", ("1.004",)),
        )
    },
    "fibo_2_generate_image.py.no_text_images": Setting(also=("--prompt", SIGN)),
    "fibo_2_train_network.py.no_text_images": Setting(
        also=("--sample_prompts", "sign.txt", "--sample_at_first")
    ),
    "fibo_2_train_network.py.no_resize_control": Setting(
        also=("--sample_prompts", "larger.txt", "--sample_at_first"), family="fibo_2 edit"
    ),
    "distilled_dit": Setting(("model/other.safetensors",), also=PROMPTS),
    # the whole transformer
    "trainable_modules": Setting(("attn",)),
    "dit_variant": Setting(("turbo",), also=PROMPTS),
}
