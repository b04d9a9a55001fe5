"""OneTrainer's JSON, and its list of concepts."""

from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    DATA,
    TRAINING,
    ForeignRun,
    KeyRule,
    Program,
    TrainedNetworks,
    UnsetValue,
    UnsupportedRun,
    integer,
    is_on,
    join_switch,
    name_distribution,
    number,
    omitted,
    read_rate,
    read_scheduler,
)
from project.foreign.sample_prompts import ForeignSample, drop_missing, group_list, read_sample

_RUNS = {"LORA": "lora", "FINE_TUNE": "whole", "EMBEDDING": "embedding"}
_TEXT_ENCODER_NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_DIT_NAMES = ("unet", "transformer", "prior")
_FURTHER_PARTS = ("vae", "low_noise_transformer", "connectors", "quantization")
_UNIT = "it is counted in minutes or seconds there, and in steps here"


# the names of a switch and of its value, joined by `_join_switches`
_MIN_SNR = "loss_weight_fn = MIN_SNR_GAMMA, loss_weight_strength"
_EMA = "ema, ema_decay"
_LOGIT_NORMAL = "LOGIT_NORMAL"
# key of the weight of a loss -> the loss
_LOSSES = {"mse_strength": "mse", "mae_strength": "mae", "log_cosh_strength": "log_cosh"}
_VALIDATION_SPLIT = 0.1  # as `new` holds back of enough files
# field of a sample -> the key
_SAMPLE_KEYS = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "width": "width",
    "height": "height",
    "steps": "diffusion_steps",
    "frames": "frames",
    "guidance": "cfg_scale",
    "seed": "seed",
}
_EMA_DECAY = 0.999  # OneTrainer's default


