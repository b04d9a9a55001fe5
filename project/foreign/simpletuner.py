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
    Program,
    Rule,
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
    "model_type": Rule(WHOLE, "", _read_type),
    "model_family": Rule(MODEL),
    "pretrained_model_name_or_path": Rule(MODEL),
    "lora_type": Rule(KIND),
    "lora_rank": Rule(TRAINING, "network_dim", whole(1, 4096)),
    "lora_alpha": Rule(TRAINING, "network_alpha", number(0, 4096)),
    "learning_rate": Rule(TRAINING, "learning_rate", number(0, 10)),
    "lr_scheduler": Rule(TRAINING, "lr_scheduler", read_scheduler),
    "lr_warmup_steps": Rule(TRAINING, "lr_warmup_steps", whole(0)),
    "optimizer": Rule(TRAINING, "optimizer_type", read_optimizer),
    "max_train_steps": Rule(NEW, "max_train_steps", whole(1)),
    "num_train_epochs": Rule(EPOCHS, "", whole(1)),
    "train_batch_size": Rule(DATA, "batch_size", whole(1, 1024)),
    "gradient_accumulation_steps": Rule(TRAINING, "gradient_accumulation_steps", whole(1, 4096)),
    "max_grad_norm": Rule(TRAINING, "max_grad_norm", number(0, 1e6)),
    "resolution": Rule(DATA, "resolution", _read_size),
    "seed": Rule(TRAINING, "seed", whole(0, 2**32 - 1)),
    "checkpointing_steps": Rule(TRAINING, "save_every_n_steps", whole(1)),
    "checkpoint_step_interval": Rule(TRAINING, "save_every_n_steps", whole(1)),
    "tracker_run_name": Rule(NEW, "output_name", read_name),
    "output_dir": left("output_dir in run.toml says where files go"),
    "validation_prompt": left(SAMPLES),
    "mixed_precision": left(CARD),
    "gradient_checkpointing": left(CARD),
    "base_model_precision": left(CARD),
}

PROGRAM = Program(
    title="SimpleTuner",
    suffixes=(".json",),
    marks=("model_family", "data_backend_config"),
    companions=("data_backend_config",),
    rules={
        **_RULES,
        "data_backend_config:[].instance_data_dir": Rule(FOLDER, "", read_folder),
        "data_backend_config:[].repeats": Rule(DATA, "num_repeats", _read_repeats),
        "data_backend_config:[].caption_strategy": left("`new` finds captions itself"),
        "data_backend_config:[].resolution": Rule(DATA, "resolution", _read_size),
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
