"""Read datasets in the layout of sd-scripts: `[[datasets.subsets]]`, or folders without a file.

A value is taken from the subset, else its `[[datasets]]`, else `[general]`, else the command line.
Standard library only.
"""

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.config_keys import INVALID, read_keys, without_nulls
from dataset.forms.composing import SHARED_CACHES
from dataset.forms.metadata import MetadataKeys
from dataset.idle_keys import warn_idle
from dataset.subset_options import ANYWHERE, DATASET, OTHER_NAMES, SAME, SUBSET, SUBSET_KEYS, SubsetOptions
from dataset.table import Augmentation, BucketRule, CaptionChanges, DatasetConfig, DatasetTable, Table
from dataset.timestep_keys import find_window_error
from modules.errors import DatasetError
from modules.integers import round_up
from modules.option_values import format_shape
from modules.text_files import real_path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)  # name of a folder: repeats and class
_TABLE_ITSELF = ""  # in `_fields_by_record`, next to the names of the table's records


@dataclasses.dataclass(frozen=True)
class FolderName:
    """The parts of an image folder's name, as in sd-scripts: repeats and class words, `10_ohwx man`."""

    repeats: int
    class_tokens: str  # caption of images without a caption file; "": none


def read_folder_name(name: str) -> FolderName | None:
    """Return the repeats and class words in a folder name; None if it does not begin with repeats."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) == 0:
        return None
    return FolderName(int(match[1]), match[2])


def read_subsets(
    path: Path, content: Mapping[str, Any], typed: SubsetOptions | None, errors: list[str]
) -> tuple[DatasetTable, ...]:
    """Return one table for each subset of a dataset file in the layout of sd-scripts, in order.

    1. Read the values of the command line and of [general], which all subsets share.
    2. Make a table of each subset without errors.
    3. Warn about keys and options without effect.

    The value of a key comes from the subset, its [[datasets]] table, [general], the command line or the
    default, whichever has it first.

    Args:
        path: Path of the dataset file.
        content: Its parsed content.
        typed: Values from the command line; None means the keys' defaults.
        errors: Errors are added to this list.
    """
    command_line_values = _read_command_line(typed, errors)
    general = without_nulls(content.get("general"), "[general]", errors)
    entries = content.get("datasets")
    if not isinstance(entries, list):
        errors.append("[datasets] needs double brackets: write [[datasets]], once for each resolution")
        entries = [entries]
    defaults = {**command_line_values, **_read_level(general, "[general]", errors, DATASET)}
    is_masked = typed is not None and typed.masked_loss
    tables: list[DatasetTable] = []
    all_values: list[Table] = []  # values of each subset without invalid keys
    for group, entry in enumerate(entries):
        for subset in _read_subsets(entry, group, defaults, errors):
            if INVALID in subset.values.values():  # the error is already in `errors`
                continue
            all_values.append(subset.values)
            contradictions = _find_contradictions(subset.values, is_masked)
            errors += [f"{subset.label}: {line}" for line in contradictions]
            if not contradictions:
                fields = _table_fields(subset.values, subset.label, is_masked)
                table = DatasetTable(path, len(tables), "image", group=group, subset=subset.number)
                tables.append(table.with_values(**fields))
    if tables:
        warn_idle(path, content, tables)
        if typed is not None:
            for name, option in typed_options(typed).items():
                if all(values[name] != command_line_values[name] for values in all_values):
                    logger.warning("%s is ignored because %s sets another value everywhere", option, path)
    return _with_cache_directories(tables)


def _read_command_line(typed: SubsetOptions | None, errors: list[str]) -> dict[str, Any]:
    """Return the values of all keys of subsets: those of the command line, otherwise the defaults."""
    defaults = {name: key.default for name, key in SUBSET_KEYS.items()}
    return defaults | read_keys(
        SUBSET_KEYS,
        _read_option_values(typed),
        table_label="the command line",
        errors=errors,
        misplaced_reasons={},
        other_spellings=OTHER_NAMES,
    )


@dataclasses.dataclass(frozen=True)
class _Subset:
    """The values of all keys of one dataset subset."""

    number: int  # index in its [[datasets]], from 0
    label: str  # [[datasets]] and subset, for messages
    values: Table


def _read_subsets(entry: Any, group: int, defaults: Table, errors: list[str]) -> Iterator[_Subset]:
    """Yield the subsets of [[datasets]] table number `group`; `defaults` supplies missing keys."""
    dataset_label = f"[[datasets]] {group + 1}"
    dataset = without_nulls(entry, dataset_label, errors)
    subsets = dataset.get("subsets")
    inherited_values = {
        **defaults,
        **_read_level(dataset, dataset_label, errors, DATASET, ignored=("subsets",)),
    }
    if isinstance(subsets, dict):
        errors.append(
            f"{dataset_label}: [datasets.subsets] needs double brackets: write [[datasets.subsets]]"
        )
    elif not isinstance(subsets, list) or not subsets:
        errors.append(f"{dataset_label} has no [[datasets.subsets]]; each folder of images needs one")
    else:
        for number, subset in enumerate(subsets):
            table_label = f"{dataset_label}, subset {number + 1}"
            declared = without_nulls(subset, table_label, errors)
            values = {**inherited_values, **_read_level(declared, table_label, errors, SUBSET)}
            yield _Subset(number, table_label, values)


def typed_options(typed: SubsetOptions) -> dict[str, str]:
    """Return the options that were changed from their defaults: key to option name, such as `--flip_aug`."""
    defaults = _read_option_values(SubsetOptions.from_defaults())
    options = {}
    for name, value in _read_option_values(typed).items():
        if name in SUBSET_KEYS and value != defaults.get(name):
            options[name] = f"--{SUBSET_KEYS[name].option or name}"
    return options


def _read_option_values(typed: SubsetOptions | None) -> dict[str, Any]:
    """Return the values of command-line options by dataset key, in the types that dataset files have."""
    if typed is None:
        return {}
    by_option = {option.name: getattr(typed, option.name) for option in dataclasses.fields(typed)}
    by_key = {}
    for name, key in SUBSET_KEYS.items():
        option_name = name if key.option is None else key.option  # "": the key has no option
        by_key[name] = by_option.get(option_name)
    by_key |= {name: by_option.get(name) for name in OTHER_NAMES}
    by_key["resolution"] = None if typed.size is None else list(typed.size)  # the option is a text
    values = {}
    for name, value in by_key.items():
        if value is not None:
            values[name] = str(value) if isinstance(value, Path) else value
    return values


def _read_level(
    table: Table, table_label: str, errors: list[str], level: str, ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read the keys of one table; `level` is SUBSET, or DATASET for [[datasets]] and [general]."""
    other_tables = "[[datasets]] or [general]" if level == SUBSET else "[[datasets.subsets]]"
    misplaced_reasons = {
        name: f"is for {other_tables}; move it there"
        for name, key in SUBSET_KEYS.items()
        if key.level not in (level, ANYWHERE)
    }
    return read_keys(
        SUBSET_KEYS,
        table,
        table_label=table_label,
        errors=errors,
        misplaced_reasons=misplaced_reasons,
        other_spellings=OTHER_NAMES,
        ignored=ignored,
    )


