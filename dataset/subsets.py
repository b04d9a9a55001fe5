"""Read the image guides' form of a dataset to tables: `[[datasets.subsets]]`, or folders without a file.

A value is taken from the subset, else its `[[datasets]]`, else `[general]`, else the command line.
Standard library only.
"""

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.config_keys import BAD, read_keys, without_nulls
from dataset.subset_options import ANYWHERE, DATASET, OTHER_NAMES, SAME, SUBSET, SUBSET_KEYS, SubsetOptions
from dataset.table import Augmentation, BucketRule, CaptionChanges, DatasetConfig, DatasetTable, Table
from modules.errors import DatasetError
from modules.text_files import real_path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)  # of a folder: repeats and class


@dataclasses.dataclass(frozen=True)
class FolderName:
    """The name of a folder of pictures as image trainers read it: `10_ohwx man`."""

    repeats: int
    words: str  # the caption of pictures without one; "": none


def read_folder_name(name: str) -> FolderName | None:
    """Return what the name of a folder says to image trainers; None if it says nothing."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) == 0:
        return None
    return FolderName(int(match[1]), match[2])


def read_subsets(
    path: Path, content: Mapping[str, Any], given: SubsetOptions | None, problems: list[str]
) -> tuple[DatasetTable, ...]:
    """Return the tables of a file's subsets, in order. Errors are added to `problems`.

    given: the values of the command line; None: the keys' defaults.
    """
    usual = {name: key.default for name, key in SUBSET_KEYS.items()}
    usual |= read_keys(SUBSET_KEYS, _given_values(given), "the command line", problems, {}, OTHER_NAMES)
    general = without_nulls(content.get("general"), "[general]", problems)
    entries = content.get("datasets")
    if not isinstance(entries, list):
        problems.append(
            "[datasets] needs two pairs of brackets: write [[datasets]], once for each resolution"
        )
        entries = [entries]
    tables: list[DatasetTable] = []
    unused = (
        {} if given is None else dict(typed_options(given))
    )  # keys that no subset takes from the command line
    from_options = {name: usual[name] for name in unused}
    usual |= _read_level(general, "[general]", problems, DATASET)
    for number, entry in enumerate(entries):
        place = f"[[datasets]] {number + 1}"
        dataset = without_nulls(entry, place, problems)
        subsets = dataset.get("subsets")
        shared = usual | _read_level(dataset, place, problems, DATASET, ("subsets",))
        if not isinstance(subsets, list) or not subsets:
            problems.append(
                f"{place}: [datasets.subsets] needs two pairs of brackets: write [[datasets.subsets]]"
                if isinstance(subsets, dict)
                else f"{place} has no [[datasets.subsets]]; each folder of pictures needs one"
            )
            continue
        for order, subset in enumerate(subsets):
            where = f"{place}, subset {order + 1}"
            inner = without_nulls(subset, where, problems)
            values = shared | _read_level(inner, where, problems, SUBSET)
            if any(value is BAD for value in values.values()):
                continue
            unused = {name: option for name, option in unused.items() if values[name] != from_options[name]}
            is_masked = given is not None and given.masked_loss
            found = _contradictions(values, is_masked)
            problems += [f"{where}: {line}" for line in found]
            if not found:
                fields = _table_fields(values, where, is_masked)
                numbers: dict[str, Any] = {"group": number, "subset": order}
                tables.append(DatasetTable(path, len(tables), "image", **numbers, **fields))
    for option in unused.values() if tables else ():
        logger.warning("%s is ignored because %s gives another value everywhere", option, path)
    return _with_cache_directories(tables)


def typed_options(given: SubsetOptions) -> dict[str, str]:
    """Return the options that have another value than their default, by the keys that they stand for."""
    usual, values = _given_values(SubsetOptions.usual()), _given_values(given)
    keys = {name: key.option or name for name, key in SUBSET_KEYS.items()}
    return {
        name: f"--{keys[name]}" for name, value in values.items() if name in keys and value != usual.get(name)
    }


def _given_values(given: SubsetOptions | None) -> dict[str, Any]:
    """Return the command line's values of keys, in the form of a dataset file."""
    if given is None:
        return {}
    options = {one.name: getattr(given, one.name) for one in dataclasses.fields(given)}
    names = {name: name if key.option is None else key.option for name, key in SUBSET_KEYS.items()}
    names |= {other: other for other in OTHER_NAMES}
    found = {name: options.get(option) for name, option in names.items()}
    found["resolution"] = None if given.size is None else list(given.size)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in found.items()
        if value is not None
    }


