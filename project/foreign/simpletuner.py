"""SimpleTuner's config.json, and its data backends."""

from typing import Any

from project.foreign import rules
from project.foreign.contract import DATA, WHOLE, KeyRule, Program, number, read_side, whole


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
    "model_family": rules.MODEL_NAME,
    "pretrained_model_name_or_path": rules.MODEL_NAME,
    "lora_type": rules.NETWORK_KIND,
    "lora_rank": rules.RANK,
    "lora_alpha": rules.ALPHA,
    "learning_rate": rules.LEARNING_RATE,
    "lr_scheduler": rules.SCHEDULER,
    "lr_warmup_steps": rules.WARMUP_STEPS,
    "optimizer": rules.OPTIMIZER,
    "max_train_steps": rules.STEPS,
    "num_train_epochs": rules.NUM_EPOCHS,
    "train_batch_size": rules.BATCH_SIZE,
    "gradient_accumulation_steps": rules.ACCUMULATED,
    "max_grad_norm": rules.GRADIENT_LIMIT,
    "resolution": KeyRule(DATA, "resolution", _read_size),
    "seed": rules.SEED,
    "checkpointing_steps": rules.SAVE_STEPS,
    "checkpoint_step_interval": rules.SAVE_STEPS,
    "tracker_run_name": rules.OUTPUT_NAME,
    "output_dir": rules.OUTPUT_FOLDER,
    "validation_prompt": rules.SAMPLES,
    "mixed_precision": rules.OF_CARD,
    "gradient_checkpointing": rules.OF_CARD,
    "base_model_precision": rules.OF_CARD,
}

PROGRAM = Program(
    title="SimpleTuner",
    suffixes=(".json",),
    alpha=None,
    marks=("model_family", "data_backend_config"),
    companions=("data_backend_config",),
    rules={
        **_RULES,
        "data_backend_config:[].instance_data_dir": rules.MEDIA_FOLDER,
        "data_backend_config:[].repeats": KeyRule(DATA, "num_repeats", _read_repeats),
        "data_backend_config:[].caption_strategy": rules.CAPTIONS,
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
