"""Read the image guides' form of a dataset configuration, `[[datasets.subsets]]`, to tables.

A value is that of the subset, else of its `[[datasets]]`, else of `[general]`, else of the command line.
Standard library only.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.config_keys import KEYS, SOURCES
from dataset.key_reading import BAD, read_value, show, unknown, without_nulls
from dataset.subset_keys import DATASET, OTHER_NAMES, SUBSET, SUBSET_KEYS
from dataset.subset_options import SubsetOptions
from dataset.subset_records import Augmentation, BucketRule, CaptionChanges
from dataset.subsets.fallbacks import fallback_values
from dataset.table import CHANGE_KEYS, DRAW_KEYS, DatasetTable, Table

logger = logging.getLogger(__name__)

SUBSETS = "subsets"
COMMAND_LINE = "the command line"


def has_subsets(content: Mapping[str, Any]) -> bool:
    """Return whether a file is in the image guides' form: one of its datasets has subsets."""
    entries = content.get("datasets")
    entries = entries if isinstance(entries, list) else [entries]
    return any(key.startswith("subset") for entry in entries if isinstance(entry, dict) for key in entry)


def read_subsets(
    path: Path, content: Mapping[str, Any], given: SubsetOptions | None, problems: list[str]
) -> tuple[DatasetTable, ...]:
    """Return the tables of a file's subsets, in order. Errors are added to `problems`.

    given: the values of the command line; None: the keys' defaults.
    """
    outer = _KeyLevel(COMMAND_LINE, {} if given is None else fallback_values(given))
    general = _KeyLevel("[general]", without_nulls(content.get("general"), "[general]", problems))
    entries = content.get("datasets")
    if not isinstance(entries, list):
        problems.append(
            "[datasets] needs two pairs of brackets: write [[datasets]], once for each resolution"
        )
        entries = [entries]
    general.check(DATASET, problems)
    tables: list[DatasetTable] = []
    is_masked = given is not None and given.masked_loss
    for number, entry in enumerate(entries):
        place = f"[[datasets]] {number + 1}"
        dataset = _KeyLevel(place, without_nulls(entry, place, problems))
        subsets = dataset.values.get(SUBSETS)
        dataset.check(DATASET, problems)
        if not isinstance(subsets, list) or not subsets:
            is_single = isinstance(subsets, dict)
            problems.append(
                f"{place}: [datasets.subsets] needs two pairs of brackets: write [[datasets.subsets]]"
                if is_single
                else f"{place} has no [[datasets.subsets]]; each folder of pictures needs one"
            )
            continue
        for order, subset in enumerate(subsets):
            where = f"{place}, subset {order + 1}"
            inner = _KeyLevel(where, without_nulls(subset, where, problems))
            inner.check(SUBSET, problems)
            fields = _values([outer, general, dataset, inner], problems)
            maker = _Maker(path, where, number, order, is_masked)
            table = None if fields is None else maker.make(len(tables), fields, problems)
            tables += [] if table is None else [table]
    return _with_cache_directories(tables)


@dataclass(frozen=True)
class _KeyLevel:
    """The keys of one table of a file, or of the command line."""

    where: str  # for messages
    values: Table

    def check(self, kind: str, problems: list[str]) -> None:
        """Report unknown keys, and those that belong elsewhere. kind: SUBSET, or DATASET for the others."""
        elsewhere = DATASET if kind == SUBSET else SUBSET
        allowed = [name for name, key in SUBSET_KEYS.items() if key.place != elsewhere]
        for name, value in self.values.items():
            real = OTHER_NAMES.get(name, name)
            if kind == DATASET and name == SUBSETS and self.where != "[general]":
                continue
            if real not in SUBSET_KEYS:
                inner = [SUBSETS] if kind == DATASET else []
                problems.append(f"{self.where}: {unknown(name, value, [*inner, *allowed])}")
            elif real not in allowed:
                there = "[[datasets]] or [general]" if kind == SUBSET else "[[datasets.subsets]]"
                problems.append(f"{self.where}: {name} = {show(value)} is for {there}; move it there")
            elif real != name and real in self.values:
                problems.append(f"{self.where}: {name} and {real} are the same key; leave out one")
            else:
                read_value(SUBSET_KEYS, real, value, self.where, problems)

    @property
    def known(self) -> dict[str, Any]:
        """Return the values of known keys by their own names."""
        named = {OTHER_NAMES.get(name, name): value for name, value in self.values.items()}
        return {name: value for name, value in named.items() if name in SUBSET_KEYS}


def _values(levels: list[_KeyLevel], problems: list[str]) -> dict[str, Any] | None:
    """Return the value of each key as its field has it; None if one is not allowed.

    Values of the file have been reported; those of the command line are reported here.
    """
    values = {name: key.default for name, key in SUBSET_KEYS.items()}
    for level in levels:
        found: list[str] = []
        for name, value in level.known.items():
            values[name] = read_value(SUBSET_KEYS, name, value, level.where, found)
        if level.where == COMMAND_LINE:
            problems += [line for line in found if line not in problems]
    return None if any(value is BAD for value in values.values()) else values


