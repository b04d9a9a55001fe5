"""OneTrainer's JSON, and its list of concepts."""

from typing import Any

from project.foreign.contract import (
    CACHES,
    CARD,
    DATA,
    EPOCHS,
    FOLDER,
    KIND,
    MODEL,
    NEW,
    TRAINING,
    WHOLE,
    KeyRule,
    Program,
    left,
    number,
    read_folder,
    read_name,
    read_optimizer,
    read_scheduler,
    read_side,
    whole,
)


def _read_method(value: Any) -> bool:
    if value not in {"LORA", "FINE_TUNE"}:
        raise ValueError("a LoRA or a whole model is trained")
    return bool(value == "FINE_TUNE")


_OF_CONCEPTS = {
    "path": KeyRule(FOLDER, "", read_folder),
    "repeats": KeyRule(DATA, "num_repeats", whole(1, 100_000)),
    "balancing": left("what it means is in balancing_strategy: num_repeats in dataset.toml"),
    "text.prompt_source": left("`new` finds captions itself"),
}

PROGRAM = Program(
    title="OneTrainer",
    suffixes=(".json",),
    alpha=1,
    marks=("training_method",),
    companions=("concept_file_name",),
    rules={
        "training_method": KeyRule(WHOLE, "", _read_method),
        "model_type": KeyRule(MODEL),
        "base_model_name": KeyRule(MODEL),
        "peft_type": KeyRule(KIND),
        "lora_rank": KeyRule(TRAINING, "network_dim", whole(1, 4096)),
        "lora_alpha": KeyRule(TRAINING, "network_alpha", number(0, 4096)),
        "learning_rate": KeyRule(TRAINING, "learning_rate", number(0, 10)),
        "learning_rate_scheduler": KeyRule(TRAINING, "lr_scheduler", read_scheduler),
        "learning_rate_warmup_steps": KeyRule(TRAINING, "lr_warmup_steps", whole(0)),
        "optimizer.optimizer": KeyRule(TRAINING, "optimizer_type", read_optimizer),
        "epochs": KeyRule(EPOCHS, "", whole(1)),
        "batch_size": KeyRule(DATA, "batch_size", whole(1, 1024)),
        "gradient_accumulation_steps": KeyRule(TRAINING, "gradient_accumulation_steps", whole(1, 4096)),
        "clip_grad_norm": KeyRule(TRAINING, "max_grad_norm", number(0, 1e6)),
        "resolution": KeyRule(DATA, "resolution", read_side),
        "output_model_destination": KeyRule(NEW, "output_name", read_name),
        "masked_training": left(
            "`new` names masks that it finds, and mask_directory in dataset.toml takes them"
        ),
        "latent_caching": left(CACHES),
        "aspect_ratio_bucketing": left("files always keep their shape"),
        "train_dtype": left(CARD),
        "train_device": left(CARD),
        "temp_device": left(CARD),
        "gradient_checkpointing": left(CARD),
        "output_dtype": left(CARD),
        "workspace_dir": left("output_dir in run.toml says where files go"),
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