def _read_level(
    table: Table, where: str, problems: list[str], level: str, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read the keys of one table. level: SUBSET, or DATASET for the others."""
    there = "[[datasets]] or [general]" if level == SUBSET else "[[datasets.subsets]]"
    misplaced = {
        name: f"is for {there}; move it there"
        for name, key in SUBSET_KEYS.items()
        if key.place not in (level, ANYWHERE)
    }
    return read_keys(SUBSET_KEYS, table, where, problems, misplaced, OTHER_NAMES, more)


def _table_fields(values: Table, where: str, is_masked: bool) -> dict[str, Any]:
    """Return the fields of a table by the keys of a subset."""
    if values["cache_info"]:
        logger.info("cache_info is not needed: sizes and captions are kept with the caches")
    parts: dict[str, dict[str, Any]] = {"changes": {}, "augmentation": {}, "buckets": {}, "": {}}
    for name, key in SUBSET_KEYS.items():
        record, _, inner = key.field.rpartition(".")
        if key.field:
            parts[record][name if inner == SAME else inner] = values[name]
    fields, sizes = parts[""], BucketRule(**parts["buckets"])
    # sides of buckets are multiples of the step
    step, low, high = sizes.step, sizes.minimum, sizes.maximum
    used = max(step, low // step * step), -(-high // step) * step
    if values["enable_bucket"] and not values["bucket_no_upscale"] and used != (low, high):
        logger.warning(
            "%s: sides of buckets run from %d to %d, multiples of bucket_reso_steps = %d", where, *used, step
        )
    changes = CaptionChanges(**parts["changes"])
    from_json, conditioning = values["metadata_file"] is not None, values["conditioning_data_dir"]
    return fields | {
        "directory": None if from_json else values["image_dir"],
        "image_folder": values["image_dir"] if from_json else None,
        "control_directory": None if is_masked else conditioning,
        "mask_directory": (conditioning if is_masked else None) or values["mask_directory"],
        "bucket_no_upscale": values["bucket_no_upscale"] and values["enable_bucket"],
        "prior_loss_weight": values["prior_loss_weight"] if values["is_reg"] else 1.0,
        "buckets": BucketRule(*used, step, sizes.interpolation),
        "changes": dataclasses.replace(changes, is_raw=bool(changes.varying_keys)),
        "augmentation": Augmentation(**parts["augmentation"]),
        "preserves_output": bool(values["custom_attributes"].get("diff_output_preservation", False)),
    }


def _contradictions(values: Table, is_masked: bool) -> list[str]:
    """Return a line for each missing key of a subset, and for keys that conflict."""
    problems = []
    conditioning, masks = values["conditioning_data_dir"], values["mask_directory"]
    from_json = values["metadata_file"] is not None
    if values["image_dir"] is None and not from_json:
        problems.append(
            "image_dir, the folder of its pictures, is missing (or metadata_file, a JSON that names them)"
        )
    size, low, high = values["resolution"], values["min_bucket_reso"], values["max_bucket_reso"]
    if size is None:
        problems.append(
            "resolution is missing in its [[datasets]], such as 1024 (training also takes --resolution)"
        )
    elif values["enable_bucket"] and not values["bucket_no_upscale"]:
        if min(size) < low:
            found = f"min_bucket_reso = {low} is above the resolution {_sides(size)}"
            problems.append(f"{found}; set at most {min(size)}")
        if max(size) > high:
            found = f"max_bucket_reso = {high} is below the resolution {_sides(size)}"
            problems.append(f"{found}; set at least {max(size)}")
    sources = {
        "alpha_mask": values["alpha_mask"],
        "mask_directory": masks is not None,
        "conditioning_data_dir with --masked_loss": is_masked and conditioning is not None,
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) > 1:
        problems.append(
            f"{' and '.join(given)}: both say where the masks of the loss are from; leave out one"
        )
    elif from_json and (conditioning or masks):
        problems.append(
            "conditioning_data_dir and mask_directory cannot be used with metadata_file; use image_dir"
        )
    return problems


def refuse_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if there are `keys`, with which the items to cache change each time."""
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Leave out the keys, or train without caching these."
        )


