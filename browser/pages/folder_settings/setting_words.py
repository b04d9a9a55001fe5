"""Other programs' names for settings, as people search for them in the table of all settings."""

from collections.abc import Mapping, Sequence

from modules.pages.language import TranslatableText, say

# search term -> related options of training scripts, or keys of dataset.toml
WORDS: Mapping[TranslatableText, Sequence[str]] = {
    say("vram"): (
        *("blocks_to_swap", "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_base"),
        *("fp8_scaled", "convrot_int8", "nf4_base", "fused_backward_pass", "optimizer_type"),
        *("batch_size", "resolution", "target_frames"),
    ),
    say("memory"): ("blocks_to_swap", "gradient_checkpointing", "fp8_base", "batch_size", "resolution"),
    say("oom"): ("blocks_to_swap", "gradient_checkpointing", "fp8_base", "batch_size", "resolution"),
    say("gpu"): ("blocks_to_swap", "mixed_precision", "fp8_base"),
    say("offload"): ("blocks_to_swap", "gradient_checkpointing_cpu_offload"),
    say("quantize"): ("fp8_base", "fp8_scaled", "convrot_int8", "nf4_base"),
    say("batch"): ("batch_size", "gradient_accumulation_steps"),
    say("batch size"): ("batch_size",),
    say("rank"): ("network_dim", "network_alpha"),
    say("dim"): ("network_dim",),
    say("alpha"): ("network_alpha",),
    say("lora type"): ("network_module", "network_args"),
    say("epochs"): ("max_train_epochs", "max_train_steps", "save_every_n_epochs"),
    say("steps"): ("max_train_steps", "save_every_n_steps", "sample_every_n_steps"),
    say("repeats"): ("num_repeats",),
    say("resolution"): ("resolution", "enable_bucket"),
    say("size"): ("resolution",),
    say("buckets"): ("enable_bucket", "bucket_no_upscale", "resolution"),
    say("frames"): ("target_frames", "frame_extraction"),
    say("caption"): ("caption_extension", "caption_dropout_rate", "trigger_word"),
    say("trigger"): ("trigger_word",),
    say("precision"): ("mixed_precision", "fp8_base", "fp8_scaled", "save_precision"),
    say("dtype"): ("mixed_precision", "save_precision"),
    say("lr"): ("learning_rate", "lr_scheduler", "lr_warmup_steps"),
    say("rate"): ("learning_rate",),
    say("schedule"): ("lr_scheduler", "lr_warmup_steps"),
    say("warmup"): ("lr_warmup_steps",),
    say("optimizer"): ("optimizer_type", "optimizer_args"),
    say("adam"): ("optimizer_type",),
    say("prodigy"): ("optimizer_type",),
    say("checkpoint"): ("save_every_n_steps", "save_every_n_epochs", "save_state", "gradient_checkpointing"),
    say("resume"): ("resume", "save_state"),
    say("preview"): ("sample_prompts", "sample_every_n_steps", "sample_at_first"),
    say("timestep"): ("timestep_sampling", "discrete_flow_shift"),
    say("shift"): ("discrete_flow_shift",),
    say("ema"): ("ema_decay",),
    say("wandb"): ("log_with",),
    say("tensorboard"): ("log_with", "logging_dir"),
    say("speed"): ("compile", "sdpa", "flash_attn", "gradient_checkpointing"),
    say("attention"): ("sdpa", "flash_attn", "xformers"),
    say("blocks"): ("blocks_to_swap",),
    say("clip grad"): ("max_grad_norm",),
    say("noise"): ("noise_offset",),
    say("clip skip"): ("clip_skip",),
    say("overfit"): ("network_dropout", "caption_dropout_rate", "max_train_steps", "learning_rate"),
    say("dropout"): ("network_dropout", "caption_dropout_rate"),
    say("lora strength"): ("network_alpha", "network_dim"),
    say("train_batch_size"): ("batch_size",),
    say("accumulation"): ("gradient_accumulation_steps",),
    say("learning rate"): ("learning_rate", "lr_scheduler", "unet_lr", "text_encoder_lr"),
    say("network rank"): ("network_dim", "network_alpha"),
    say("lora rank"): ("network_dim", "network_alpha"),
    say("linear"): ("network_dim",),
    say("lora weight"): ("network_alpha", "network_dim"),
    say("lokr"): ("network_module", "network_args"),
    say("conv"): ("network_args", "network_module"),
    say("overtraining"): ("max_train_steps", "learning_rate", "network_dropout", "caption_dropout_rate"),
    say("regularization"): ("prior_loss_weight", "network_dropout"),
    say("weight decay"): ("optimizer_args",),
    say("min snr"): ("min_snr_gamma",),
    say("offset noise"): ("noise_offset",),
    say("sampling"): ("sample_every_n_steps", "timestep_sampling", "sample_prompts"),
    say("sampling method"): ("sample_every_n_steps", "timestep_sampling", "sample_prompts"),
    say("sample"): ("sample_every_n_steps", "sample_prompts", "sample_at_first"),
    say("prompt"): ("sample_prompts",),
    say("timestep distribution"): ("timestep_sampling",),
    say("validation"): ("validation_split", "validate_every_n_steps"),
    say("flip"): ("flip_aug",),
    say("augmentation"): ("flip_aug", "color_aug", "random_crop"),
    say("crop"): ("random_crop", "resolution"),
    say("aspect ratio"): ("enable_bucket", "resolution"),
    say("image size"): ("resolution",),
    say("checkpointing"): ("gradient_checkpointing",),
    say("backup"): ("save_state", "save_every_n_steps"),
    say("save"): ("save_every_n_steps", "save_every_n_epochs", "save_last_n_steps", "save_state"),
    say("iterations"): ("max_train_steps",),
    say("text encoder"): ("text_encoder_lr", "network_train_unet_only"),
    say("block lr"): ("network_args", "block_lr"),
    say("masked training"): ("masked_loss",),
    say("shuffle"): ("shuffle_caption",),
    say("keep tokens"): ("keep_tokens",),
    say("seed"): ("seed",),
    say("loss"): ("loss_type",),
    say("low vram"): ("blocks_to_swap", "gradient_checkpointing", "fp8_base", "fp8_scaled", "nf4_base"),
    say("layer offloading"): ("blocks_to_swap",),
    say("block swap"): ("blocks_to_swap",),
    say("workers"): ("max_data_loader_n_workers",),
    say("upload"): ("huggingface_repo_id",),
    say("scheduler"): ("lr_scheduler",),
    say("warm up"): ("lr_warmup_steps", "lr_scheduler"),
    say("sampler"): ("timestep_sampling", "sample_every_n_steps", "sample_prompts", "sample_sampler"),
}
# keys of dataset.toml in WORDS -> description
DATASET_KEYS: Mapping[str, TranslatableText] = {
    "batch_size": say("images or clips of one step"),
    "resolution": say("width and height that files are resized to"),
    "num_repeats": say("how often a file is repeated in an epoch"),
    "enable_bucket": say("files keep their aspect ratios, at the area of resolution"),
    "bucket_no_upscale": say("no file is enlarged"),
    "target_frames": say("lengths of the parts taken from clips"),
    "frame_extraction": say("which parts of a clip are used"),
    "caption_extension": say("extension of the caption files"),
    "trigger_word": say("the made-up word for the learned subject"),
}


def rank_words(name: str) -> dict[str, int]:
    """Return what other programs call an option or key, in English and the page's language, with ranks.

    One such name may stand for several options: rank 0 marks the option with the largest effect.
    """
    ranks: dict[str, int] = {}
    for word, names in WORDS.items():
        if name in names:
            rank = [*names].index(name)
            for shown in (word.english(), word.translated().lower()):
                ranks[shown] = min(rank, ranks.get(shown, rank))
    return ranks
