"""Rules for the JSON that the GUI of kohya_ss saves; most keys are options of sd-scripts."""

import itertools
import shlex
from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    EPOCHS,
    FIRST,
    NETWORK_ARGUMENT,
    NEW,
    SHARE,
    TRAINING,
    ForeignRun,
    KeyRule,
    Program,
    TrainedNetworks,
    UnsetValue,
    UnsupportedRun,
    integer,
    is_off,
    is_on,
    number,
    omitted,
    read_rate,
    read_switch,
    read_text,
)
from project.foreign.sample_prompts import ForeignSample

_UI_ONLY = omitted("only the form itself uses it")
_SET_BY_NETWORK_ARGS = omitted("set it by network_args below [training]: docs/networks.md")
_LAUNCHER_ONLY = omitted("`run` starts the training on one card")
_NETWORK_ARGUMENTS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "factor")
_LYCORIS_KEYS = (
    *("algo", "block_size", "bypass_mode", "constrain", "rank_dropout_scale"),
    *("rescaled", "train_norm", "train_on_input", "unit", "use_cp", "use_scalar", "use_tucker"),
)
_BLOCK_WEIGHT_KEYS = (
    *("block_alphas", "block_dims", "block_lr_zero_threshold", "conv_block_alphas", "conv_block_dims"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
)
_MULTIRES_NOISE_KEYS = ("multires_noise_discount", "multires_noise_iterations")
_NOISE_OFFSET_KEYS = ("adaptive_noise_scale", "noise_offset", "noise_offset_random_strength")
_FLUX_ONLY_KEYS = ("guidance_scale", "discrete_flow_shift", "model_prediction_type", "timestep_sampling")
# keys that FLUX ignores: of models that predict noise, and of their text encoders
_NOISE_ONLY_KEYS = {*_MULTIRES_NOISE_KEYS, *_NOISE_OFFSET_KEYS, "min_snr_gamma", "zero_terminal_snr"}
_NOISE_ONLY_KEYS |= {"clip_skip", "max_token_length", "ip_noise_gamma", "scale_v_pred_loss_like_noise_pred"}
_FINE_TUNING_KEYS = ("train_dir", "image_folder", "create_caption", "create_buckets", "dataset_repeats")
_LECO_SLIDER_KEYS = ("leco_denoise_guidance_scale", "max_denoising_steps", "prompts_file")
_EMBEDDING_KEYS = ("token_string", "init_word", "num_vectors_per_token")


def _is_lllite(values: Mapping[str, Any]) -> bool:
    return any(key.startswith("lllite_") for key in values)


def _guess_model(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Guess the model if no key names it: Anima from its LLLite, SD 1.5 from the key `v2`; otherwise None."""
    if _is_lllite(values) and any(key.startswith("anima_") for key in values):
        return "anima", "base"
    return ("stable_diffusion", "1.5") if "v2" in values else None


def _read_kept_steps(value: Any) -> int:
    """Return for how many steps files are kept. Raises UnsetValue for 0, which means all."""
    steps = integer(0)(value)
    if not steps:
        raise UnsetValue
    return steps


def _read_typed_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the options that the form's field for further options has as text."""
    try:
        words = shlex.split(str(values.get("additional_parameters") or ""))
    except ValueError:  # a quote that is not closed
        return values
    typed: dict[str, Any] = {}
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            has_value = bool(following) and not following.startswith("--")
            typed[name.replace("-", "_")] = value or (following if has_value else True)
    return {**typed, **values}  # the form's own fields come first


def _read_samples(values: Mapping[str, Any]) -> list[ForeignSample]:
    """Return the lines of prompts, which have options of their own as in prompts.txt."""
    lines = str(values.get("sample_prompts") or "").splitlines()
    texts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [ForeignSample(text, is_line=True) for text in texts]


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    """Return the kind of run that a kohya GUI file describes, with the key that shows it."""
    # Keys are tried from the most specific to the least: LECO (sliders), LLLite, LoRA, embedding; otherwise
    # the full model.
    for key in _LECO_SLIDER_KEYS:
        if key in values:
            raise UnsupportedRun(
                f"{key} belongs to LECO, a slider, which `new` does not set up. "
                "--slider of a training script learns from two prompts, without files: docs/targets.md"
            )
    if _is_lllite(values):
        return ForeignRun("lllite", "lllite_cond_dim")
    network_type = values.get("LoRA_type")
    if not is_off(network_type):
        return _make_lora_run(str(network_type))
    embedding_keys = [key for key in _EMBEDDING_KEYS if not is_off(values.get(key))]
    if embedding_keys:
        return ForeignRun("embedding", f"{embedding_keys[0]} = {values[embedding_keys[0]]}")
    if not is_off(values.get("network_dim")):
        return ForeignRun("lora", "network_dim")
    fine_tuning_key = next((key for key in _FINE_TUNING_KEYS if key in values), None)
    method = "DreamBooth" if fine_tuning_key is None else f"fine-tuning, by {fine_tuning_key}"
    return ForeignRun("whole", f"no LoRA_type ({method})")


def _make_lora_run(network_type: str) -> ForeignRun:
    """Return a LoRA run. Raises UnsupportedRun for a type that trains whole layers ("fine")."""
    if "fine" in network_type.lower():
        raise UnsupportedRun(
            f"LoRA_type = {network_type} trains differences of whole layers, which no network here does; "
            "--train whole trains the model itself"
        )
    return ForeignRun("lora", f"LoRA_type = {network_type}")


_ONE_ENCODER_RATE_KEYS = ("learning_rate_te",)
_TWO_ENCODER_RATE_KEYS = ("learning_rate_te1", "learning_rate_te2")


def _find_trained_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    """Return which networks a kohya GUI file trains, and their learning rates."""
    # The GUI writes 0 for a rate that the user has not set.
    encoder_rate_keys = _TWO_ENCODER_RATE_KEYS if is_on(values.get("sdxl")) else _ONE_ENCODER_RATE_KEYS
    all_keys = ("unet_lr", "text_encoder_lr", "train_text_encoder", *encoder_rate_keys)
    keys = tuple(key for key in all_keys if key in values)
    if _find_run(values).kind == "lora":
        return _find_lora_networks(values, keys)
    rates = [read_rate(values[name]) or 0 for name in encoder_rate_keys if name in values]
    if any(rates):  # text encoders with a rate are trained, unless the switch is off
        trains_encoders = not is_off(values.get("train_text_encoder", True))
        return TrainedNetworks(keys, text_encoder_rates=tuple(rates) if trains_encoders else ())
    trains_encoders = is_on(values.get("train_text_encoder"))
    # None: at learning_rate
    return TrainedNetworks(keys, text_encoder_rates=(None,) if trains_encoders else ())


def _find_lora_networks(values: Mapping[str, Any], keys: tuple[str, ...]) -> TrainedNetworks:
    """Return which networks get a LoRA: those with a learning rate above 0; both if both rates are 0."""
    dit_rate = read_rate(values.get("unet_lr")) or 0
    text_encoder_rate = read_rate(values.get("text_encoder_lr")) or 0
    if dit_rate or text_encoder_rate:
        return TrainedNetworks(
            keys,
            trains_dit=dit_rate > 0,
            dit_rate=dit_rate or None,
            text_encoder_rates=(text_encoder_rate,) if text_encoder_rate else (),
        )
    has_both_keys = "unet_lr" in values and "text_encoder_lr" in values
    # None: at learning_rate
    return TrainedNetworks(keys, text_encoder_rates=(None,) if has_both_keys else ())


def _find_ineffective_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys without effect in a kohya GUI file, because other keys turn their feature off."""
    # The GUI saves all of its fields, including fields of unused features.
    network_type = str(values.get("LoRA_type", "")).lower()
    # keys that only other models use: SDXL, models with one text encoder, or FLUX
    ineffective: set[str] = set()
    if is_on(values.get("sdxl")):
        ineffective |= {*_ONE_ENCODER_RATE_KEYS}
    else:
        ineffective |= {*_TWO_ENCODER_RATE_KEYS, *(key for key in values if key.startswith("sdxl_"))}
    if not is_on(values.get("flux1_checkbox")):
        ineffective |= {*_FLUX_ONLY_KEYS, *(key for key in values if key.startswith(("flux1_", "t5xxl_")))}
        ineffective.discard("flux1_checkbox")  # the switch itself is read
    if "lycoris" not in network_type:
        ineffective |= {*_LYCORIS_KEYS, "LyCORIS_preset", "dora_wd", "factor"}
    if "lokr" not in network_type:
        ineffective.add("decompose_both")
    if "lycoris" not in network_type and "locon" not in network_type:
        ineffective |= {"conv_dim", "conv_alpha"}
    if values.get("noise_offset_type", "Original") == "Original":
        ineffective |= {*_MULTIRES_NOISE_KEYS}
    else:
        ineffective |= {*_NOISE_OFFSET_KEYS}
    if is_off(values.get("min_snr_gamma")) or values.get("min_snr_gamma") == 0:
        ineffective.add("min_snr_gamma")
    if is_on(values.get("sdxl")):  # it always uses the last but one layer
        ineffective.add("clip_skip")
    if is_on(values.get("flux1_checkbox")):
        ineffective |= _NOISE_ONLY_KEYS
    if str(values.get("max_token_length")) == "75":  # the text encoder's default length
        ineffective.add("max_token_length")
    if str(values.get("clip_skip")) in {"0", "1"}:  # the last layer
        ineffective.add("clip_skip")
    if str(values.get("loss_type", "l2")) == "l2":
        ineffective |= {"huber_c", "huber_schedule", "huber_scale"}
    return ineffective


PROGRAM = Program(
    title="the GUI of kohya_ss",
    suffixes=(".json",),
    default_alpha=1,
    identifying_keys=(
        *("LoRA_type", "train_data_dir", "train_dir", "image_folder", "create_buckets", "no_token_padding"),
        *_LECO_SLIDER_KEYS,
    ),
    shares_option_names=True,
    find_run=_find_run,
    find_trained_networks=_find_trained_networks,
    find_ineffective_keys=_find_ineffective_keys,
    guess_model=_guess_model,
    rename_keys=_read_typed_options,
    read_samples=_read_samples,
    rules={
        "output_name": rules.OUTPUT_NAME,
        "model_output_name": rules.OUTPUT_NAME,
        "LoRA_type": rules.NETWORK_KIND,
        "network_dim": rules.RANK,
        "network_alpha": rules.ALPHA,
        **{name: KeyRule(NETWORK_ARGUMENT, name, number(-1, 1e6)) for name in _NETWORK_ARGUMENTS},
        **dict.fromkeys((*_LYCORIS_KEYS, *_BLOCK_WEIGHT_KEYS, "LyCORIS_preset"), _SET_BY_NETWORK_ARGS),
        "decompose_both": KeyRule(NETWORK_ARGUMENT, "decompose_both", read_switch),
        "dora_wd": rules.DORA,
        "token_string": rules.WORD,
        "init_word": rules.INIT_WORD,
        "num_vectors_per_token": rules.VECTORS,
        "template": omitted("an embedding is trained with captions: docs/textual_inversion.md has templates"),
        "learning_rate": rules.LEARNING_RATE,
        "lr_scheduler": rules.SCHEDULER,
        "lr_scheduler_num_cycles": rules.CYCLES,
        "lr_warmup": KeyRule(SHARE, "", number(0, 100)),
        "lr_warmup_steps": rules.WARMUP_STEPS,
        "lr_scheduler_type": omitted("it names code to import; type --lr_scheduler_type with the training"),
        "optimizer": rules.OPTIMIZER,
        "optimizer_args": rules.OPTIMIZER_ARGUMENTS,
        "max_grad_norm": rules.GRADIENT_LIMIT,
        "gradient_accumulation_steps": rules.ACCUMULATED,
        "seed": KeyRule(TRAINING, "seed", integer(0, 2**32 - 1)),
        "epoch": rules.NUM_EPOCHS,
        "max_train_epochs": KeyRule(EPOCHS, FIRST, integer(0)),
        "max_train_steps": rules.STEPS,
        "train_batch_size": rules.BATCH_SIZE,
        "batch_size": omitted(
            "it is for making captions and caches there; train_batch_size is for training steps"
        ),
        "dataset_repeats": rules.NUM_REPEATS,
        "max_resolution": rules.RESOLUTION,
        "resolution": rules.RESOLUTION,
        "conditioning_data_dir": rules.CONTROLS,
        "flux1_t5xxl_max_token_length": KeyRule(TRAINING, "t5xxl_max_token_length", integer(1, 4096)),
        "anima_discrete_flow_shift": KeyRule(TRAINING, "discrete_flow_shift", number(0, 1000)),
        "anima_sigmoid_scale": KeyRule(TRAINING, "sigmoid_scale", number(0, 1000)),
        "anima_timestep_sampling": KeyRule(TRAINING, "timestep_sampling", read_text),
        "anima_*": rules.CHOSEN_BY_NEW,
        "anima_qwen3": rules.own_file("qwen3", "text_encoder"),
        "anima_vae": rules.own_file("vae"),
        **dict.fromkeys(("anima_llm_adapter_path", "anima_t5_tokenizer_path"), rules.SAME_FILE),
        "train_data_dir": rules.MEDIA_FOLDER,
        "image_folder": rules.MEDIA_FOLDER,
        "train_dir": omitted("`new` finds captions and sizes itself"),
        "reg_data_dir": rules.REGULARISING,
        "pretrained_model_name_or_path": rules.MODEL_FILE,
        "sdxl": rules.MODEL_NAME,
        "flux1_checkbox": rules.MODEL_NAME,
        "v2": rules.MODEL_NAME,
        "v_parameterization": omitted("the model determines what it predicts"),
        "ae": rules.own_file("ae", "vae"),
        "clip_l": rules.own_file("clip_l"),
        "t5xxl": rules.own_file("t5xxl"),
        "vae": rules.own_file("vae", "ae"),
        "caption_extension": rules.CAPTIONS,
        "enable_bucket": rules.BUCKETED,
        "dataset_config": omitted("dataset.toml is written by `new`"),
        "save_every_n_steps": rules.SAVE_STEPS,
        "save_every_n_epochs": rules.SAVE_EPOCHS,
        "sample_every_n_steps": rules.SAMPLE_STEPS,
        "sample_every_n_epochs": rules.SAMPLE_EPOCHS,
        **{
            name: KeyRule(TRAINING, name, _read_kept_steps)
            for name in ("save_last_n_steps", "save_last_n_steps_state")
        },
        **dict.fromkeys(
            ("save_state", "save_state_on_train_end"), omitted("states are saved with each file")
        ),
        "sample_prompts": rules.SAMPLES,
        "sample_sampler": omitted("samples are made as the model's page says"),
        **dict.fromkeys(("cache_latents", "cache_latents_to_disk"), rules.CACHES),
        **dict.fromkeys(
            ("flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk"), rules.CACHES
        ),
        "sdxl_cache_text_encoder_outputs": rules.CACHES,
        **dict.fromkeys(("gradient_checkpointing", "mixed_precision", "save_precision"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(("xformers", "mem_eff_attn", "sdxl_no_half_vae", "no_half_vae"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(
            ("full_bf16", "full_fp16", "fp8_base", "fp8_base_unet", "highvram"), rules.CHOSEN_BY_NEW
        ),
        **dict.fromkeys(("lowvram", "lowram", "blocks_to_swap", "vae_batch_size"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(("max_data_loader_n_workers", "persistent_data_loader_workers"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(("split_mode", "mem_eff_save", "fused_backward_pass"), rules.CHOSEN_BY_NEW),
        **dict.fromkeys(("num_cpu_threads_per_process", "num_processes", "num_machines"), _LAUNCHER_ONLY),
        **dict.fromkeys(("multi_gpu", "gpu_ids", "main_process_port", "dynamo_backend"), _LAUNCHER_ONLY),
        **dict.fromkeys(("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph"), _LAUNCHER_ONLY),
        "extra_accelerate_launch_args": _LAUNCHER_ONLY,
        "additional_parameters": omitted("each of these options is read by itself"),
        **dict.fromkeys(("output_dir", "resume"), rules.OUTPUT_FOLDER),
        "logging_dir": omitted("logging_dir below [training] says where logs go"),
        **dict.fromkeys(("log_with", "log_config", "log_tracker_name", "log_tracker_config"), rules.LOGS),
        **dict.fromkeys(("wandb_api_key", "wandb_run_name", "use_wandb"), rules.LOGS),
        **dict.fromkeys(
            (
                *("huggingface_path_in_repo", "huggingface_repo_id", "huggingface_repo_type", "async_upload"),
                *("huggingface_repo_visibility", "huggingface_token", "save_state_to_huggingface"),
                "resume_from_huggingface",
            ),
            rules.UPLOADS,
        ),
        **dict.fromkeys(("model_list", "stop_text_encoder_training_pct", "save_as_bool"), _UI_ONLY),
        **dict.fromkeys(("create_caption", "create_buckets", "full_path", "use_latent_files"), _UI_ONLY),
        "noise_offset_type": _UI_ONLY,
        "stop_text_encoder_training": omitted("everything that is trained is trained until the end"),
        "use_8bit_adam": omitted("optimizer says it"),
        "save_model_as": omitted("files are safetensors"),
        "network_weights": rules.START,
        "lora_network_weights": rules.START,
        "training_comment": KeyRule(TRAINING, "training_comment", read_text),
        **{
            name: KeyRule(TRAINING, name, read_text)
            for name in ("metadata_author", "metadata_description", "metadata_license", "metadata_tags")
        },
        "metadata_title": KeyRule(TRAINING, "metadata_title", read_text),
        "class_prompt": omitted("the folder's name has the class"),
        "instance_prompt": KeyRule(NEW, "trigger_word", rules.WORD.read),
    },
    model_by_name={
        "sdxl=True": ("stable_diffusion", "xl"),
        "flux1_checkbox=True": ("flux", "dev"),
        "v2=True": ("stable_diffusion", "2.1"),
        "runwayml/stable-diffusion-v1-5": ("stable_diffusion", "1.5"),
    },
)
