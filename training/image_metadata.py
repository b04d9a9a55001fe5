"""Metadata entries of image trainers, which tag browsers and model managers read.

Names and types are those in the files of other image trainers.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.batches.items import TrainingItem
from dataset.cache_files import parse_latent_name
from dataset.forms.composing import get_source_format
from dataset.sources.media_source import MediaSource
from dataset.table import DatasetTable
from modules.errors import DatasetError
from training.learning_options import PartsOptions
from training.noise_options import PredictionOptions
from training.plan import TrainingPlan

MAX_TAGS = 5000  # tags of a folder; about 100 kB of a file's header

Tags = Mapping[str, Mapping[str, int]]  # folder -> tag -> number of captions with the tag


def image_trainer_metadata(plan: TrainingPlan, prediction: PredictionOptions) -> dict[str, Any]:
    """Return the additional `ss_*` entries that trainers of image models write into a LoRA's metadata."""
    # The options of a run under the names that sd-scripts records
    options, validation = plan.options, plan.options.validation
    network, caching = options.network, options.caching
    values = {
        "fp8_base_unet": options.speed.fp8.fp8_base,  # text encoders have an option of their own
        **_list_rates(options.optimizer.learning_rate, options.lora_parts),
        "cache_latents": caching is not None and caching.caches_latents,
        "lowram": False,  # weights are always read in pieces
        "scale_weight_norms": None if network is None else network.scale_weight_norms,
        "validation_split": validation.validation_split,
        "validation_seed": validation.validation_seed,
        "max_validation_steps": validation.max_validation_steps,
        "validate_every_n_epochs": validation.validate_every_n_epochs,
        "validate_every_n_steps": validation.validate_every_n_steps,
        "num_validation_images": len(plan.validation),
    }
    model_type = plan.family.metadata.get("model_type")
    if model_type is not None:
        values["model_type"] = model_type
    values |= _list_data_values(plan)
    if not plan.family.noise.keeps_variance:
        values["model_prediction_type"] = prediction.model_prediction_type
    batch_size = values["batch_size_per_device"]  # from `_common_settings`; None if the tables differ in it
    if batch_size is not None:
        batch_size *= plan.steps.data_parallel_size * plan.steps.accumulation_steps
    values["total_batch_size"] = batch_size
    subset = plan.options.subset
    if subset is not None:
        values["resize_interpolation"] = subset.resize_interpolation
        values["prior_loss_weight"] = subset.prior_loss_weight
    return {f"ss_{name}": value for name, value in values.items()}