@dataclass(frozen=True)
class _Maker:
    """Make the table of one subset."""

    path: Path
    where: str
    group: int
    subset: int
    is_masked: bool

    def make(self, index: int, values: dict[str, Any], problems: list[str]) -> DatasetTable | None:
        """Return the table; None, with lines in `problems`, if its values do not go together."""
        found = [
            *_source_problems(values),
            *_size_problems(values),
            *_mask_problems(values, self.is_masked),
        ]
        if found:
            problems += [f"{self.where}: {line}" for line in found]
            return None
        if values["cache_info"]:
            logger.info("cache_info is not needed: sizes and captions are kept with the caches")
        from_json = values["metadata_file"] is not None
        conditioning = values["conditioning_data_dir"]
        usual = {name: key.default for name, key in KEYS.items() if name not in SOURCES}
        own: dict[str, Any] = {
            "directory": None if from_json else values["image_dir"],
            "metadata_file": values["metadata_file"],
            "image_folder": values["image_dir"] if from_json else None,
            **dict.fromkeys(("jsonl_file", "table_file", "tars", "cogvideox_root")),
            "conditioning_directory": conditioning,
            "control_directory": None if self.is_masked else conditioning,
            "mask_directory": (conditioning if self.is_masked else None) or values["mask_directory"],
            "cache_directory": values["cache_directory"],
            "bucket_no_upscale": values["bucket_no_upscale"] and values["enable_bucket"],
            "prior_loss_weight": values["prior_loss_weight"] if values["is_reg"] else 1.0,
            "buckets": _buckets(values, self.where),
            "changes": _changes(values),
            "augmentation": Augmentation(**{name: values[key] for name, key in DRAW_KEYS.items()}),
        }
        same = (
            *("cache_format", "resolution", "caption_extension", "caption_prefix", "caption_suffix"),
            *("caption_dropout_rate", "batch_size", "num_repeats", "enable_bucket", "alpha_mask"),
            *("is_reg", "class_tokens", "custom_attributes", "validation_split", "validation_seed"),
        )
        fields = {**usual, **{name: values[name] for name in same}, **own}
        return DatasetTable(self.path, index, "image", group=self.group, subset=self.subset, **fields)


def _source_problems(values: Table) -> list[str]:
    if values["image_dir"] is None and values["metadata_file"] is None:
        return [
            "image_dir, the folder of its pictures, is missing (or metadata_file, a JSON that names them)"
        ]
    return []


def _size_problems(values: Table) -> list[str]:
    size = values["resolution"]
    if size is None:
        return ["resolution is missing in its [[datasets]], such as 1024 (training also takes --resolution)"]
    if not values["enable_bucket"] or values["bucket_no_upscale"]:
        return []
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    problems = []
    if min(size) < low:
        problems.append(
            f"min_bucket_reso = {low} is above the resolution {_sides(size)}; set at most {min(size)}"
        )
    if max(size) > high:
        problems.append(
            f"max_bucket_reso = {high} is below the resolution {_sides(size)}; set at least {max(size)}"
        )
    return problems


def _mask_problems(values: Table, is_masked: bool) -> list[str]:
    masks = {
        "alpha_mask": values["alpha_mask"],
        "mask_directory": values["mask_directory"] is not None,
        "conditioning_data_dir with --masked_loss": is_masked and values["conditioning_data_dir"] is not None,
    }
    given = [name for name, is_given in masks.items() if is_given]
    if len(given) > 1:
        return [f"{' and '.join(given)}: both say where the masks of the loss are from; leave out one"]
    if values["metadata_file"] is not None and (values["conditioning_data_dir"] or values["mask_directory"]):
        return ["conditioning_data_dir and mask_directory cannot be used with metadata_file; use image_dir"]
    return []


def _buckets(values: Table, where: str) -> BucketRule:
    """Return the rule of the buckets; its sides are multiples of its step."""
    step = values["bucket_reso_steps"]
    low, high = values["min_bucket_reso"], values["max_bucket_reso"]
    used = max(step, low // step * step), -(-high // step) * step
    if values["enable_bucket"] and not values["bucket_no_upscale"] and used != (low, high):
        logger.warning(
            "%s: sides of buckets run from %d to %d, multiples of bucket_reso_steps = %d", where, *used, step
        )
    return BucketRule(*used, step, values["resize_interpolation"])


def _changes(values: Table) -> CaptionChanges:
    changes = CaptionChanges(**{name: values[key] for name, key in CHANGE_KEYS.items()})
    return replace(changes, is_raw=changes.varies)


def _with_cache_directories(tables: list[DatasetTable]) -> tuple[DatasetTable, ...]:
    """Give each table without a cache_directory its own folder: `1024x768` beside its pictures.

    Several datasets may have one folder of pictures; where their resolutions are equal too, the later one
    gets `1024x768_2`. npz files, which hold many resolutions, are beside the pictures.
    """
    used: Counter[tuple[str, str]] = Counter()
    found = []
    for table in tables:
        if table.cache_directory is None:
            folder = table.picture_folder
            if table.cache_format == "npz":
                found.append(replace(table, cache_directory=folder))
                continue
            name = _sides(table.resolution)
            key = (os.path.normcase(folder.resolve()), name)
            used[key] += 1
            name += f"_{used[key]}" if used[key] > 1 else ""
            table = replace(table, cache_directory=folder / name)
        found.append(table)
    return tuple(found)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
