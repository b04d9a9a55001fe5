"""Metadata of saved files: `ss_*` describes the training, `modelspec.*` the file.

All values are text; missing ones are "None".
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from modules.atomic_write import make_storable
from modules.contract.rules import ModelRelease
from networks.loading import TRAINED_FOR
from training.noise_options import L2
from training.options import TrainingOptions
from training.saving.hub import CardFacts, write_card

DEFAULT_RANK = 4
RESOLUTION = "1280x720"  # constant in all files of other tuners of video models
IMAGE_RESOLUTION = "1024x1024"  # likewise, of image models


@dataclass(frozen=True)
class PictureCount:
    """Hold how many pictures of one size a folder has."""

    folder: str
    size: tuple[int, int]  # width, height
    count: int
    repeats: int
    is_reg: bool  # regularisation pictures


@dataclass(frozen=True)
class RunFacts:
    """Hold a run's facts besides its options."""

    session_id: int
    started_at: float  # unix seconds
    seed: int
    num_items: int  # with repeats
    batches_per_epoch: int
    num_epochs: int
    total_steps: int
    warmup_steps: int
    optimizer: str  # as `make_optimizer` names it
    lr_scheduler: str
    network_module: str
    datasets: Sequence[Mapping[str, Any]]  # `DatasetTable.describe()` of each
    num_validation: int = 0  # items that are not trained on
    pictures: Sequence[PictureCount] = ()  # of image trainers
    changes: Sequence[str] = ()  # what --resume_changed changed on the way


def run_metadata(
    options: TrainingOptions,
    family_name: str,
    family_metadata: Mapping[str, str],
    facts: RunFacts,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, str]:
    """The `ss_*` entries that stay the same over the run; with --no_metadata only keys for loading.

    family_name, family_metadata: `Family.name` and `.metadata` (architecture, implementation, sd_model_name,
    vae_name; base_model_version where files name the model otherwise than we; trained_for where a model has
    several uses that its files do not tell apart). own: the family's options that resume compares. A whole
    DiT has no `ss_network_*`, by which a LoRA is known.
    """
    network = options.network
    version = family_metadata.get("base_model_version", family_name)
    values: dict[str, Any] = {"ss_base_model_version": version}
    if network is not None:
        values |= {
            "ss_network_module": facts.network_module,
            "ss_network_dim": "Dynamic" if network.dim_from_weights else network.network_dim or DEFAULT_RANK,
            "ss_network_alpha": "Dynamic" if network.dim_from_weights else network.network_alpha,
            "ss_network_args": json.dumps(network.arguments(), ensure_ascii=False),
        }
    if not options.metadata.no_metadata:
        values |= {f"ss_{name}": value for name, value in own.items()}
        values |= _training_values(options, facts)
        if options.loss != L2 or options.is_for_images:
            values |= {f"ss_{name}": value for name, value in asdict(options.loss).items()}
        values |= _image_values(options, facts, family_metadata.get("model_type"))
        if facts.changes:
            values["ss_resume_changes"] = json.dumps(list(facts.changes), ensure_ascii=False)
        further = [name for name in family_metadata if name.startswith("sd_model_name_")]
        values |= {
            f"ss_{name}": family_metadata.get(name) for name in ("sd_model_name", *further, "vae_name")
        }
        if "trained_for" in family_metadata:
            values[TRAINED_FOR] = family_metadata["trained_for"]
    return {key: str(value) for key, value in values.items()}


def file_metadata(
    run: Mapping[str, str],
    options: TrainingOptions,
    family_metadata: Mapping[str, str],
    step: int,
    epoch: int,
    now: datetime,
    licence: str | None = None,
) -> dict[str, str]:
    """Return the metadata of a file saved now: that of the run, its progress, and `modelspec.*`.

    epoch: the current or just finished one, from 1. licence: of the model, used without --metadata_license.
    Hashes of a LoRA are added when its tensors are written.
    """
    values = dict(run)
    if not options.metadata.no_metadata:
        values |= {
            "ss_training_finished_at": str(now.timestamp()),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
        }
    values |= _modelspec(options, family_metadata, now, licence)
    return {key: make_storable(text) for key, text in values.items()}


def model_card(
    options: TrainingOptions,
    release: ModelRelease,
    metadata: Mapping[str, str],
    prompts: Sequence[str] = (),
) -> str | None:
    """Return the card for the repository that files are uploaded to, or None without one.

    metadata: of the trained file. prompts: of the samples.
    """
    if options.hub.huggingface_repo_id is None:
        return None
    name = options.saving.output_name or ""
    shown = [prompt for prompt in prompts if prompt]
    return write_card(CardFacts(name, options.network is not None, release, metadata, shown))


