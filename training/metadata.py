"""The metadata of saved files: `ss_*` describes the training, `modelspec.*` the file.

All values are text; missing ones are "None".
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from checkpoints.file_hashes import full_hash, short_hash
from dataset.table import DatasetTable
from modules.atomic_write import replace_surrogates
from modules.options import list_given_with, option_values, options_with
from networks.names.layouts import TRAINED_FOR
from protocols.family import Family
from training.data.table_times import list_timestep_options
from training.image_metadata import image_trainer_metadata
from training.noise_options import L2
from training.optimizers.lr_schedule import count_steps
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.resuming import describe_adapter, list_file_names, recorded_values
from training.training_run import TrainedModel

# as in the files of other video and image trainers; `Family.metadata` may have another resolution
RESOLUTION = "1280x720"
IMAGE_RESOLUTION = "1024x1024"
# options that entries of other names record
RECORDED_OTHERWISE = frozenset(
    ("optimizer_type", "optimizer_args", "lr_scheduler_type", "min_timestep", "max_timestep")
)


def continued_sizes_metadata(model: TrainedModel, expert_name: str) -> dict[str, str]:
    """Return the metadata of rank and alpha if a file or state decided them instead of the options.

    Args:
        model: The loaded networks.
        expert_name: Name of the expert that the file is for; "" for a file for all.
    """
    options = model.plan.options
    network = model.plan.network_spec.lora_options
    if network is None:
        return {}
    initial_file = network.network_weights or options.by_expert.network_weights_high_noise
    if not (initial_file or model.plan.saved):
        return {}
    ranks, alphas = model.trainable.ranks_and_alphas(expert_name)
    state_keeps_sizes = (
        network.rank in ranks and (network.network_alpha or network.rank) in alphas
    ) or network.kind.rotates
    if state_keeps_sizes and not initial_file:
        return {}
    sizes: dict[str, Sequence[float]] = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    return {
        key: f"{numbers[0]:g}" if len(numbers) == 1 else "Dynamic"
        for key, numbers in sizes.items()
        if numbers
    }


def _hash_files(family: Family) -> dict[str, str]:
    """Return the old and new AUTOMATIC1111 hashes of each model file, by which programs look up models."""
    hashes: dict[str, str] = {}
    for name, path in family.hashed_files.items():
        hashes[f"ss_{name}_hash"] = short_hash(path)
        hashes[f"ss_new_{name}_hash"] = full_hash(path)
    return hashes


def run_metadata(plan: TrainingPlan, optimizer: str, lr_scheduler: str) -> dict[str, str]:
    """Return the metadata entries that do not change during the run.

    With --no_metadata these are only the ones that programs need to load the file. A fully trained DiT has no
    `ss_network_*` entries, which identify a LoRA.

    Args:
        plan: The plan of the run.
        optimizer: Name of the optimizer.
        lr_scheduler: Name of the learning-rate schedule.
    """
    lora, family = plan.network_spec.lora_options, plan.family
    values: dict[str, Any] = {"ss_base_model_version": family.metadata.get("base_model_version", family.name)}
    if plan.network_module:
        values["ss_network_module"] = plan.network_module
    if lora is not None:
        rank, alpha = ("Dynamic", "Dynamic") if lora.dim_from_weights else (lora.rank, lora.network_alpha)
        values["ss_network_dim"] = rank
        values["ss_network_alpha"] = None if lora.kind.rotates else alpha
        values["ss_network_args"] = json.dumps(lora.arguments(), ensure_ascii=False)
    # entries that programs need to load the file: of the network, of features, of the family
    if plan.network_spec.custom is not None:
        values |= plan.network_spec.custom.values
    values |= plan.features.info.for_loading
    for key, value in family.metadata.items():
        if key.startswith(("reference_", "audio_ref_", "modelspec.")):
            values[key] = value
    if plan.options.full_dit is not None and "file_model_type" in family.metadata:
        values["model_type"] = family.metadata["file_model_type"]
    if not plan.options.metadata.no_metadata:
        # options whose change is rejected (identity) or warned of (habit) when the run is resumed
        family_options = recorded_values(family.options, "identity", "habit")
        values |= {f"ss_{name}": value for name, value in family_options.items() if value is not None}
        # of the options of all families only those that differ from their defaults, and no paths
        given = set(list_given_with(plan.options, {})) - RECORDED_OTHERWISE
        for name, value in recorded_values(plan.options, "identity", "habit").items():
            if name in given:
                values.setdefault(f"ss_{name}", value)
        values |= {f"ss_{flag[2:]}": names for flag, names in list_file_names(plan.options).items() if names}
        values |= _training_values(plan, optimizer, lr_scheduler)
        values |= _list_optional_values(plan)
        values |= _model_values(family)
    return {key: str(value) for key, value in values.items()}


def _model_values(family: Family) -> dict[str, Any]:
    """Return the metadata entries (`ss_...`) about the model: names and hashes of its files, and its use."""
    metadata = family.metadata
    expert_names = [name for name in metadata if name.startswith("sd_model_name_")]
    values: dict[str, Any] = {
        f"ss_{name}": metadata.get(name) for name in ("sd_model_name", *expert_names, "vae_name")
    }
    if family.hashed_files:
        values |= _hash_files(family)
    values |= {name: text for name, text in metadata.items() if name.startswith("ss_")}
    if "trained_for" in metadata:
        values[TRAINED_FOR] = metadata["trained_for"]
    return values


def _list_optional_values(plan: TrainingPlan) -> dict[str, Any]:
    """Return the metadata entries (`ss_...`) about the training run that only some runs have."""
    # Files of image models record more than those of video models, because other trainers of them do.
    options, frozen = plan.options, plan.options.frozen
    values: dict[str, Any] = {}
    if options.loss != L2 or options.is_for_images:  # image trainers always record the options of the loss
        values |= {f"ss_{name}": value for name, value in asdict(options.loss).items()}
    if options.prediction is not None:  # an image model
        values |= image_trainer_metadata(plan, options.prediction)
        values |= _image_option_values(options)
    if options.timesteps.timestep_focus is not None:
        values["ss_timestep_focus"] = options.timesteps.timestep_focus
        values["ss_timestep_focus_range"] = " ".join(map(str, options.timesteps.timestep_focus_range))
    if frozen.training_adapter is not None:
        adapter = describe_adapter(frozen.training_adapter, frozen.training_adapter_multiplier)
        values["ss_training_adapter"] = adapter
    if plan.progress.changes:
        values["ss_resume_changes"] = json.dumps(plan.progress.changes, ensure_ascii=False)
    return values


def _image_option_values(options: TrainingOptions) -> dict[str, Any]:
    """Return the entries of options that are recorded for image models only."""
    values = option_values(options)
    return {f"ss_{name}": values[name] for name in options_with(TrainingOptions, "image_files", True)}


def file_metadata(
    run: Mapping[str, str],
    options: TrainingOptions,
    family_metadata: Mapping[str, str],
    step: int,
    epoch: int,
    now: datetime,
    licence: str | None = None,
    tables: Sequence[DatasetTable] = (),
    architecture_suffix: str = "lora",
) -> dict[str, str]:
    """Return the metadata for a file at the time of saving: the run's entries, progress, and `modelspec.*`.

    Hashes of a LoRA are added when its tensors are written. Source of `modelspec.*`:
    https://github.com/Stability-AI/ModelSpec.

    Args:
        run: Entries that are the same for all files of the run.
        options: Options of the run.
        family_metadata: Metadata entries of the family, such as `architecture`.
        step: Number of the optimizer step.
        epoch: The current or just finished epoch, from 1.
        now: Time of saving.
        licence: License of the model, used without --metadata_license.
        tables: Tables of the dataset, which may override the timestep options.
        architecture_suffix: Suffix of the architecture's name for a network.
    """
    values = dict(run)
    if not options.metadata.no_metadata:
        values |= {
            "ss_training_finished_at": str(now.timestamp()),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
        }
    spec = _model_spec(options, family_metadata, now, licence, architecture_suffix)
    all_times = list_timestep_options(options.timesteps, tables)
    if any(times.has_window for times in all_times):
        lowest = min(times.lowest for times in all_times)
        highest = max(times.highest for times in all_times)
        spec["timestep_range"] = f"{lowest},{highest}"
    values |= {f"modelspec.{key}": text for key, text in spec.items() if text is not None}
    return {key: replace_surrogates(text) for key, text in values.items()}


def _model_spec(
    options: TrainingOptions,
    family_metadata: Mapping[str, str],
    now: datetime,
    licence: str | None,
    architecture_suffix: str,
) -> dict[str, str | None]:
    """Return the entries of `modelspec.*` by name; None for entries that the file does not have."""
    # The arguments are those of `file_metadata`.
    metadata = options.metadata
    architecture = metadata.architecture or family_metadata.get("architecture")
    if architecture and options.network is not None:
        architecture = f"{architecture}/{architecture_suffix}"
    resolution = family_metadata.get("resolution", IMAGE_RESOLUTION if options.is_for_images else RESOLUTION)
    if metadata.resolution is not None:
        # The text of --metadata_reso as WIDTHxHEIGHT; a single number means a square
        width, *height = re.findall(r"\d+", metadata.resolution)
        resolution = f"{width}x{height[0] if height else width}"
    return {
        # the versions that other trainers write: of image models 1.0.1, of video models 1.0.0
        "sai_model_spec": "1.0.1" if options.is_for_images else "1.0.0",
        "architecture": architecture,
        "implementation": family_metadata.get("implementation"),
        "title": metadata.title or options.saving.output_name or f"LoRA@{now:%Y-%m-%dT%H:%M:%S}",
        "resolution": resolution,
        "date": now.isoformat(timespec="seconds"),
        "author": metadata.author,
        "description": metadata.description,
        "license": metadata.license or licence,
        "tags": metadata.tags,
        "prediction_type": family_metadata.get("prediction_type"),
        "encoder_layer": family_metadata.get("encoder_layer"),
        "usage_hint": metadata.usage_hint,
        "thumbnail": metadata.thumbnail,
        "merged_from": metadata.merged_from,
        "trigger_phrase": metadata.trigger_phrase,
        "preprocessor": metadata.preprocessor,
        "is_negative_embedding": metadata.is_negative_embedding,
    }


def _training_values(plan: TrainingPlan, optimizer: str, lr_scheduler: str) -> dict[str, Any]:
    """Return the metadata entries (`ss_...`) about the training run: its options, steps and progress."""
    options, progress, steps = plan.options, plan.progress, plan.steps
    loop, times, network = options.loop, options.timesteps, options.network
    network_values = {} if network is None else {"ss_network_dropout": network.network_dropout}
    quantization = options.speed.fp8.quantization
    # `ss_ss_` is not a mistake here: other trainers of video models write the key with this misspelling
    misspelled_values = {} if options.is_for_images else {"ss_ss_session_id": progress.session_id}
    flow_values: dict[str, Any] = {}
    if not plan.family.noise.keeps_variance:  # noise levels of flow models
        flow_values = {
            "ss_weighting_scheme": times.weighting_scheme,
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_guidance_scale": loop.embedded_guidance,
            "ss_sigmoid_scale": times.sigmoid_scale,
            "ss_discrete_flow_shift": times.flow_shift,
        }
    return network_values | {
        "ss_session_id": progress.session_id,
        **misspelled_values,
        "ss_training_started_at": progress.started_at,
        "ss_output_name": options.saving.output_name,
        "ss_learning_rate": options.optimizer.learning_rate,
        "ss_num_train_items": plan.order.num_items,
        "ss_num_batches_per_epoch": steps.num_batches,
        "ss_num_epochs": steps.num_epochs,
        "ss_gradient_checkpointing": loop.gradient_checkpointing,
        "ss_gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "ss_max_train_steps": steps.total_steps,
        "ss_lr_warmup_steps": count_steps(options.lr_schedule.lr_warmup_steps, steps.total_steps),
        "ss_lr_scheduler": lr_scheduler,
        "ss_mixed_precision": options.accelerator.mixed_precision,
        "ss_seed": progress.seed,
        "ss_training_comment": options.metadata.training_comment,
        "ss_optimizer": optimizer,
        "ss_max_grad_norm": options.optimizer.max_grad_norm,
        "ss_fp8_base": options.speed.fp8.fp8_base,
        **({} if quantization is None else {"ss_base_form": quantization.form}),
        "ss_full_fp16": False,
        "ss_full_bf16": options.full_dit is not None and options.full_dit.full_bf16,
        "ss_timestep_sampling": times.timestep_sampling,
        **flow_values,
        "ss_datasets": json.dumps([table.describe() for table in plan.config.datasets], ensure_ascii=False),
    }