def _list_data_values(plan: TrainingPlan) -> dict[str, Any]:
    """Return what sd-scripts records about the images: counts, settings of their tables, and tags."""
    items = plan.training
    indices = {item.table.index for item in items}
    tables = [table for table in plan.config.datasets if table.index in indices]
    tags = count_tags(items)
    # The settings of all dataset tables by name; None for a setting that differs between tables
    settings = [_list_recorded_settings(table) for table in tables]
    names = settings[0] if settings else dict.fromkeys(("batch_size_per_device",))
    values = {}
    for name, value in names.items():
        is_common = all(other[name] == value for other in settings)
        values[name] = value if is_common else None
    return {
        **_make_image_counts(tables, items),
        **values,
        "tag_frequency": _as_json(tags),
        "datasets": _as_json(_describe_datasets(tables, items, tags)),
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _list_rates(rate: float, parts: PartsOptions | None) -> dict[str, Any]:
    """Return the learning rates of a LoRA's parts, under the names that sd-scripts records."""
    if parts is None:
        return {}
    text_rates = parts.text_encoder_lr
    text_encoder_lr: Any = None if text_rates is None else list(text_rates)
    if text_encoder_lr and len(text_encoder_lr) == 1:  # one rate is recorded as a number, not as a list
        text_encoder_lr = text_encoder_lr[0]
    return {
        "unet_lr": rate if parts.unet_lr is None else parts.unet_lr,
        "text_encoder_lr": text_encoder_lr,
    }


# --- captions
# ------------------------------------------------------------------------------------------------------------


def count_tags(items: Iterable[TrainingItem]) -> dict[str, dict[str, int]]:
    """Count the captions with each comma-separated tag, by the name of the items' folder.

    A caption counts once, however often its item is repeated. Tables whose captions are not on this machine,
    because only their caches were copied, are left out. Only the MAX_TAGS most frequent tags of a folder are
    kept, because they are written into a file's header.
    """
    from dataset.listing import find_sources  # other runs read only caches

    tables = {item.table.index: item.table for item in items}
    trained_stems: dict[int, set[str]] = {index: set() for index in tables}
    for item in items:
        trained_stems[item.table.index].add(item.source_stem)
    tags_by_folder: dict[str, Counter[str]] = {}
    counted_files: set[Path] = set()  # a folder may be in datasets of several resolutions
    for index, table in tables.items():
        try:
            sources = find_sources(table, faults=[])
        except DatasetError:
            continue
        tags = tags_by_folder.setdefault(table.source.path.name, Counter())
        for source in sources:
            if source.stem in trained_stems[index] and source.path not in counted_files:
                counted_files.add(source.path)
                tags.update(_list_tags(source))
    return {
        folder: dict(tags.most_common(MAX_TAGS) if len(tags) > MAX_TAGS else tags)
        for folder, tags in tags_by_folder.items()
    }


def _list_tags(source: MediaSource) -> Iterator[str]:
    """Yield each tag of each caption of an image, in lower case."""
    for caption in filter(None, [source.caption, *source.more_captions]):
        for part in caption.split(","):
            tag = part.strip().lower()
            if tag:
                yield tag


# --- images
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageCounts:
    """Numbers of images in dataset tables; repeats are counted, except in `num_by_table`."""

    num_by_table: Mapping[int, int]  # number of images by the table's index
    num_learned: int
    num_regularization: int
    bucket_info: dict[str, Any]


def _count_images(items: Iterable[TrainingItem]) -> _ImageCounts:
    """Count images by table, and repeated images by bucket, as trainers record them in `ss_bucket_info`."""
    num_by_table: Counter[int] = Counter()
    buckets: Counter[tuple[int, int]] = Counter()
    num_learned = num_regularization = 0
    aspect_errors: list[float] = []  # between the aspect ratios of bucket and image
    for item in items:
        table = item.table
        width, height = item.bucket[:2]
        num_by_table[table.index] += 1
        buckets[width, height] += table.learning.num_repeats
        if table.learning.is_reg:
            num_regularization += table.learning.num_repeats
        else:
            num_learned += table.learning.num_repeats
        parsed = parse_latent_name(item.file_name, item.cache_info.tag, "image")
        if parsed is not None:
            image_width, image_height = parsed.size
            aspect_errors.append(abs(width / height - image_width / image_height))
    bucket_info = _describe_buckets(buckets)
    if aspect_errors:
        bucket_info["mean_img_ar_error"] = sum(aspect_errors) / len(aspect_errors)
    return _ImageCounts(num_by_table, num_learned, num_regularization, bucket_info)


def _describe_buckets(buckets: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    """Return the entry `buckets` of `ss_bucket_info`: size and number of images, by a number as text."""
    numbered_buckets: dict[str, dict[str, Any]] = {}
    for number, size in enumerate(sorted(buckets)):
        numbered_buckets[str(number)] = {"resolution": list(size), "count": buckets[size]}
    return {"buckets": numbered_buckets}


def _make_image_counts(tables: Sequence[DatasetTable], items: Sequence[TrainingItem]) -> dict[str, Any]:
    """Return the metadata entries with image counts: in total, by folder, and by bucket."""
    image_counts = _count_images(items)
    folders: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
    for table in tables:
        folder_entries = folders[table.learning.is_reg]
        info = {"n_repeats": table.learning.num_repeats, "img_count": image_counts.num_by_table[table.index]}
        # `name`, with a number appended if it is already taken: several datasets may share a folder
        number = 1
        free = table.source.path.name
        while free in folder_entries:
            number += 1
            free = f"{table.source.path.name} ({number})"
        folder_entries[free] = info
    return {
        "num_train_images": image_counts.num_learned,
        "num_reg_images": image_counts.num_regularization,
        "dataset_dirs": _as_json(folders[False]),
        "reg_dataset_dirs": _as_json(folders[True]),
        "bucket_info": _as_json(image_counts.bucket_info),
    }


# --- settings of datasets
# ------------------------------------------------------------------------------------------------------------


def _list_recorded_settings(table: DatasetTable) -> dict[str, Any]:
    """Return the settings of a dataset table, keyed by the option names that known trainers record."""
    changes, augmentation = table.captions.changes, table.buckets.augmentation
    buckets = (
        table.buckets.rule if table.buckets.enable_bucket else None
    )  # None: no sizes of buckets are recorded
    return {
        "batch_size_per_device": table.learning.batch_size,
        "resolution": tuple(table.buckets.resolution),
        "enable_bucket": table.buckets.enable_bucket,
        "bucket_no_upscale": table.buckets.bucket_no_upscale,
        "min_bucket_reso": None if buckets is None else buckets.minimum,
        "max_bucket_reso": None if buckets is None else buckets.maximum,
        "color_aug": augmentation.color,
        "flip_aug": augmentation.flip,
        "random_crop": augmentation.random_crop,
        "face_crop_aug_range": augmentation.face_crop_range,
        "shuffle_caption": changes.shuffle,
        "keep_tokens": changes.keep_tokens,
        "caption_dropout_rate": table.captions.caption_dropout_rate,
        "caption_dropout_every_n_epochs": changes.dropout_every_n_epochs,
        "caption_tag_dropout_rate": changes.part_dropout_rate,
    }


def _describe_datasets(
    tables: Sequence[DatasetTable], items: Sequence[TrainingItem], tags: Tags
) -> list[dict[str, Any]]:
    """Return the metadata entry `ss_datasets`: one dictionary per dataset, with one per subset in it."""
    tables_by_dataset: dict[int, list[DatasetTable]] = {}
    for table in tables:
        tables_by_dataset.setdefault(table.batch_group, []).append(table)
    items_by_dataset: dict[int, list[TrainingItem]] = {}
    for item in items:
        items_by_dataset.setdefault(item.table.batch_group, []).append(item)
    return [
        _describe_dataset(subsets, _count_images(items_by_dataset[dataset]), tags)
        for dataset, subsets in tables_by_dataset.items()
    ]


def _describe_dataset(
    tables: Sequence[DatasetTable], image_counts: _ImageCounts, tags: Tags
) -> dict[str, Any]:
    """Return the entry of one dataset in `ss_datasets`."""
    # Settings that all subsets share are entries of the dataset.
    descriptions = [table.describe() for table in tables]
    settings = _list_recorded_settings(tables[0])
    buckets = tables[0].buckets.rule
    folders = sorted({table.source.path.name for table in tables})
    # The entries that all descriptions share
    first, *others = descriptions
    return (
        {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    ) | {
        "is_dreambooth": not any(get_source_format(table).metadata_key for table in tables),
        "num_train_images": image_counts.num_learned,
        "num_reg_images": image_counts.num_regularization,
        "resolution": list(tables[0].buckets.resolution),
        "batch_size_per_device": settings["batch_size_per_device"],
        "enable_bucket": settings["enable_bucket"],
        "min_bucket_reso": settings["min_bucket_reso"],
        "max_bucket_reso": settings["max_bucket_reso"],
        "tag_frequency": {folder: tags[folder] for folder in folders if folder in tags},
        "bucket_info": image_counts.bucket_info,
        "resize_interpolation": None if buckets is None else buckets.interpolation,
        "has_control": all(description["has_control"] for description in descriptions),
        "subsets": [_describe_subset(table, image_counts.num_by_table[table.index]) for table in tables],
    }


def _describe_subset(table: DatasetTable, num_images: int) -> dict[str, Any]:
    """Return the entry of a subset in `ss_datasets`, with the keys that image trainers write."""
    settings, changes = _list_recorded_settings(table), table.captions.changes
    keys = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
    entry: dict[str, Any] = {
        "img_count": num_images,
        "num_repeats": table.learning.num_repeats,
        **{key: settings[key] for key in keys},
        "keep_tokens_separator": changes.keep_tokens_separator or None,
        "secondary_separator": changes.secondary_separator or None,
        "enable_wildcard": changes.wildcards,
        "caption_prefix": table.captions.caption_prefix or None,
        "caption_suffix": table.captions.caption_suffix or None,
        "resize_interpolation": None if table.buckets.rule is None else table.buckets.rule.interpolation,
    }
    if table.source.directory is not None or table.source.image_folder is not None:
        entry["image_dir"] = table.source.base_folder.name
    # a subset is recorded either by its metadata file or, for a folder, by class tokens
    name = get_source_format(table).metadata_key
    if name:
        entry[name] = table.source.path.name
    else:
        entry |= {"class_tokens": table.captions.class_tokens, "is_reg": table.learning.is_reg}
    return {**table.learning_keys, **entry}