def _training_values(options: TrainingOptions, facts: RunFacts) -> dict[str, Any]:
    loop, times, network = options.loop, options.timesteps, options.network
    dropout = {} if network is None else {"ss_network_dropout": network.network_dropout}
    # sic: files of other tuners of video models have this misspelling too
    twice = {} if options.is_for_images else {"ss_ss_session_id": facts.session_id}
    return dropout | {
        "ss_session_id": facts.session_id,
        **twice,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": options.saving.output_name,
        "ss_learning_rate": options.optimizer.learning_rate,
        "ss_num_train_items": facts.num_items,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_gradient_checkpointing": loop.gradient_checkpointing,
        "ss_gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "ss_max_train_steps": facts.total_steps,
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_mixed_precision": options.accelerator.mixed_precision,
        "ss_seed": facts.seed,
        "ss_training_comment": options.metadata.training_comment,
        "ss_optimizer": facts.optimizer,
        "ss_max_grad_norm": options.optimizer.max_grad_norm,
        "ss_fp8_base": options.speed.fp8.fp8_base,
        "ss_full_fp16": False,
        "ss_full_bf16": options.whole_dit is not None and options.whole_dit.full_bf16,
        "ss_weighting_scheme": times.weighting_scheme,
        "ss_logit_mean": times.logit_mean,
        "ss_logit_std": times.logit_std,
        "ss_mode_scale": times.mode_scale,
        "ss_guidance_scale": loop.embedded_guidance,
        "ss_timestep_sampling": times.timestep_sampling,
        "ss_sigmoid_scale": times.sigmoid_scale,
        "ss_discrete_flow_shift": times.flow_shift,
        "ss_datasets": json.dumps(list(facts.datasets), ensure_ascii=False),
    }


def _image_values(options: TrainingOptions, facts: RunFacts, model_type: str | None) -> dict[str, Any]:
    """The entries that files of image trainers have besides; none for others. model_type: the family's."""
    values: dict[str, Any] = {}
    if options.noise.ip_noise_gamma:
        values |= asdict(options.noise)
    if options.parts is None or options.prediction is None:
        return {f"ss_{name}": value for name, value in values.items()}
    parts, asked = options.parts, options.validation
    rates = parts.text_encoder_lr
    values |= {
        "ip_noise_gamma": options.noise.ip_noise_gamma,
        "ip_noise_gamma_random_strength": options.noise.ip_noise_gamma_random_strength,
        "model_prediction_type": options.prediction.model_prediction_type,
        "fp8_base_unet": options.speed.fp8.fp8_base,  # text encoders have an option of their own
        "unet_lr": options.optimizer.learning_rate if parts.unet_lr is None else parts.unet_lr,
        "text_encoder_lr": None if rates is None else rates[0] if len(rates) == 1 else list(rates),
        "validation_split": asked.validation_split,
        "validation_seed": asked.validation_seed,
        "max_validation_steps": asked.max_validation_steps,
        "validate_every_n_epochs": asked.validate_every_n_epochs,
        "validate_every_n_steps": asked.validate_every_n_steps,
        "num_validation_images": facts.num_validation,
        **({} if model_type is None else {"model_type": model_type}),
        **_count_pictures(facts.pictures),
    }
    if options.subset is not None:
        values |= {
            "resize_interpolation": options.subset.resize_interpolation,
            "prior_loss_weight": options.subset.prior_loss_weight,
        }
    return {f"ss_{name}": value for name, value in values.items()}


def _count_pictures(pictures: Sequence[PictureCount]) -> dict[str, Any]:
    """Return how many pictures there are: with their repeats, by size and by folder."""
    folders: dict[str, dict[str, int]] = {}
    buckets: dict[tuple[int, int], int] = {}
    for each in pictures:
        folder = folders.setdefault(each.folder, {"n_repeats": each.repeats, "img_count": 0})
        folder["img_count"] += each.count
        buckets[each.size] = buckets.get(each.size, 0) + each.count * each.repeats
    rows = {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(buckets.items()))
    }
    reg = sum(each.count * each.repeats for each in pictures if each.is_reg)
    return {
        "num_train_images": sum(each.count * each.repeats for each in pictures) - reg,
        "num_reg_images": reg,
        "dataset_dirs": json.dumps(folders, ensure_ascii=False),
        "bucket_info": json.dumps({"buckets": rows}),
    }


def _resolution(given: str | None, usual: str) -> str:
    """Return the value of --metadata_reso as "832x480"; "1024" is a square. usual: if it says nothing."""
    if given is None:
        return usual
    width, *height = re.findall(r"\d+", given)
    return f"{width}x{height[0] if height else width}"


def _modelspec(
    options: TrainingOptions, family_metadata: Mapping[str, str], now: datetime, licence: str | None
) -> dict[str, str]:
    """Source: https://github.com/Stability-AI/ModelSpec."""
    given, times = options.metadata, options.timesteps
    architecture = given.architecture or family_metadata.get("architecture")
    values = {
        # as the known trainers of each kind write it
        "sai_model_spec": "1.0.1" if options.is_for_images else "1.0.0",
        "architecture": f"{architecture}/lora"
        if architecture and options.network is not None
        else architecture,
        "implementation": family_metadata.get("implementation"),
        "title": given.title or options.saving.output_name or f"LoRA@{now:%Y-%m-%dT%H:%M:%S}",
        "resolution": _resolution(
            given.resolution, IMAGE_RESOLUTION if options.is_for_images else RESOLUTION
        ),
        "date": now.isoformat(timespec="seconds"),
        "author": given.author,
        "description": given.description,
        "license": given.license or licence,
        "tags": given.tags,
        "prediction_type": family_metadata.get("prediction_type"),
        "usage_hint": given.usage_hint,
        "thumbnail": given.thumbnail,
        "merged_from": given.merged_from,
        "trigger_phrase": given.trigger_phrase,
        "preprocessor": given.preprocessor,
        "is_negative_embedding": given.is_negative_embedding,
    }
    if times.min_timestep is not None or times.max_timestep is not None:
        values["timestep_range"] = f"{times.lowest},{times.highest}"
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}
