"""Words of other programs for settings, as people look for them in the table of all settings."""

from collections.abc import Mapping, Sequence

# word that is typed -> options of training scripts, or keys of dataset.toml, that it is about
WORDS: Mapping[str, Sequence[str]] = {
    "vram": (
        *("blocks_to_swap", "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_base"),
        *("fp8_scaled", "convrot_int8", "nf4_base", "fused_backward_pass", "optimizer_type"),
        *("batch_size", "resolution", "target_frames"),
    ),
    "memory": ("blocks_to_swap", "gradient_checkpointing", "fp8_base", "batch_size", "resolution"),
    "oom": ("blocks_to_swap", "gradient_checkpointing", "fp8_base", "batch_size", "resolution"),
    "gpu": ("blocks_to_swap", "mixed_precision", "fp8_base"),
    "offload": ("blocks_to_swap", "gradient_checkpointing_cpu_offload"),
    "quantize": ("fp8_base", "fp8_scaled", "convrot_int8", "nf4_base"),
    "batch": ("batch_size", "gradient_accumulation_steps"),
    "rank": ("network_dim", "network_alpha"),
    "dim": ("network_dim",),
    "alpha": ("network_alpha",),
    "lora type": ("network_module", "network_args"),
    "epochs": ("max_train_epochs", "max_train_steps", "save_every_n_epochs"),
    "steps": ("max_train_steps", "save_every_n_steps", "sample_every_n_steps"),
    "repeats": ("num_repeats",),
    "resolution": ("resolution", "enable_bucket"),
    "size": ("resolution",),
    "buckets": ("enable_bucket", "bucket_no_upscale", "resolution"),
    "frames": ("target_frames", "frame_extraction"),
    "caption": ("caption_extension", "caption_dropout_rate", "trigger_word"),
    "trigger": ("trigger_word",),
    "precision": ("mixed_precision", "fp8_base", "fp8_scaled", "save_precision"),
    "dtype": ("mixed_precision", "save_precision"),
    "lr": ("learning_rate", "lr_scheduler", "lr_warmup_steps"),
    "rate": ("learning_rate",),
    "schedule": ("lr_scheduler", "lr_warmup_steps"),
    "warmup": ("lr_warmup_steps",),
    "optimizer": ("optimizer_type", "optimizer_args"),
    "adam": ("optimizer_type",),
    "prodigy": ("optimizer_type",),
    "checkpoint": ("save_every_n_steps", "save_every_n_epochs", "save_state", "gradient_checkpointing"),
    "resume": ("resume", "save_state"),
    "preview": ("sample_prompts", "sample_every_n_steps", "sample_at_first"),
    "timestep": ("timestep_sampling", "discrete_flow_shift"),
    "shift": ("discrete_flow_shift",),
    "ema": ("ema_decay",),
    "wandb": ("log_with",),
    "tensorboard": ("log_with", "logging_dir"),
    "speed": ("compile", "sdpa", "flash_attn", "gradient_checkpointing"),
    "attention": ("sdpa", "flash_attn", "xformers"),
    "blocks": ("blocks_to_swap",),
    "clip grad": ("max_grad_norm",),
    "noise": ("noise_offset",),
}
# keys of dataset.toml in WORDS -> what each does
DATASET_KEYS: Mapping[str, str] = {
    "batch_size": "pictures or clips of one step",
    "resolution": "width and height that files are brought to",
    "num_repeats": "how often a file counts in an epoch",
    "enable_bucket": "files keep their own shapes, at the area of resolution",
    "bucket_no_upscale": "no file is enlarged",
    "target_frames": "lengths of the parts that are taken of clips",
    "frame_extraction": "which parts of a clip are taken",
    "caption_extension": "how the files of captions end",
    "trigger_word": "the made-up word for what is learned",
}


def list_words(name: str) -> str:
    """Return the words of other programs for an option or key, with blanks between."""
    return " ".join(word for word, names in WORDS.items() if name in names)
