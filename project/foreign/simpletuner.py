"""SimpleTuner's config.json, and its data backends."""

from typing import Any

from project.foreign.contract import (
    CARD,
    DATA,
    EPOCHS,
    FOLDER,
    KIND,
    MODEL,
    NEW,
    SAMPLES,
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


def _read_type(value: Any) -> bool:
    if value not in {"lora", "full"}:
        raise ValueError("a LoRA or a whole model is trained")
    return bool(value == "full")


def _read_size(value: Any) -> tuple[int, int]:
    """Return a size of pixels; areas, of which 1.0 is a megapixel, are no such sizes."""
    if number()(value) <= 16:
        side = int((number()(value) * 1024 * 1024) ** 0.5)
        return read_side(side)
    return read_side(value)


def _read_repeats(value: Any) -> int:
    """Return how often a file is seen: SimpleTuner counts those after the first time."""
    return whole(0, 100_000)(value) + 1


_RULES = {
    "model_type": KeyRule(WHOLE, "", _read_type),
    "model_family": KeyRule(MODEL),
    "pretrained_model_name_or_path": KeyRule(MODEL),
    "lora_type": KeyRule(KIND),
    "lora_rank": KeyRule(TRAINING, "network_dim", whole(1, 4096)),
    "lora_alpha": KeyRule(TRAINING, "network_alpha", number(0, 4096)),
    "learning_rate": KeyRule(TRAINING, "learning_rate", number(0, 10)),
    "lr_scheduler": KeyRule(TRAINING, "lr_scheduler", read_scheduler),
    "lr_warmup_steps": KeyRule(TRAINING, "lr_warmup_steps", whole(0)),
    "optimizer": KeyRule(TRAINING, "optimizer_type", read_optimizer),
    "max_train_steps": KeyRule(NEW, "max_train_steps", whole(1)),
    "num_train_epochs": KeyRule(EPOCHS, "", whole(1)),
    "train_batch_size": KeyRule(DATA, "batch_size", whole(1, 1024)),
    "gradient_accumulation_steps": KeyRule(TRAINING, "gradient_accumulation_steps", whole(1, 4096)),
    "max_grad_norm": KeyRule(TRAINING, "max_grad_norm", number(0, 1e6)),
    "resolution": KeyRule(DATA, "resolution", _read_size),
    "seed": KeyRule(TRAINING, "seed", whole(0, 2**32 - 1)),
    "checkpointing_steps": KeyRule(TRAINING, "save_every_n_steps", whole(1)),
    "checkpoint_step_interval": KeyRule(TRAINING, "save_every_n_steps", whole(1)),
    "tracker_run_name": KeyRule(NEW, "output_name", read_name),
    "output_dir": left("output_dir in run.toml says where files go"),
    "validation_prompt": left(SAMPLES),
    "mixed_precision": left(CARD),
    "gradient_checkpointing": left(CARD),
    "base_model_precision": left(CARD),
}

PROGRAM = Program(
    title="SimpleTuner",
    suffixes=(".json",),
    alpha=None,
    marks=("model_family", "data_backend_config"),
    companions=("data_backend_config",),
    rules={
        **_RULES,
        "data_backend_config:[].instance_data_dir": KeyRule(FOLDER, "", read_folder),
        "data_backend_config:[].repeats": KeyRule(DATA, "num_repeats", _read_repeats),
        "data_backend_config:[].caption_strategy": left("`new` finds captions itself"),
        "data_backend_config:[].resolution": KeyRule(DATA, "resolution", _read_size),
    },
    models={
        "flux": ("flux", "dev"),
        "flux2": ("flux_2", None),
        "sdxl": ("stable_diffusion", "xl"),
        "sd1x": ("stable_diffusion", "1.5"),
        "sd2x": ("stable_diffusion", "2.1"),
        "chroma": ("chroma", "hd"),
        "lumina2": ("lumina", "2.0"),
        "wan": ("wan", None),
        "qwen_image": ("qwen_image", "original"),
        "z-image": ("z_image", "base"),
        "z-image-turbo": ("z_image", "turbo"),
        "hunyuanvideo": ("hunyuan_video", "t2v"),
        "ltxvideo2": ("ltx_2", None),
    },
)
