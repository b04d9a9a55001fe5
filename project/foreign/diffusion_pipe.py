"""Rules for diffusion-pipe's TOML and its dataset file."""

from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    DATA,
    EPOCHS,
    SOONEST,
    ForeignRun,
    KeyRule,
    Program,
    TrainedNetworks,
    is_on,
    name_distribution,
    omitted,
    read_rate,
)

_METHOD = "model.timestep_sample_method"
_TABLES = ("transformer_path", "diffusion_model", "checkpoint_path", "diffusers_path", "ckpt_path")
_TEXT_ENCODERS = ("text_encoder", "text_encoder1", "t5", "qwen3", "gemma2", "gemma_root", "t5xxl")
# keys of other networks -> names of --model_file
_OTHER_FILES = {
    **dict.fromkeys(("vae", "vae_path"), ("vae", "ae", "video_vae", "ltx2_video_vae")),
    "audio_vae": ("audio_vae", "ltx2_audio_vae"),
    **dict.fromkeys(("llm_path", "text_encoder_path"), _TEXT_ENCODERS),
    "clip_path": ("clip_l", "text_encoder2", "clip"),
    "byt5_path": ("byt5",),
}
_EVALUATION = (
    *("eval_every_n_epochs", "eval_every_n_steps", "eval_before_first_step", "eval_micro_batch_size_per_gpu"),
    *("eval_gradient_accumulation_steps", "disable_block_swap_for_eval"),
)


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    if any(key.startswith("adapter.") for key in values):
        return ForeignRun("lora", "[adapter]")
    return ForeignRun("whole", "no [adapter]")


def _find_trained_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    """Return which networks a diffusion-pipe config trains, and their learning rates."""
    names = ("model.unet_lr", "model.text_encoder_1_lr", "model.text_encoder_2_lr")
    keys = tuple(name for name in names if name in values)
    texts = tuple(read_rate(values[name]) for name in keys if name != names[0])
    return TrainedNetworks(keys, True, read_rate(values.get(names[0])), texts)


