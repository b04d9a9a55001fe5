"""Rules for AI Toolkit's YAML job files."""

from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    DATA,
    FULL_RANK,
    NEW,
    TRAINING,
    ForeignRun,
    KeyRule,
    Program,
    TrainedNetworks,
    UnsetValue,
    UnsupportedRun,
    is_off,
    is_on,
    join_switch,
    number,
    omitted,
    read_rate,
    read_switch,
    read_trigger,
)
from project.foreign.sample_prompts import ForeignSample, drop_missing, group_list, read_sample

_JOB = "config.process[]"
_FIRST_PROCESS = "config.process[0]"
_NETWORK = f"{_FIRST_PROCESS}.network"
_TRAIN = f"{_FIRST_PROCESS}.train"
_EMA = f"{_TRAIN}.ema_config"
_EMA_DECAY = 0.995  # AI Toolkit's default
# field of a sample -> the key
_SAMPLE_KEYS = {
    "prompt": "prompt",
    "negative": "neg",
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "steps": "sample_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
}
_TRAINER_TYPES = ("sd_trainer", "ui_trainer", "diffusion_trainer")
_EMBEDDING_TYPES = ("textual_inversion_trainer", "textual_inversion")
_SLIDER = "--slider of a training script learns from two prompts, without files: docs/targets.md"


