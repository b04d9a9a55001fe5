"""SimpleTuner's config.json, and its data backends."""

import contextlib
from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    DATA,
    SIZES,
    TRAINING,
    ForeignRun,
    KeyRule,
    Program,
    TrainedNetworks,
    UnsupportedRun,
    integer,
    is_on,
    join_switch,
    name_distribution,
    number,
    omitted,
    read_one_size,
    read_rate,
)
from project.foreign.sample_prompts import ForeignSample, drop_missing, read_sample


def _join_switches(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with one key for an average and its decay, and one for the noise levels."""
    joined = join_switch(values, "use_ema", "ema_decay", default=_EMA_DECAY)
    shift = joined.get("flow_schedule_shift")
    if is_on(joined.get("flow_use_uniform_schedule")):
        joined[_FLOW_SCHEDULE] = name_distribution("uniform", shift)
    elif shift is not None and not is_on(joined.get("flow_schedule_auto_shift")):
        joined[_FLOW_SCHEDULE] = name_distribution("sigmoid", shift)
    return joined


def _read_samples(values: Mapping[str, Any]) -> list[ForeignSample]:
    """Return a sample for each size: sizes are separated by commas, and small numbers are megapixels."""
    key = _SAMPLE_KEYS["size"]
    samples = []
    for text in str(values.get(key) or "").split(","):
        size: Any = text
        with contextlib.suppress(ValueError):  # 1024x768, or no size at all
            ((width, height),) = _read_size(text)
            size = f"{width}x{height}"
        samples.append(read_sample({**values, key: size}, _SAMPLE_KEYS))
    return drop_missing(samples)


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    """Return the kind of run ("lora", "whole" or "controlnet") that a SimpleTuner config describes."""
    # The result also has the key that determines the kind, for messages.
    kind = str(values.get("model_type", "lora"))
    if is_on(values.get("controlnet")):
        return ForeignRun("controlnet", "controlnet = true")
    if is_on(values.get("control")):
        raise UnsupportedRun(
            "control = true: a LoRA that sees control images in additional channels; no script here trains "
            "such a LoRA"
        )
    if kind not in {"lora", "full"}:
        raise UnsupportedRun(f"model_type = {kind}: `new` does not set up this kind of training")
    return ForeignRun("whole" if kind == "full" else "lora", f"model_type = {kind}")


def _find_trained_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    keys = tuple(key for key in ("train_text_encoder", "text_encoder_lr") if key in values)
    learns = is_on(values.get("train_text_encoder"))
    return TrainedNetworks(
        keys, text_encoder_rates=(read_rate(values.get("text_encoder_lr")),) if learns else ()
    )


def _find_ineffective_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys without effect: a LyCORIS config file sets network type, rank and alpha instead."""
    keys = set() if "use_ema, ema_decay" in values else {"use_ema", "ema_decay"}
    if values.get("lora_type") == "lycoris" and "lycoris_config:algo" in values:
        keys |= {"lora_rank", "lora_alpha", "lora_type"}
    return keys


def _read_size(value: Any) -> tuple[tuple[int, int]]:
    """Return the size for one number: an area in megapixels up to 16, otherwise a side in pixels."""
    if number()(value) <= 16:
        side = int((number()(value) * 1024 * 1024) ** 0.5)
        return read_one_size(side)
    return read_one_size(integer(64, 8192)(value))


def _read_limit(value: Any) -> float:
    """Return the gradient norm limit from a text such as `1.0 norm`. Raises ValueError for other methods."""
    limit, _, method = str(value).partition(" ")
    if method != "norm":
        raise ValueError("each value of a gradient is clipped there, and the norm of all here")
    return rules.GRADIENT_LIMIT.read(limit)


def _read_repeats(value: Any) -> int:
    """Return how often a file is used in an epoch; SimpleTuner does not count the first use."""
    return integer(0, 100_000)(value) + 1


_EMA_DECAY = 0.995  # SimpleTuner's default
_FLOW_SCHEDULE = "flow schedule"  # the name that messages have for its keys together
# field of a sample -> the key
_SAMPLE_KEYS = {
    "prompt": "validation_prompt",
    "negative": "validation_negative_prompt",
    "size": "validation_resolution",
    "frames": "validation_num_video_frames",
    "steps": "validation_num_inference_steps",
    "guidance": "validation_guidance",
    "seed": "validation_seed",
}
_DATASETS = "data_backend_config:[]"
_KEYS_CHOSEN_BY_NEW = (
    *("mixed_precision", "gradient_checkpointing", "base_model_precision", "text_encoder_1_precision"),
    *("attention_mechanism", "vae_batch_size", "offload_during_startup", "base_model_default_dtype"),
    *(
        "validation_torch_compile",
        "gradient_precision",
        "quantize_via",
        "fuse_qkv_projections",
        "disable_tf32",
    ),
    *("gradient_checkpointing_interval", "vae_enable_tiling", "vae_enable_slicing"),
)
_RULES = {
    "model_type": omitted("it says what is trained"),
    "controlnet": omitted("it says what is trained"),
    "model_family": rules.MODEL_NAME,
    "pretrained_model_name_or_path": rules.MODEL_FILE,
    "pretrained_transformer_model_name_or_path": rules.MODEL_FILE,
    "pretrained_unet_model_name_or_path": rules.MODEL_FILE,
    "pretrained_t5_model_name_or_path": rules.own_file("t5xxl", "t5"),
    "pretrained_vae_model_name_or_path": rules.own_file("vae", "ae"),
    "model_flavour": rules.MODEL_NAME,
    "lora_type": rules.NETWORK_KIND,
    "lora_rank": rules.RANK,
    "lora_alpha": rules.ALPHA,
    "lora_dropout": rules.DROPOUT,
    "use_dora": rules.DORA,
    "lycoris_config:algo": rules.NETWORK_KIND,
    "lycoris_config:linear_dim": KeyRule(TRAINING, "network_dim", integer(1, 100_000)),
    "lycoris_config:linear_alpha": rules.ALPHA,
    "lycoris_config:factor": rules.LOKR_FACTOR,
    "lycoris_config:*": rules.LAYERS,
    "init_lora": rules.START,
    "assistant_lora_path": rules.ADAPTER,
    "assistant_lora_strength": KeyRule(TRAINING, "training_adapter_multiplier", number(-1000, 1000)),
    "flux_lora_target": rules.LAYERS,
    "learning_rate": rules.LEARNING_RATE,
    "lr_scheduler": rules.SCHEDULER,
    "lr_num_cycles": rules.CYCLES,
    "lr_warmup_steps": rules.WARMUP_STEPS,
    "lr_scale": omitted("it multiplies learning_rate by the batch: write the product below [training]"),
    "optimizer": rules.OPTIMIZER,
    "optimizer_config": rules.OPTIMIZER_ARGUMENTS,
    "adam_beta1": rules.argument("beta1"),
    "adam_beta2": rules.argument("beta2"),
    "optimizer_beta1": rules.argument("beta1"),
    "optimizer_beta2": rules.argument("beta2"),
    "adam_weight_decay": rules.argument("weight_decay"),
    "adam_epsilon": rules.argument("eps"),
    "max_train_steps": rules.STEPS,
    "num_train_epochs": rules.NUM_EPOCHS,
    "train_batch_size": rules.BATCH_SIZE,
    "gradient_accumulation_steps": rules.ACCUMULATED,
    "max_grad_norm": KeyRule(TRAINING, "max_grad_norm", _read_limit),
    "grad_clip_method": omitted("max_grad_norm below [training] is the norm of all gradients"),
    "loss_type": rules.LOSS,
    _FLOW_SCHEDULE: rules.DISTRIBUTION,
    "flow_schedule_shift": rules.SHIFT,
    "flow_sigmoid_scale": rules.SIGMOID_SCALE,
    "flow_use_uniform_schedule": omitted("it is read with the flow schedule"),
    "flow_*": rules.TIMESTEPS,
    "tread_config.*": omitted("tread below [training] leaves tokens out: docs/speed.md"),
    "resolution": KeyRule(SIZES, "resolution", _read_size),
    "resolution_type": omitted("resolution here is the side of a square of the area"),
    "caption_dropout_probability": rules.CAPTION_DROPOUT,
    "snr_gamma": rules.MIN_SNR,
    "noise_offset": rules.NOISE_OFFSET,
    "use_ema, ema_decay": rules.EMA_DECAY,
    "seed": rules.SEED,
    "checkpointing_steps": rules.SAVE_STEPS,
    "checkpoint_step_interval": rules.SAVE_STEPS,
    "checkpoints_total_limit": rules.KEPT_FILES,
    "resume_from_checkpoint": omitted("`run` continues from the last state by itself"),
    "tracker_run_name": rules.OUTPUT_NAME,
    "output_dir": rules.OUTPUT_FOLDER,
    "validation_steps": rules.SAMPLE_STEPS,
    "validation_step_interval": rules.SAMPLE_STEPS,
    **dict.fromkeys(_SAMPLE_KEYS.values(), rules.SAMPLES),
    "validation_*": rules.SAMPLERS,
    "user_prompt_library": omitted("it is a file of more prompts: write the ones you want into prompts.txt"),
    "num_eval_images": rules.VALIDATION,
    "eval_*": rules.VALIDATION,
    "conditioning_multidataset_sampling": rules.CONTROLS,
    "strict_epoch_limit": omitted("max_train_steps says how long a run is"),
    "fsdp_*": omitted("the model is on one card; docs/speed.md has several"),
    "_*": rules.NAMES,
    **dict.fromkeys(_KEYS_CHOSEN_BY_NEW, rules.CHOSEN_BY_NEW),
    **dict.fromkeys(("report_to", "logging_dir", "tracker_project_name", "disable_benchmark"), rules.LOGS),
    **dict.fromkeys(("push_to_hub", "push_checkpoints_to_hub", "hub_*", "model_card_note"), rules.UPLOADS),
    **dict.fromkeys(("aspect_bucket_*", "minimum_image_size", "disable_bucket_pruning"), rules.BUCKETS),
    "compress_disk_cache": rules.CACHES,
    "cache_dir*": omitted("dataset.toml says where caches go"),
    "caption_strategy": rules.CAPTIONS,
    "instance_prompt": rules.CAPTIONS,
}
_BACKEND_RULES = {
    "instance_data_dir": rules.MEDIA_FOLDER,
    "repeats": KeyRule(DATA, "num_repeats", _read_repeats),
    "resolution": KeyRule(SIZES, "resolution", _read_size),
    "resolution_type": omitted("resolution here is the side of a square of the area"),
    **dict.fromkeys(("caption_strategy", "instance_prompt", "only_instance_prompt"), rules.CAPTIONS),
    "prepend_instance_prompt": rules.CAPTIONS,
    **dict.fromkeys(
        ("crop", "crop_style", "crop_aspect", "minimum_image_size", "maximum_image_size"), rules.BUCKETS
    ),
    "target_downsample_size": rules.BUCKETS,
    **dict.fromkeys(("cache_dir_vae", "cache_dir", "text_embeds", "image_embeds"), rules.CACHES),
    **dict.fromkeys(("vae_cache_clear_each_epoch", "preserve_data_backend_cache"), rules.CACHES),
    "skip_file_discovery": rules.CACHES,
    **dict.fromkeys(
        ("dataset_name", "metadata_backend", "image_column", "caption_column", "huggingface.*"),
        omitted("no dataset is downloaded: the folder is described"),
    ),
    "probability": omitted("num_repeats in dataset.toml says how often files are seen"),
    "conditioning_data": rules.CONTROLS,
    "conditioning_type": rules.CONTROLS,
    "is_regularisation_data": rules.REGULARISING,
    **dict.fromkeys(("id", "type", "dataset_type", "default", "disabled"), rules.NAMES),
}

PROGRAM = Program(
    title="SimpleTuner",
    suffixes=(".json",),
    default_alpha=None,
    identifying_keys=("model_family", "data_backend_config"),
    companion_keys=("data_backend_config", "lycoris_config"),
    default_values={"lora_rank": 16},
    unit_keys={"max_grad_norm": "grad_clip_method"},
    kind_key_by_variant={"model_flavour": "model_family"},
    find_run=_find_run,
    find_trained_networks=_find_trained_networks,
    find_ineffective_keys=_find_ineffective_keys,
    rename_keys=_join_switches,
    read_samples=_read_samples,
    dataset_off_values={
        "dataset_type": ("text_embeds", "image_embeds", "conditioning", "eval"),
        "disabled": (True, "true"),
    },
    rules={**_RULES, **{f"{_DATASETS}.{key}": rule for key, rule in _BACKEND_RULES.items()}},
    model_by_name={
        "flux": ("flux", "dev"),
        "flux dev": ("flux", "dev"),
        "flux schnell": ("flux", "schnell"),
        "flux kontext": ("flux_kontext", "dev"),
        "flux2": ("flux_2", None),
        "flux2 dev": ("flux_2", "dev"),
        "flux2 klein-4b": ("flux_2", "klein-base-4b"),
        "flux2 klein-9b": ("flux_2", "klein-base-9b"),
        "sdxl": ("stable_diffusion", "xl"),
        "sdxl base-1.0": ("stable_diffusion", "xl"),
        "sd1x": ("stable_diffusion", "1.5"),
        "sd1x 1.5": ("stable_diffusion", "1.5"),
        "sd2x": ("stable_diffusion", "2.1"),
        "sd2x 2.1": ("stable_diffusion", "2.1"),
        "chroma": ("chroma", "hd"),
        "chroma hd": ("chroma", "hd"),
        "lumina2": ("lumina", "2.0"),
        "lumina2 2.0": ("lumina", "2.0"),
        "wan": ("wan", "t2v-1.3B"),
        "wan t2v-480p-1.3b-2.1": ("wan", "t2v-1.3B"),
        "wan t2v-480p-14b-2.1": ("wan", "t2v-14B"),
        "wan i2v-14b-2.1": ("wan", "i2v-14B-480p"),
        "wan i2v-14b-2.1-720p": ("wan", "i2v-14B-720p"),
        "wan flf2v-14b-2.1": ("wan", "flf2v-14B"),
        "wan i2v-14b-2.2-high": ("wan22", "i2v-A14B"),
        "wan i2v-14b-2.2-low": ("wan22", "i2v-A14B"),
        "qwen_image": ("qwen_image", "original"),
        "qwen_image v1.0": ("qwen_image", "original"),
        "qwen_image edit-v1": ("qwen_image", "edit"),
        "qwen_image edit-v2": ("qwen_image", "edit-2509"),
        "z-image": ("z_image", None),
        "z-image base": ("z_image", "base"),
        "z-image turbo": ("z_image", "turbo"),
        "z-image-turbo": ("z_image", "turbo"),
        "ideogram": ("ideogram4", None),
        "ideogram4": ("ideogram4", None),
        "ernie": ("ernie_image", None),
        "ernie base": ("ernie_image", "base"),
        "ernie turbo": ("ernie_image", "turbo"),
        "hunyuanvideo": ("hunyuan_video_1_5", "t2v-480p"),
        **{
            f"hunyuanvideo {task}-{size}": ("hunyuan_video_1_5", f"{task}-{size}")
            for task in ("t2v", "i2v")
            for size in ("480p", "720p")
        },
        "kandinsky5-video": ("kandinsky", "k5-lite-t2v-5s-sd"),
        "kandinsky5-video t2v-lite-sft-5s": ("kandinsky", "k5-lite-t2v-5s-sd"),
        "kandinsky5-video t2v-lite-pretrain-5s": ("kandinsky", "k5-lite-t2v-5s-pretrain"),
        "kandinsky5-video t2v-pro-sft-5s-hd": ("kandinsky", "k5-pro-t2v-5s-sd"),
        "kandinsky5-video i2v-lite-5s": ("kandinsky", "k5-lite-i2v-5s-sd"),
        "kandinsky5-video i2v-pro-sft-5s": ("kandinsky", "k5-pro-i2v-5s-sd"),
        "kandinsky5-image": ("kandinsky", "k5-lite-t2i-hd"),
        "kandinsky5-image t2i-lite-sft": ("kandinsky", "k5-lite-t2i-hd"),
        "ltxvideo2": ("ltx_2", None),
        "anima": ("anima", "base"),
        "anima base-v1.0": ("anima", "base"),
    },
)
