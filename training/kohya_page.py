"""Explain keys in files of the kohya_ss GUI that no training script declares."""

from collections.abc import Mapping
from typing import Any

# advice for each key; {key} and {value} are replaced
_TO_NETWORK = 'it is not an option of the training; write network_args = ["{key}={value}"]'
_TO_LAUNCHER = "it is for accelerate launch: type it there"
_OTHER_FORM = "it is a choice of the page, which network_module and network_args stand for"
_ADVICE: Mapping[str, str] = {
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio"), _TO_NETWORK),
    **dict.fromkeys(("loraplus_text_encoder_lr_ratio", "conv_dim", "conv_alpha"), _TO_NETWORK),
    **dict.fromkeys(("rank_dropout", "module_dropout", "train_double_block_indices"), _TO_NETWORK),
    **dict.fromkeys(("train_single_block_indices", "train_blocks", "split_qkv", "train_t5xxl"), _TO_NETWORK),
    **dict.fromkeys(("gpu_ids", "multi_gpu", "num_processes", "num_machines"), _TO_LAUNCHER),
    **dict.fromkeys(("main_process_port", "num_cpu_threads_per_process", "dynamo_mode"), _TO_LAUNCHER),
    **dict.fromkeys(("dynamo_use_fullgraph", "dynamo_use_dynamic"), _TO_LAUNCHER),
    **dict.fromkeys(("extra_accelerate_launch_args",), _TO_LAUNCHER),
    **dict.fromkeys(("LoRA_type", "LyCORIS_preset"), _OTHER_FORM),
    "lowvram": "no training script has it; blocks_to_swap and gradient_checkpointing save GPU memory",
    "use_wandb": 'write log_with = "wandb"',
    "epoch": "write max_train_epochs = {value}",
    "max_resolution": 'write resolution = "{value}"',
    "optimizer": 'write optimizer_type = "{value}"',
    "stop_text_encoder_training": "text encoders learn to the end; text_encoder_lr says how fast",
    "stop_text_encoder_training_pct": "text encoders learn to the end; text_encoder_lr says how fast",
    "additional_parameters": "write each of these options as a key of its own",
    "model_list": "it is a choice of the page; pretrained_model_name_or_path names the file",
}


def is_kohya_gui_key(key: str) -> bool:
    """Return whether a key belongs to the kohya_ss GUI instead of a training script."""
    return key in _ADVICE


def explain_key(key: str, values: Mapping[str, Any]) -> str | None:
    """Return advice on a configuration key of the kohya_ss GUI; None if its value has no effect here."""
    value, arguments = values[key], values.get("network_args")
    is_declared = isinstance(arguments, list) and any(str(item).startswith(f"{key}=") for item in arguments)
    return None if not value or is_declared else _ADVICE[key].format(key=key, value=value)