def _name_distribution(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the shift of noise levels in the name of their distribution."""
    method = values.get(_METHOD, "logit_normal")
    if is_on(values.get("model.flux_shift")):
        return {**values, _METHOD: f"{method}, flux_shift"}
    shift = values.get("model.shift")
    if shift is None and _METHOD not in values:
        return values
    return {**values, _METHOD: name_distribution(method, shift)}


def _read_batch(value: Any) -> int:
    if isinstance(value, list):
        raise ValueError("each size has its own there; batch_size in dataset.toml is for all")
    return rules.BATCH_SIZE.read(value)


PROGRAM = Program(
    title="diffusion-pipe",
    suffixes=(".toml",),
    default_alpha=None,
    identifying_keys=("micro_batch_size_per_gpu", "pipeline_stages", "save_every_n_epochs"),
    companion_keys=("dataset",),
    default_values={"warmup_steps": 0},
    find_run=_find_run,
    rename_keys=_name_distribution,
    find_trained_networks=_find_trained_networks,
    rules={
        "epochs": KeyRule(EPOCHS, SOONEST, rules.NUM_EPOCHS.read),
        "max_steps": rules.STEPS,
        "micro_batch_size_per_gpu": KeyRule(DATA, "batch_size", _read_batch),
        "image_micro_batch_size_per_gpu": omitted("batch_size in a table of dataset.toml"),
        "gradient_accumulation_steps": rules.ACCUMULATED,
        "gradient_clipping": rules.GRADIENT_LIMIT,
        "warmup_steps": rules.WARMUP_STEPS,
        "lr_scheduler": rules.SCHEDULER,
        "force_constant_lr": omitted("learning_rate below [training] may be changed before a run continues"),
        "pseudo_huber_c": omitted("loss_type and huber_c below [training]"),
        "pipeline_stages": omitted("the model is on one card; docs/speed.md has several"),
        **dict.fromkeys(("activation_checkpointing", "blocks_to_swap", "save_dtype"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(
            ("caching_batch_size", "map_num_proc", "compile", "partition_method"), rules.CHOSEN_BY_NEW
        ),
        **dict.fromkeys(("reentrant_activation_checkpointing", "partition_split"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(_EVALUATION, rules.VALIDATION),
        "eval_datasets[].name": rules.VALIDATION,
        "eval_datasets[].config": rules.VALIDATION,
        "video_clip_mode": omitted("frame_extraction in dataset.toml says it"),
        **dict.fromkeys(("steps_per_print", "logging_steps", "x_axis_examples"), rules.LOGS),
        "monitoring.*": rules.LOGS,
        "eval_dump.*": rules.VALIDATION,
        "upload_hf_from_epoch": rules.UPLOADS,
        "huggingface_repo": rules.UPLOADS,
        "output_dir": rules.OUTPUT_FOLDER,
        "save_every_n_epochs": rules.SAVE_EPOCHS,
        "save_every_n_steps": rules.SAVE_STEPS,
        **dict.fromkeys(
            ("checkpoint_every_n_epochs", "checkpoint_every_n_minutes"),
            omitted("states are saved with each file"),
        ),
        "model.type": rules.MODEL_NAME,
        **{
            f"model.{name}": rules.CHOSEN_BY_NEW
            for name in ("dtype", "transformer_dtype", "diffusion_model_dtype")
        },
        _METHOD: rules.DISTRIBUTION,
        "model.sigmoid_scale": rules.SIGMOID_SCALE,
        "model.flux_shift": omitted("it is read with timestep_sample_method"),
        "model.shift": rules.SHIFT,
        "model.image_shift": rules.SHIFT,
        "model.cfg": omitted("targets below [training] keep what was distilled: docs/targets.md"),
        "model.merge_adapters": omitted("training_adapter below [training] accepts such a file"),
        "fuse_adapters*": omitted("training_adapter below [training] accepts such a file"),
        "model.min_snr_gamma": rules.MIN_SNR,
        "model.v_pred": omitted("the model determines what it predicts"),
        **{f"model.{name}": rules.MODEL_FILE for name in _TABLES},
        **{f"model.{name}": rules.own_file(*options) for name, options in _OTHER_FILES.items()},
        "model.text_encoders[].path": rules.own_file(*_TEXT_ENCODERS),
        "model.text_encoders[].paths": rules.own_file(*_TEXT_ENCODERS),
        "model.text_encoders*": omitted("the path beside it names the file; the model says how it is used"),
        "adapter.type": rules.NETWORK_KIND,
        "adapter.rank": rules.RANK,
        "adapter.alpha": rules.ALPHA,
        "adapter.dropout": rules.DROPOUT,
        "adapter.dtype": rules.CHOSEN_BY_NEW,
        "adapter.init_from_existing": rules.START,
        "adapter.decompose_factor": rules.LOKR_FACTOR,
        "optimizer.type": rules.OPTIMIZER,
        "optimizer.lr": rules.LEARNING_RATE,
        **{
            f"optimizer.{name}": rules.argument(name)
            for name in (
                "betas",
                "weight_decay",
                "eps",
                "momentum",
                "d_coef",
                "relative_step",
                "scale_parameter",
            )
        },
        "optimizer.warmup_init": rules.argument("warmup_init"),
        "dataset:resolutions": rules.RESOLUTIONS,
        "dataset:num_repeats": rules.NUM_REPEATS,
        **dict.fromkeys(
            ("dataset:min_ar", "dataset:max_ar", "dataset:num_ar_buckets"),
            rules.BUCKETS,
        ),
        "dataset:enable_ar_bucket": rules.BUCKETED,
        "dataset:ar_buckets": rules.BUCKETS,
        "dataset:cache_shuffle_num": omitted(
            "shuffle_caption in a subset of dataset.toml shuffles in each step"
        ),
        "dataset:cache_shuffle_delimiter": omitted("caption_separator in a subset of dataset.toml"),
        "dataset:frame_buckets": rules.CLIP_FRAMES,
        "dataset:directory[].path": rules.MEDIA_FOLDER,
        "dataset:directory[].mask_path": rules.MASKS,
        "dataset:directory[].control_path": rules.CONTROLS,
        "dataset:directory[].num_repeats": rules.NUM_REPEATS,
        "dataset:directory[].resolutions": rules.RESOLUTIONS,
        "dataset:directory[].frame_buckets": rules.CLIP_FRAMES,
        "dataset:directory[].ar_buckets": rules.BUCKETS,
    },
    model_by_name={
        "flux": ("flux", "dev"),
        "flux2": ("flux_2", None),
        "ltx2": ("ltx_2", None),
        "hunyuan-video": ("hunyuan_video", "t2v"),
        "hunyuan_video_15": ("hunyuan_video_1_5", None),
        "hunyuan_image": ("hunyuan_image", "2.1"),
        "sdxl": ("stable_diffusion", "xl"),
        "chroma": ("chroma", "hd"),
        "lumina_2": ("lumina", "2.0"),
        "wan": ("wan", None),
        "qwen_image": ("qwen_image", "original"),
        "z_image": ("z_image", None),
        "ernie_image": ("ernie_image", None),
        "anima": ("anima", "base"),
        "minimax_h3": ("minimax_h3", None),
        "krea2": ("krea2", None),
    },
)