def _table_fields(values: Table, table_label: str, is_masked: bool) -> dict[str, Any]:
    """Return the `DatasetTable` fields for the keys of a subset."""
    if values["cache_info"]:
        logger.info("cache_info is not needed: sizes and captions are stored in the caches")
    by_record = _fields_by_record(values)
    # otherwise the limits of the sizes have no effect, and rounding them needs no warning
    uses_limits = values["enable_bucket"] and not values["bucket_no_upscale"]
    # size limits become multiples of the step
    rule = BucketRule(**by_record["rule"])
    step = rule.step
    minimum = max(step, rule.minimum // step * step)
    maximum = round_up(rule.maximum, step)
    if uses_limits and (minimum, maximum) != (rule.minimum, rule.maximum):
        logger.warning(
            "%s: sides of buckets run from %d to %d, multiples of bucket_reso_steps = %d",
            table_label,
            minimum,
            maximum,
            step,
        )
    changes = CaptionChanges(**by_record["changes"])
    fields = by_record[_TABLE_ITSELF]
    folders = _find_folders(fields.pop("metadata_file"), values, is_masked)
    return (
        fields
        | folders
        | {
            "bucket_no_upscale": values["bucket_no_upscale"] and values["enable_bucket"],
            "prior_loss_weight": values["prior_loss_weight"] if values["is_reg"] else 1.0,
            "rule": BucketRule(minimum, maximum, step, rule.interpolation),
            "changes": dataclasses.replace(changes, varies_per_step=bool(changes.varying_keys)),
            "augmentation": Augmentation(**by_record["augmentation"]),
            "attributes": frozenset(name for name, value in values["custom_attributes"].items() if value),
        }
    )


def _find_folders(metadata_file: Path | None, values: Table, is_masked: bool) -> dict[str, Any]:
    """Return the `DatasetTable` fields with the folders of a subset's images, control images and masks."""
    images = values["image_dir"]
    conditioning = values["conditioning_data_dir"]
    fields: dict[str, Any] = {
        "format_keys": None,
        "directory": images,
        "image_folder": None,
        "control_directory": conditioning,
        "mask_directory": values["mask_directory"],
    }
    if metadata_file is not None:
        fields |= {"format_keys": MetadataKeys(metadata_file), "directory": None, "image_folder": images}
    if is_masked:
        fields |= {"control_directory": None, "mask_directory": conditioning or values["mask_directory"]}
    return fields


def _fields_by_record(values: Table) -> dict[str, dict[str, Any]]:
    """Return a table's values, grouped by the dataclass that has the field."""
    # These are the table's `changes`, `augmentation` and `rule`, and _TABLE_ITSELF.
    by_record: dict[str, dict[str, Any]] = {
        "changes": {},
        "augmentation": {},
        "rule": {},
        _TABLE_ITSELF: {},
    }
    for name, key in SUBSET_KEYS.items():
        if key.field:
            record, _, field_name = key.field.rpartition(".")  # such as `changes.shuffle`
            if field_name == SAME:  # the field has the name of the key
                field_name = name
            by_record[record][field_name] = values[name]
    return by_record


def _find_contradictions(values: Table, is_masked: bool) -> list[str]:
    """Return an error line for each conflict between a subset's keys and for each missing key."""
    errors = []
    from_json = values["metadata_file"] is not None
    if values["image_dir"] is None and not from_json:
        errors.append(
            "image_dir, the folder of its images, is missing (or metadata_file, a JSON file that names them)"
        )
    errors += _size_errors(values)
    window_error = find_window_error(values)
    if window_error is not None:
        errors.append(window_error)
    mask_keys = {
        "alpha_mask": bool(values["alpha_mask"]),
        "mask_directory": values["mask_directory"] is not None,
        "conditioning_data_dir with --masked_loss": is_masked and values["conditioning_data_dir"] is not None,
    }
    mask_sources = [name for name, is_set in mask_keys.items() if is_set]
    if len(mask_sources) > 1:
        names = " and ".join(mask_sources)
        errors.append(f"{names}: both say where the loss masks come from; omit one")
    elif from_json and (values["conditioning_data_dir"] or values["mask_directory"]):
        errors.append(
            "conditioning_data_dir and mask_directory cannot be used with metadata_file; use image_dir"
        )
    return errors


def _size_errors(values: Table) -> list[str]:
    """Return an error line if the resolution is missing, and for each bucket limit that excludes it."""
    size, low, high = values["resolution"], values["min_bucket_reso"], values["max_bucket_reso"]
    if size is None:
        return ["resolution is missing in its [[datasets]], such as 1024 (training also takes --resolution)"]
    errors = []
    # without buckets, or without enlarging, the limits have no effect
    if values["enable_bucket"] and not values["bucket_no_upscale"]:
        if min(size) < low:
            errors.append(
                f"min_bucket_reso = {low} is above the resolution {format_shape(size)}; set at most "
                f"{min(size)}"
            )
        if max(size) > high:
            errors.append(
                f"max_bucket_reso = {high} is below the resolution {format_shape(size)}; set at least "
                f"{max(size)}"
            )
    return errors


def reject_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if keys of a table change items at random, because such items cannot be cached.

    `keys` are these keys. `what` is what they change, "latents" or "texts".
    """
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Omit the keys, or train without caching these."
        )


def _with_cache_directories(tables: list[DatasetTable]) -> tuple[DatasetTable, ...]:
    """Set cache_directory, where it is missing, to the subfolder `1024x768` of the table's image folder."""
    # If several tables have the same image folder and resolution, the second gets `1024x768_2`. Caches shared
    # with other trainers, which have several resolutions, are in the image folder itself.
    num_tables: Counter[tuple[str, str]] = Counter()  # number of tables by image folder and resolution
    completed_tables = []
    for table in tables:
        folder = table.source.base_folder
        if table.cache_directory is None and table.cache_format in SHARED_CACHES:
            table = table.with_values(cache_directory=folder)
        elif table.cache_directory is None:
            name = format_shape(table.buckets.resolution)
            key = (os.path.normcase(real_path(folder)), name)
            num_tables[key] += 1
            if num_tables[key] > 1:
                name += f"_{num_tables[key]}"
            table = table.with_values(cache_directory=folder / name)
        completed_tables.append(table)
    return tuple(completed_tables)


# --- folders without a file
# ------------------------------------------------------------------------------------------------------------


def folders_config(typed: SubsetOptions) -> DatasetConfig:
    """Return the dataset that --train_data_dir and related options describe, without a dataset file.

    Raises:
        DatasetError: If there is no folder to train on, or if values are invalid.
    """
    folder = typed.train_data_dir
    assert folder is not None  # callers check `typed.replaces_toml`, which is true if this option is given
    if typed.in_json is not None:
        subsets: list[dict[str, Any]] = [
            {
                "image_dir": str(folder),
                "metadata_file": str(typed.in_json),
                "num_repeats": typed.dataset_repeats,
            }
        ]
    else:
        subsets = _list_subsets(folder, "--train_data_dir", is_reg=False, known=typed.reg_data_dir)
        if typed.reg_data_dir is not None:
            subsets += _list_subsets(typed.reg_data_dir, "--reg_data_dir", is_reg=True)
    errors: list[str] = []
    tables = read_subsets(folder, {"datasets": [{"subsets": subsets}]}, typed, errors)
    if errors:
        raise DatasetError("\n  ".join([f"{folder} cannot be used:", *errors]))
    return DatasetConfig(folder, tables)


def _list_subsets(folder: Path, option: str, is_reg: bool, known: Path | None = None) -> list[dict[str, Any]]:
    """Return a subset, as a table of a dataset file, for each subfolder with a name such as `10_cat`."""
    # A warning names other subfolders with images. If no subfolder has such a name, the error suggests the
    # folder to give instead.
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise DatasetError(f"{option} {folder}: {error.strerror}. Correct the path.") from error
    subsets = []
    for name in sorted(names):
        parsed = read_folder_name(name)  # such as `10_cat`: repeats and class_tokens
        if parsed is not None:
            subset = {
                "image_dir": str(folder / name),
                "num_repeats": parsed.repeats,
                "class_tokens": parsed.class_tokens,
                "is_reg": is_reg,
            }
            subsets.append(subset)
        elif known is None or real_path(folder / name) != real_path(known):
            _warn_left_out(folder / name, option)
    if not subsets:
        # the message says which folder to give instead
        if read_folder_name(real_path(folder).name) is not None:
            advice = (
                f": pass its parent folder, {folder.parent}. Folders whose names begin with a "
                "number of repeats are read from there."
            )
        else:
            inner = [str(folder / name) for name in sorted(names) if _has_repeats(folder / name)]
            remedy = f"Pass {' or '.join(inner)}." if inner else "Move the images into one."
            advice = f" has no folder whose name begins with a number of repeats, such as 10_cat. {remedy}"
        raise DatasetError(f"{option} {folder}{advice}")
    return subsets


def _warn_left_out(folder: Path, option: str) -> None:
    """Warn about an ignored folder with images, or with subfolders that have names of image folders."""
    if _has_repeats(folder):
        logger.warning(
            "%s: %s is left out because its name does not begin with a number of repeats. If its "
            "subfolders contain regularization images, add --reg_data_dir %s",
            option,
            folder,
            folder,
        )
        return
    from modules.media.reading import IMAGE_SUFFIXES  # loads decoders, which are rarely needed here

    try:
        has_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    except OSError:  # for example, a folder of another user
        has_images = True
    if has_images:
        match = _NAME.fullmatch(folder.name)
        logger.warning(
            "%s: %s is left out because its name does not begin with a number of repeats, such as 10_%s",
            option,
            folder,
            match[2] if match else folder.name,
        )


def _has_repeats(folder: Path) -> bool:
    """Return whether any subfolder's name begins with a number of repeats, such as `10_cat`."""
    try:
        return any(entry.is_dir() and read_folder_name(entry.name) is not None for entry in folder.iterdir())
    except OSError:  # for example, a folder of another user
        return False