def _join_switches(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with one key for each group of keys that make one setting together."""
    joined = join_switch(
        values,
        "loss_weight_fn",
        "loss_weight_strength",
        default=5.0,
        on_values=("MIN_SNR_GAMMA",),
        joined_key=_MIN_SNR,
    )
    joined = join_switch(joined, "ema", "ema_decay", default=_EMA_DECAY, on_values=("GPU", "CPU"))
    weights = {key: joined.pop(key) for key in _LOSSES if key in joined}
    used = [key for key, weight in weights.items() if weight]
    if len(used) == 1:
        joined[", ".join(_LOSSES)] = _LOSSES[used[0]]
    elif weights:
        joined[", ".join(_LOSSES)] = ", ".join(str(joined_weight) for joined_weight in weights.values())
    name = joined.get("timestep_distribution")
    if name is not None:
        if name == _LOGIT_NORMAL and joined.get("noising_bias"):
            name = f"{name}, noising_bias = {joined['noising_bias']}"
        joined["timestep_distribution"] = name_distribution(name, joined.get("timestep_shift"))
    return joined


def _find_ineffective_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys of switches that are off, and of their values."""
    keys = set()
    if values.get("loss_weight_fn") == "CONSTANT":
        keys |= {"loss_weight_fn", "loss_weight_strength"}
    if _EMA not in values:
        keys |= {"ema", "ema_decay", "ema_update_step_interval"}
    if not str(values.get("timestep_distribution", "")).startswith(_LOGIT_NORMAL):
        keys |= {"noising_weight", "noising_bias"}
    for key in values:
        table = key.removesuffix(".resolution_override")
        if table != key and not is_on(values.get(f"{table}.enable_resolution_override")):
            keys |= {key, f"{table}.enable_resolution_override"}
    return keys


def _read_samples(values: Mapping[str, Any]) -> list[ForeignSample]:
    """Return the samples that are on, from the file itself or from the one that it names."""
    tables = group_list(values, "samples") or group_list(values, "sample_definition_file_name:")
    return drop_missing(
        [read_sample(table, _SAMPLE_KEYS) for table in tables if table.get("enabled", True) is not False]
    )


def _read_validation(value: Any) -> float:
    """Return the share of files that is held back; OneTrainer has folders for that, and no share."""
    if not is_on(value):
        raise UnsetValue
    return _VALIDATION_SPLIT


def _read_concept_weight(value: Any) -> None:
    """Raise UnsetValue for a weight of 1, and ValueError for others, which no dataset here has."""
    if number(0, 1000)(value) == 1:
        raise UnsetValue("all concepts count alike")
    raise ValueError("no folder here has a weight of its own in the loss: num_repeats shows one more often")


def _read_loss_weight(value: Any) -> bool:
    """Return True for the weights of debiased estimation, which an option of the same name turns on."""
    if value != "DEBIASED_ESTIMATION":
        raise ValueError("no option here weights losses so")
    return True


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    method = str(values.get("training_method", "FINE_TUNE"))
    if method not in _RUNS:
        raise UnsupportedRun(f"training_method = {method}: `new` does not set up this kind of training")
    return ForeignRun(_RUNS[method], f"training_method = {method}")


def _find_trained_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    """Return which networks an OneTrainer file trains, and their learning rates."""
    file_keys = [
        key
        for key in values
        if key.split(".")[0] in {*_TEXT_ENCODER_NAMES, *_DIT_NAMES}
        and key.endswith((".train", ".learning_rate", ".include"))
    ]
    # the transformer is called unet, prior or transformer, depending on the model
    dit_rates = [values[f"{name}.learning_rate"] for name in _DIT_NAMES if f"{name}.learning_rate" in values]
    text_encoder_names = [name for name in _TEXT_ENCODER_NAMES if _has_text_encoder(values, name)]
    return TrainedNetworks(
        file_keys=tuple(file_keys),
        trains_dit=not any(values.get(f"{name}.train") is False for name in _DIT_NAMES),
        dit_rate=read_rate(dit_rates[0]) if dit_rates else None,
        text_encoder_rates=tuple(_read_text_encoder_rate(values, name) for name in text_encoder_names),
    )


def _has_text_encoder(values: Mapping[str, Any], name: str) -> bool:
    # files of models with one text encoder call it text_encoder, and may have no key of it
    return name == "text_encoder" or any(key.startswith(f"{name}.") for key in values)


def _read_text_encoder_rate(values: Mapping[str, Any], name: str) -> float | None:
    """Return a text encoder's learning rate: 0 if it is not trained, None for the common rate."""
    if values.get(f"{name}.train", True) is False:
        return 0
    return read_rate(values.get(f"{name}.learning_rate"))


def _read_scheduler(value: Any) -> str:
    if value == "COSINE_WITH_RESTARTS":
        raise ValueError("there it rises as slowly as it falls, here it restarts immediately")
    return read_scheduler(value)


def _read_noise(value: Any) -> int:
    """Convert a noise fraction (0 to 1) to a timestep. Raises UnsetValue for 0 and 1: no limit."""
    fraction = number(0, 1)(value)
    if fraction in (0, 1):
        raise UnsetValue
    return round(1000 * fraction)


def _read_noising_weight(value: Any) -> float:
    """Return the standard deviation before the sigmoid. Raises UnsetValue for 0, which means 1."""
    weight = number(-1, 100)(value)
    if not weight:
        raise UnsetValue
    return weight + 1


def _read_every(value: Any) -> int:
    """Return the number of steps in a text such as `10 STEP`; 0 for NEVER."""
    count, _, unit = str(value).partition(" ")
    if unit == "NEVER":
        return 0
    if unit not in {"STEP", ""}:
        raise ValueError(_UNIT)
    return integer(0)(count)


_CONCEPT_RULES = {
    "path": rules.MEDIA_FOLDER,
    "repeats": rules.NUM_REPEATS,
    "balancing": rules.NUM_REPEATS,
    "balancing_strategy": omitted("num_repeats in dataset.toml says how often files are seen"),
    "name": rules.NAMES,
    "seed": omitted("the run's seed decides the random choices"),
    "enabled": omitted("each folder of dataset.toml is used"),
    "type": omitted("a folder reg has regularization images; validation_split holds out files"),
    "validation_concept": rules.VALIDATION,
    "include_subdirectories": omitted("`new` lists the folders that it uses"),
    "image_variations": omitted("each file is encoded once"),
    "text_variations": omitted("captions vary by shuffle_caption"),
    "loss_weight": KeyRule(DATA, "num_repeats", _read_concept_weight),
    "text.prompt_source": rules.CAPTIONS,
    "text.prompt_path": rules.CAPTIONS,
    "text.enable_tag_shuffling": rules.SHUFFLED,
    "text.keep_tags_count": rules.KEPT_PARTS,
    "text.tag_delimiter": KeyRule(DATA, "caption_separator", str),
    "image.enable_random_flip": rules.MIRRORED,
    "image.enable_crop_jitter": omitted(
        "crops are of the middle; random_crop in a subset of dataset.toml moves them"
    ),
    "image.resolution_override": rules.RESOLUTIONS,
    "image.enable_resolution_override": omitted("it is read with resolution_override"),
}
_OPTIMIZER_ARGUMENTS = (
    "betas",
    "beta3",
    "eps",
    "weight_decay",
    "amsgrad",
    "clip_threshold",
    "decay_rate",
    "d0",
)
_SWITCHES = ("scale_parameter", "relative_step", "warmup_init", "decouple", "use_bias_correction")

PROGRAM = Program(
    title="OneTrainer",
    suffixes=(".json",),
    default_alpha=1,
    identifying_keys=("training_method", "base_model_name", "concept_file_name", "concepts[].path"),
    companion_keys=("concept_file_name", "sample_definition_file_name"),
    default_values={
        "training_method": "FINE_TUNE",
        "model_type": "STABLE_DIFFUSION_15",
        "learning_rate": 3e-6,
        "learning_rate_scheduler": "CONSTANT",
        "learning_rate_warmup_steps": 200,
        "epochs": 100,
        "batch_size": 1,
        "resolution": "512",
        "lora_rank": 16,
        "lora_alpha": 1.0,
        "optimizer.optimizer": "ADAMW",
    },
    unit_keys={
        "save_every": "save_every_unit",
        "sample_after": "sample_after_unit",
        "backup_after": "backup_after_unit",
    },
    find_run=_find_run,
    rename_keys=_join_switches,
    read_samples=_read_samples,
    find_ineffective_keys=_find_ineffective_keys,
    find_trained_networks=_find_trained_networks,
    default_optimizer_arguments={
        "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    },
    dataset_off_values={"enabled": (False,)},
    fixed_draw_settings={"balancing_strategy": "SAMPLES"},
    draws_one_size=True,
    rules={
        "training_method": omitted("it says what is trained"),
        "model_type": rules.MODEL_NAME,
        "base_model_name": rules.MODEL_FILE,
        **{f"{name}.model_name": rules.MODEL_FILE for name in _DIT_NAMES},
        "vae.model_name": rules.own_file("vae", "ae"),
        "text_encoder.model_name": rules.own_file("text_encoder", "t5xxl", "qwen3", "gemma2"),
        "peft_type": rules.NETWORK_KIND,
        "lora_rank": rules.RANK,
        "lora_alpha": rules.ALPHA,
        "lora_decompose": rules.DORA,
        "dropout_probability": rules.DROPOUT,
        "embedding.placeholder": rules.WORD,
        "embedding.token_count": rules.VECTORS,
        "embedding.initial_embedding_text": rules.INIT_WORD,
        "learning_rate": rules.LEARNING_RATE,
        "embedding_learning_rate": omitted("learning_rate is that of a word"),
        "learning_rate_scheduler": KeyRule(TRAINING, "lr_scheduler", _read_scheduler),
        "learning_rate_warmup_steps": rules.WARMUP_STEPS,
        "learning_rate_cycles": rules.CYCLES,
        "learning_rate_min_factor": omitted(
            "lr_scheduler = cosine_with_min_lr below [training] has such a factor"
        ),
        "learning_rate_scaler": omitted("it multiplies learning_rate: write the product below [training]"),
        "optimizer.optimizer": rules.OPTIMIZER,
        "optimizer.beta1": rules.argument("beta1"),
        "optimizer.beta2": rules.argument("beta2"),
        "optimizer.eps2": rules.argument("eps2"),
        **{f"optimizer.{name}": rules.argument(name) for name in (*_OPTIMIZER_ARGUMENTS, *_SWITCHES)},
        **{f"optimizer.{name}": rules.argument(name) for name in ("safeguard_warmup", "d_coef", "momentum")},
        "epochs": rules.NUM_EPOCHS,
        "batch_size": rules.BATCH_SIZE,
        "gradient_accumulation_steps": rules.ACCUMULATED,
        "clip_grad_norm": rules.GRADIENT_LIMIT,
        "resolution": rules.RESOLUTIONS,
        "frames": rules.CLIP_FRAMES,
        "seed": rules.SEED,
        _EMA: rules.EMA_DECAY,
        "ema_update_step_interval": omitted("weights are averaged after each step"),
        "offset_noise_weight": rules.NOISE_OFFSET,
        "max_noising_strength": KeyRule(TRAINING, "max_timestep", _read_noise),
        "min_noising_strength": KeyRule(TRAINING, "min_timestep", _read_noise),
        "noising_weight": KeyRule(TRAINING, "sigmoid_scale", _read_noising_weight),
        "noising_bias": omitted("it is read with timestep_distribution"),
        "dynamic_timestep_shifting": rules.TIMESTEPS,
        ", ".join(_LOSSES): rules.LOSS,
        _MIN_SNR: rules.MIN_SNR,
        "loss_weight_fn": KeyRule(TRAINING, "debiased_estimation_loss", _read_loss_weight),
        "loss_weight_strength": omitted("it is a value of loss_weight_fn"),
        "timestep_distribution": rules.DISTRIBUTION,
        "timestep_shift": rules.SHIFT,
        "save_every": KeyRule(TRAINING, "save_every_n_steps", _read_every),
        "sample_after": KeyRule(TRAINING, "sample_every_n_steps", _read_every),
        "save_every (epochs)": rules.SAVE_EPOCHS,
        "sample_after (epochs)": rules.SAMPLE_EPOCHS,
        "backup_after (epochs)": omitted("states are saved with each file"),
        "optimizer.stochastic_rounding": omitted(
            "weights that learn are in float32 here, or round so by themselves"
        ),
        "backup_after": omitted("states are saved with each file"),
        "output_model_destination": rules.OUTPUT_NAME,
        "output_model_format": omitted("files are safetensors"),
        "optimizer_defaults.*": omitted("they belong to the optimizers that its page offers next"),
        "lora_model_name": rules.START,
        "layer_filter*": rules.LAYERS,
        "samples[].*": rules.SAMPLES,
        "sample_definition_file_name:[].*": rules.SAMPLES,
        "validation": KeyRule(TRAINING, "validation_split", _read_validation),
        "validate_after*": omitted("validation is measured when files are saved"),
        "masked_training": omitted(
            "masks there are NAME-masklabel.png; `new` names those in a folder masks, which are NAME.png"
        ),
        "unmasked_*": rules.MASKS,
        "normalize_masked_area_loss": omitted("a loss with masks is divided by the area of all pixels"),
        "latent_caching": rules.CACHES,
        "aspect_ratio_bucketing": rules.BUCKETED,
        **dict.fromkeys(("train_dtype", "train_device", "temp_device", "weight_dtype"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(
            ("gradient_checkpointing", "output_dtype", "compile", "dataloader_threads"), rules.CHOSEN_BY_NEW
        ),
        **dict.fromkeys(
            ("attention_mechanism", "layer_offload_fraction", "caching_threads"), rules.CHOSEN_BY_NEW
        ),
        **dict.fromkeys(
            ("fallback_train_dtype", "enable_autocast_cache", "lora_weight_dtype"), rules.CHOSEN_BY_NEW
        ),
        **{f"{name}.*": rules.CHOSEN_BY_NEW for name in (*_TEXT_ENCODER_NAMES, *_DIT_NAMES, *_FURTHER_PARTS)},
        **{f"{name}.dropout_probability": rules.CAPTION_DROPOUT for name in _TEXT_ENCODER_NAMES},
        **dict.fromkeys(("workspace_dir", "debug_dir"), rules.OUTPUT_FOLDER),
        "cache_dir": omitted("dataset.toml says where caches go"),
        **dict.fromkeys(("tensorboard", "tensorboard_port", "tensorboard_expose"), rules.LOGS),
        "__version": rules.NAMES,
        **{f"concepts[].{key}": rule for key, rule in _CONCEPT_RULES.items()},
        **{f"concept_file_name:[].{key}": rule for key, rule in _CONCEPT_RULES.items()},
    },
    model_by_name={
        "STABLE_DIFFUSION_15": ("stable_diffusion", "1.5"),
        "STABLE_DIFFUSION_21": ("stable_diffusion", "2.1"),
        "STABLE_DIFFUSION_XL_10_BASE": ("stable_diffusion", "xl"),
        "FLUX_DEV_1": ("flux", "dev"),
        "FLUX_2": ("flux_2", None),
        "CHROMA_1": ("chroma", "hd"),
        "HUNYUAN_VIDEO": ("hunyuan_video", "t2v"),
        "QWEN": ("qwen_image", "original"),
        "Z_IMAGE": ("z_image", None),
        "ERNIE": ("ernie_image", None),
        "IDEOGRAM_4": ("ideogram4", None),
        "ANIMA": ("anima", "base"),
        "KREA_2": ("krea2", None),
        "KREA2": ("krea2", None),
        "LTX_2": ("ltx_2", None),
        "circlestone-labs/Anima-Base-v1.0-Diffusers": ("anima", "base"),
    },
)