def _join_switches(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with one key for an average and its decay, and for a LoKr of full matrices."""
    joined = join_switch(values, f"{_EMA}.use_ema", f"{_EMA}.ema_decay", default=_EMA_DECAY)
    full_rank = f"{_NETWORK}.lokr_full_rank"
    if _is_lokr(values) and is_on(values.get(full_rank, True)):
        for name in ("linear", "linear_alpha", "rank", "alpha", "lokr_full_rank"):
            joined.pop(f"{_NETWORK}.{name}", None)
        joined[full_rank] = True
    return joined


def _is_lokr(values: Mapping[str, Any]) -> bool:
    return str(values.get(f"{_NETWORK}.type", "")).lower() == "lokr"


def _read_full_rank(value: Any) -> int:
    """Return a rank at which a LoKr has full matrices. Raises UnsetValue if they are factored."""
    if not is_on(value):
        raise UnsetValue
    return FULL_RANK


def _read_forced_sample(value: Any) -> bool:
    """Return True if a sample is made before the first step. Raises UnsetValue if nothing is forced."""
    if not read_switch(value):
        raise UnsetValue
    return True


def _read_content_or_style(value: Any) -> None:
    """Raise UnsetValue for both alike, and ValueError for one of them, which no distribution here prefers."""
    if value == "balanced":
        raise UnsetValue
    raise ValueError("no timestep_sampling is like it; that of the model's page stays")


def _read_samples(values: Mapping[str, Any]) -> list[ForeignSample]:
    """Return the samples of the job: a list of prompts with common values, or a table each."""
    start = f"{_FIRST_PROCESS}.sample"
    common = {key.removeprefix(f"{start}."): value for key, value in values.items() if key.startswith(start)}
    shared = {name: common[key] for name, key in _SAMPLE_KEYS.items() if key in common}
    prompts = common.get("prompts")
    tables = group_list(values, f"{start}.samples")
    tables += [{"prompt": prompt} for prompt in prompts or ()] if isinstance(prompts, list) else []
    return drop_missing([read_sample(table, _SAMPLE_KEYS, **shared) for table in tables])


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    """Return what kind of run an AI Toolkit job is, with the key that shows it."""
    job = str(values.get("job"))
    kind = str(values.get(f"{_FIRST_PROCESS}.type", ""))
    if job in {"extract", "generate", "mod"}:
        raise UnsupportedRun(f"job = {job} trains nothing")
    if "slider" in kind.lower() or _has_settings(values, "slider"):
        raise UnsupportedRun(f"type = {kind}: a slider is trained, and `new` does not set one up. {_SLIDER}")
    adapter = values.get(f"{_FIRST_PROCESS}.adapter.type")
    if adapter is not None:
        return _find_adapter_run(str(adapter))
    if kind.lower() in _EMBEDDING_TYPES or _has_settings(values, "embedding."):
        return ForeignRun("embedding", f"type = {kind}, with embedding")
    if kind not in _TRAINER_TYPES:
        raise UnsupportedRun(f"type = {kind}: `new` does not set up this kind of training")
    if _has_settings(values, "network."):
        return ForeignRun("lora", "network")
    return ForeignRun("whole", "a job without network")


def _has_settings(values: Mapping[str, Any], name: str) -> bool:
    """Return whether any key of the job's first process begins with this name."""
    return any(key.startswith(f"{_FIRST_PROCESS}.{name}") for key in values)


def _find_adapter_run(adapter: str) -> ForeignRun:
    """Return the run that trains an adapter of this type: a ControlNet. Raises UnsupportedRun for others."""
    if adapter.lower().replace("_", "") != "controlnet":
        raise UnsupportedRun(f"adapter.type = {adapter}: this kind of adapter cannot be trained here")
    return ForeignRun("controlnet", f"adapter.type = {adapter}")


def _find_trained_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    """Return which networks an AI Toolkit job trains, and their learning rates."""
    names = ("train_unet", "train_text_encoder", "unet_lr", "text_encoder_lr")
    keys = [f"{_FIRST_PROCESS}.train.{name}" for name in names]
    unet, texts, unet_rate, text_rate = (values.get(key) for key in keys)
    return TrainedNetworks(
        tuple(key for key in keys if key in values),
        unet is not False,
        read_rate(unet_rate),
        (read_rate(text_rate),) if is_on(texts) else (),
    )


def _find_ineffective_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys without effect: those of another network, and those whose switch is off."""
    without_effect = set()
    if not _is_lokr(values):
        without_effect |= {f"{_NETWORK}.lokr_full_rank", f"{_NETWORK}.lokr_factor"}
    if not is_on(values.get(f"{_TRAIN}.diff_output_preservation")):
        without_effect |= {key for key in values if key.startswith(f"{_TRAIN}.diff_output_preservation")}
    if values.get(f"{_TRAIN}.noise_scheduler", "flowmatch") != "flowmatch":
        without_effect.add(f"{_TRAIN}.timestep_type")
    if f"{_EMA}.use_ema, ema_decay" not in values:
        without_effect |= {f"{_EMA}.use_ema", f"{_EMA}.ema_decay"}
    return {
        *without_effect,
        *(key for key, value in values.items() if key.endswith(".is_reg") and is_off(value)),
    }


_RULES = {
    "trigger_word": KeyRule(NEW, "trigger_word", read_trigger),
    "embedding.trigger": rules.WORD,
    "embedding.tokens": rules.VECTORS,
    "embedding.init_words": rules.INIT_WORD,
    "network.type": rules.NETWORK_KIND,
    "network.lokr_factor": rules.LOKR_FACTOR,
    "network.lokr_full_rank": KeyRule(TRAINING, "network_dim", _read_full_rank),
    "network.linear": rules.RANK,
    "network.linear_alpha": rules.ALPHA,
    "network.rank": rules.RANK,
    "network.alpha": rules.ALPHA,
    "network.dropout": rules.DROPOUT,
    "network.network_kwargs.*": rules.LAYERS,
    "network.conv": rules.CONVOLUTION_RANK,
    "network.conv_alpha": rules.CONVOLUTION_ALPHA,
    "train.steps": rules.STEPS,
    "train.lr": rules.LEARNING_RATE,
    "train.batch_size": rules.BATCH_SIZE,
    "train.gradient_accumulation_steps": rules.ACCUMULATED,
    "train.gradient_accumulation": rules.ACCUMULATED,
    "train.optimizer": rules.OPTIMIZER,
    "train.lr_scheduler": rules.SCHEDULER,
    "train.lr_scheduler_params.power": rules.POWER,
    "train.lr_scheduler_params.warmup_steps": rules.WARMUP_STEPS,
    "train.lr_scheduler_params.num_warmup_steps": rules.WARMUP_STEPS,
    "train.max_grad_norm": rules.GRADIENT_LIMIT,
    "train.seed": rules.SEED,
    "train.ema_config.use_ema, ema_decay": rules.EMA_DECAY,
    "train.min_snr_gamma": rules.MIN_SNR,
    "train.snr_gamma": rules.MIN_SNR,
    "train.noise_offset": rules.NOISE_OFFSET,
    **{
        f"train.optimizer_params.{name}": rules.argument(name)
        for name in (
            "weight_decay",
            "betas",
            "eps",
            "d_coef",
            "relative_step",
            "scale_parameter",
            "warmup_init",
        )
    },
    "train.dtype": rules.CHOSEN_BY_NEW,
    "train.gradient_checkpointing": rules.CHOSEN_BY_NEW,
    "train.unload_text_encoder": rules.CHOSEN_BY_NEW,
    "train.cache_text_embeddings": rules.CACHES,
    "train.noise_scheduler": omitted("the model's own noise is used"),
    "train.timestep_type": rules.DISTRIBUTION,
    "train.content_or_style": KeyRule(TRAINING, "timestep_sampling", _read_content_or_style),
    "train.linear_timesteps": rules.TIMESTEPS,
    "train.loss_type": rules.LOSS,
    "train.reg_weight": KeyRule(DATA, "prior_loss_weight", number(0, 1000)),
    "train.switch_boundary_every": omitted(
        "of two networks, the noise level of each step decides which one is trained"
    ),
    "train.skip_first_sample": KeyRule(TRAINING, "sample_at_first", lambda value: not read_switch(value)),
    "train.force_first_sample": KeyRule(TRAINING, "sample_at_first", _read_forced_sample),
    "train.disable_sampling": omitted("without sample_prompts below [training] there are no samples"),
    **dict.fromkeys(
        ("train.diff_output_preservation", "train.diff_output_preservation_*"),
        omitted(
            "custom_attributes.diff_output_preservation in a subset of dataset.toml: docs/image_datasets.md"
        ),
    ),
    "save.save_every": rules.SAVE_STEPS,
    "save.max_step_saves_to_keep": rules.KEPT_FILES,
    "save.dtype": rules.CHOSEN_BY_NEW,
    "save.save_format": omitted("files are safetensors"),
    "save.push_to_hub": rules.UPLOADS,
    "save.hf_*": rules.UPLOADS,
    "datasets[].folder_path": rules.MEDIA_FOLDER,
    "datasets[].caption_ext": rules.CAPTIONS,
    "datasets[].num_repeats": rules.NUM_REPEATS,
    "datasets[].resolution": rules.RESOLUTIONS,
    "datasets[].caption_dropout_rate": rules.CAPTION_DROPOUT,
    "datasets[].shuffle_tokens": rules.SHUFFLED,
    "datasets[].keep_tokens": rules.KEPT_PARTS,
    "datasets[].token_dropout_rate": rules.TAG_DROPOUT,
    "datasets[].trigger_word": rules.WORD,
    "datasets[].flip_x": rules.MIRRORED,
    "datasets[].is_reg": rules.REGULARISING,
    "datasets[].mask_path": rules.MASKS,
    "datasets[].control_path": rules.CONTROLS,
    "datasets[].num_frames": rules.CLIP_FRAMES,
    "datasets[].default_caption": omitted("class_tokens in dataset.toml is the caption of files without one"),
    "datasets[].buckets": rules.BUCKETED,
    "datasets[].cache_latents_to_disk": rules.CACHES,
    "datasets[].cache_latents": rules.CACHES,
    "model.name_or_path": rules.MODEL_FILE,
    "model.vae_path": rules.own_file("vae", "ae"),
    "model.te_name_or_path": rules.own_file("text_encoder", "t5", "t5xxl", "qwen3", "gemma2", "gemma_root"),
    "network.pretrained_lora_path": rules.START,
    "model.arch": rules.MODEL_NAME,
    **{f"model.{name}": rules.MODEL_NAME for name in ("is_flux", "is_xl", "is_v2", "is_lumina2")},
    **{
        f"model.{name}": rules.CHOSEN_BY_NEW
        for name in ("quantize", "quantize_te", "qtype", "qtype_te", "low_vram")
    },
    "model.dtype": rules.CHOSEN_BY_NEW,
    "model.assistant_lora_path": rules.ADAPTER,
    "model.model_kwargs.*": omitted("of two networks both learn; min_timestep and max_timestep choose one"),
    "model.layer_offloading*": rules.CHOSEN_BY_NEW,
    "sample.sample_every": rules.SAMPLE_STEPS,
    "sample.prompts": rules.SAMPLES,
    "sample.samples[].*": rules.SAMPLES,
    **{f"sample.{key}": rules.SAMPLES for key in _SAMPLE_KEYS.values()},
    "sample.*": rules.SAMPLERS,
    "device": rules.CHOSEN_BY_NEW,
    "type": omitted("it says what is trained"),
    "training_folder": rules.OUTPUT_FOLDER,
    "performance_log_every": rules.LOGS,
    "logging.*": rules.LOGS,
    "sqlite_db_path": rules.LOGS,
}

PROGRAM = Program(
    title="AI Toolkit",
    suffixes=(".yaml", ".yml", ".json"),
    default_alpha=1,
    identifying_keys=("config.process[].type",),
    default_values={
        f"{_FIRST_PROCESS}.train.steps": 1000,
        f"{_FIRST_PROCESS}.train.lr": 1e-6,
        f"{_FIRST_PROCESS}.train.optimizer": "adamw",
    },
    find_run=_find_run,
    find_trained_networks=_find_trained_networks,
    find_ineffective_keys=_find_ineffective_keys,
    rename_keys=_join_switches,
    read_samples=_read_samples,
    default_optimizer_arguments={
        "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    },
    rules={
        "config.name": rules.OUTPUT_NAME,
        "job": omitted("it is a training"),
        "meta.*": rules.NAMES,
        **{f"{_JOB}.{key}": rule for key, rule in _RULES.items()},
    },
    model_by_name={
        "is_flux=True": ("flux", "dev"),
        "is_xl=True": ("stable_diffusion", "xl"),
        "is_v2=True": ("stable_diffusion", "2.1"),
        "is_lumina2=True": ("lumina", "2.0"),
        "flux": ("flux", "dev"),
        "flex1": ("flux", "dev"),
        "flux_kontext": ("flux_kontext", "dev"),
        "flux2": ("flux_2", None),
        "flux2_klein_4b": ("flux_2", "klein-base-4b"),
        "flux2_klein_9b": ("flux_2", "klein-base-9b"),
        "chroma": ("chroma", "hd"),
        "lumina2": ("lumina", "2.0"),
        "qwen_image": ("qwen_image", "original"),
        "qwen_image_edit": ("qwen_image", "edit"),
        "qwen_image_edit_plus": ("qwen_image", "edit-2509"),
        "qwen_image_2": ("qwen_image_21", "base"),
        "zimage": ("z_image", None),
        "zimage:turbo": ("z_image", "turbo"),
        "wan21:1b": ("wan", "t2v-1.3B"),
        "wan21:14b": ("wan", "t2v-14B"),
        "wan21_i2v:14b480p": ("wan", "i2v-14B-480p"),
        "wan22_14b:t2v": ("wan22", "t2v-A14B"),
        "wan22_14b_i2v": ("wan22", "i2v-A14B"),
        "wan21": ("wan", None),
        "wan22_14b": ("wan22", "t2v-A14B"),
        "wan22_5b": ("wan22", "ti2v-5B"),
        "sdxl": ("stable_diffusion", "xl"),
        "sd1": ("stable_diffusion", "1.5"),
        "anima": ("anima", "base"),
        "ernie_image": ("ernie_image", None),
        "ideogram4": ("ideogram4", None),
        "hidream_o1": ("hidream_o1", None),
        "krea2": ("krea2", None),
        "krea2:turbo": ("krea2", "turbo"),
        "ltx2": ("ltx_2", None),
        "runwayml/stable-diffusion-v1-5": ("stable_diffusion", "1.5"),
    },
)