def _with_cache_directories(tables: list[DatasetTable]) -> tuple[DatasetTable, ...]:
    """Give each table without a cache_directory its own folder: `1024x768` beside its pictures.

    Several datasets may have one folder of pictures; if their resolutions are equal too, the later one gets
    `1024x768_2`. npz files, which hold many resolutions, are beside the pictures.
    """
    used: Counter[tuple[str, str]] = Counter()
    found = []
    for table in tables:
        folder = table.picture_folder
        if table.cache_directory is None and table.cache_format == "npz":
            table = dataclasses.replace(table, cache_directory=folder)
        elif table.cache_directory is None:
            name = _sides(table.resolution)
            key = (os.path.normcase(real_path(folder)), name)
            used[key] += 1
            name += f"_{used[key]}" if used[key] > 1 else ""
            table = dataclasses.replace(table, cache_directory=folder / name)
        found.append(table)
    return tuple(found)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- folders without a file
# ------------------------------------------------------------------------------------------------------------


def folders_config(given: SubsetOptions) -> DatasetConfig:
    """Return the dataset that --train_data_dir and its companions describe: one group of tables.

    Raises DatasetError if there is no folder to train on, or with all values that are not allowed.
    """
    folder = given.train_data_dir
    assert folder is not None  # `given.replaces_toml`
    if given.in_json is not None:
        subsets: list[dict[str, Any]] = [
            {
                "image_dir": str(folder),
                "metadata_file": str(given.in_json),
                "num_repeats": given.dataset_repeats,
            }
        ]
    else:
        subsets = _subsets(folder, "--train_data_dir", is_reg=False)
        if given.reg_data_dir is not None:
            subsets += _subsets(given.reg_data_dir, "--reg_data_dir", is_reg=True)
    problems: list[str] = []
    tables = read_subsets(folder, {"datasets": [{"subsets": subsets}]}, given, problems)
    if problems:
        raise DatasetError("\n  ".join([f"{folder} cannot be used:", *problems]))
    return DatasetConfig(folder, tables)


def _subsets(folder: Path, option: str, is_reg: bool) -> list[dict[str, Any]]:
    """Return a subset for each folder whose name begins with a number of repeats; warn about the others."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(one.name for one in entries if one.is_dir() and not one.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{option} {folder}: {error.strerror}. Correct the path.") from error
    found = []
    for name in names:
        meaning = read_folder_name(name)
        if meaning is None:
            match = _NAME.fullmatch(name)
            logger.warning(
                "%s: %s is left out because its name does not begin with a number of repeats, such as 10_%s",
                option,
                folder / name,
                match[2] if match else name,
            )
            continue
        subset: dict[str, Any] = {"image_dir": str(folder / name)}
        subset |= {"num_repeats": meaning.repeats, "class_tokens": meaning.words}
        found.append({**subset, "is_reg": is_reg})
    if not found:
        raise DatasetError(
            f"{option} {folder} has no folder whose name begins with a number of repeats, such as 10_cat. "
            "Move the pictures into one."
        )
    return found
