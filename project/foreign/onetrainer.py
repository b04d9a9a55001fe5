"""OneTrainer's JSON, and its list of concepts."""

from typing import Any

from project.foreign import rules
from project.foreign.contract import WHOLE, KeyRule, Program, left


def _read_method(value: Any) -> bool:
    if value not in {"LORA", "FINE_TUNE"}:
        raise ValueError("a LoRA or a whole model is trained")
    return bool(value == "FINE_TUNE")


_OF_CONCEPTS = {
    "path": rules.MEDIA_FOLDER,
    "repeats": rules.NUM_REPEATS,
    "balancing": left("what it means is in balancing_strategy: num_repeats in dataset.toml"),
    "text.prompt_source": rules.CAPTIONS,
}

PROGRAM = Program(
    title="OneTrainer",
    suffixes=(".json",),
    alpha=1,
    marks=("training_method",),
    companions=("concept_file_name",),
    rules={
        "training_method": KeyRule(WHOLE, "", _read_method),
        "model_type": rules.MODEL_NAME,
        "base_model_name": rules.MODEL_NAME,
        "peft_type": rules.NETWORK_KIND,
        "lora_rank": rules.RANK,
        "lora_alpha": rules.ALPHA,
        "learning_rate": rules.LEARNING_RATE,
        "learning_rate_scheduler": rules.SCHEDULER,
        "learning_rate_warmup_steps": rules.WARMUP_STEPS,
        "optimizer.optimizer": rules.OPTIMIZER,
        "epochs": rules.NUM_EPOCHS,
        "batch_size": rules.BATCH_SIZE,
        "gradient_accumulation_steps": rules.ACCUMULATED,
        "clip_grad_norm": rules.GRADIENT_LIMIT,
        "resolution": rules.RESOLUTION,
        "output_model_destination": rules.OUTPUT_NAME,
        "masked_training": left("`new` names the masks that it sees, for mask_directory in dataset.toml"),
        "latent_caching": rules.CACHES,
        "aspect_ratio_bucketing": rules.BUCKETS,
        "train_dtype": rules.OF_CARD,
        "train_device": rules.OF_CARD,
        "temp_device": rules.OF_CARD,
        "gradient_checkpointing": rules.OF_CARD,
        "output_dtype": rules.OF_CARD,
        "workspace_dir": rules.OUTPUT_FOLDER,
        "cache_dir": left("dataset.toml says where caches go"),
        **{f"concepts[].{key}": rule for key, rule in _OF_CONCEPTS.items()},
        **{f"concept_file_name:[].{key}": rule for key, rule in _OF_CONCEPTS.items()},
    },
    models={
        "STABLE_DIFFUSION_15": ("stable_diffusion", "1.5"),
        "STABLE_DIFFUSION_21": ("stable_diffusion", "2.1"),
        "STABLE_DIFFUSION_XL_10_BASE": ("stable_diffusion", "xl"),
        "FLUX_DEV_1": ("flux", "dev"),
        "FLUX_2": ("flux_2", None),
        "CHROMA_1": ("chroma", "hd"),
        "HUNYUAN_VIDEO": ("hunyuan_video", "t2v"),
        "QWEN": ("qwen_image", "original"),
        "Z_IMAGE": ("z_image", None),
    },
)
