"""Read a dataset configuration, a TOML or JSON file, to frozen tables. Standard library only.

Allowed values of each key are in `dataset/config_keys.py`. Paths are relative to the working folder. All
problems of a file are reported together.
"""

import difflib
import logging
import os
from pathlib import Path
from typing import Any, Literal

from dataset.config_keys import FRAME_KEYS, KEYS, MODES, ONLY_WITH, SOURCES
from dataset.key_reading import BAD, parse_config, read_value, show, unknown, without_nulls
from dataset.subset_options import SubsetOptions
from dataset.subsets.reading import has_subsets, read_subsets
from dataset.table import DatasetConfig, DatasetTable, Table
from modules.errors import DatasetError

__all__ = ["KEYS", "MODES", "DatasetConfig", "DatasetTable", "load_dataset_config"]

logger = logging.getLogger(__name__)

FRAME_STEP = 4  # target_frames are 4n + 1 for every family


def load_dataset_config(path: Path, given: SubsetOptions | None = None) -> DatasetConfig:
    """Read `path` (.toml or .json): our own form, or that of the image guides, which has subsets.

    given: values of the command line, for keys that a file with subsets lacks.

    Source folders are not checked, because training needs only the caches; `find_sources` checks them.
    Raises DatasetError, with file, table, key, the value found and the values allowed.
    """
    problems: list[str] = []
    content = parse_config(path)
    problems += [
        unknown(name, value, ("general", "datasets"))
        for name, value in content.items()
        if name not in _TOP_LEVEL
    ]
    if has_subsets(content):
        return _checked(path, read_subsets(path, content, given, problems), problems)
    general = without_nulls(content.get("general"), "[general]", problems)
    entries = content.get("datasets")
    is_misspelt = entries is None and any("Did you mean datasets?" in problem for problem in problems)
    if isinstance(entries, dict):
        problems.append(
            "[datasets] needs two pairs of brackets: write [[datasets]], once for each folder or list"
        )
        entries = [entries]
    elif not isinstance(entries, list) or not entries:
        if not is_misspelt:
            problems.append(
                "there is no [[datasets]] table; each folder or list of images or videos needs one"
            )
        entries = []
    _check_general(general, problems)
    tables = [_read_table(path, index, entry, general, problems) for index, entry in enumerate(entries)]
    return _checked(path, tuple(table for table in tables if table is not None), problems)


def _checked(path: Path, datasets: tuple[DatasetTable, ...], problems: list[str]) -> DatasetConfig:
    _check_cache_directories(datasets, problems)
    if problems:
        raise DatasetError("\n  ".join([f"{path} cannot be used:", *problems]))
    return DatasetConfig(path, datasets)


_TOP_LEVEL = frozenset({"general", "datasets"})


def _check_general(general: Table, problems: list[str]) -> None:
    allowed = [name for name, key in KEYS.items() if key.in_general]
    for name, value in general.items():
        if name in allowed:
            read_value(KEYS, name, value, "[general]", problems)
        elif name in KEYS:
            problems.append(
                f"[general]: {name} = {show(value)} is allowed only in a [[datasets]] table; move it there"
            )
        else:
            problems.append(f"[general]: {unknown(name, value, allowed)}")


def _read_table(
    path: Path, index: int, entry: Any, general: Table, problems: list[str]
) -> DatasetTable | None:
    where = f"[[datasets]] {index + 1}"
    before = len(problems)
    entry = without_nulls(entry, where, problems)
    source_key = _source_key(entry, where, problems)
    if source_key is None:
        return None
    kind: Literal["image", "video"] = "image" if source_key.startswith("image") else "video"
    _check_names(entry, kind, source_key, where, problems)
    values = {name: key.default for name, key in KEYS.items()}
    for name, value in {**general, **entry}.items():
        if name in KEYS:
            place = where if name in entry else "[general]"
            values[name] = read_value(KEYS, name, value, place, problems if name in entry else [])
    if len(problems) > before or any(values[name] is BAD for name in values):
        return None
    return _finish_table(path, index, kind, source_key, values, problems)


def _source_key(entry: Table, where: str, problems: list[str]) -> str | None:
    given = [name for name in SOURCES if name in entry]
    if len(given) == 1:
        return given[0]
    if given:
        problems.append(
            f"{where}: {' and '.join(given)} exclude each other; make a [[datasets]] table for each"
        )
    else:
        near = [
            name for key in entry if key not in KEYS for name in difflib.get_close_matches(key, SOURCES, 1)
        ]
        hint = f" Did you mean {near[0]}?" if near else ""
        problems.append(
            f"{where}: the source of its items is missing; it needs one of {', '.join(SOURCES)}.{hint}"
        )
    return None


def _check_names(entry: Table, kind: str, source_key: str, where: str, problems: list[str]) -> None:
    allowed = [name for name, key in KEYS.items() if kind in key.kinds]
    for name, value in entry.items():
        if name not in KEYS:
            problems.append(f"{where}: {unknown(name, value, allowed)}")
        elif name not in allowed:
            other = "video" if kind == "image" else "image"
            problems.append(
                f"{where}: {name} = {show(value)} is for {other} tables; {source_key} makes this one {kind}s"
            )
        elif not source_key.endswith(ONLY_WITH.get(name, source_key)):
            sources = [one for one in SOURCES if kind in KEYS[one].kinds and one.endswith(ONLY_WITH[name])]
            theirs = f"is for tables with {' or '.join(sources)}, not {source_key}"
            problems.append(f"{where}: {name} = {show(value)} {theirs}")


def _finish_table(
    path: Path,
    index: int,
    kind: Literal["image", "video"],
    source_key: str,
    values: dict[str, Any],
    problems: list[str],
) -> DatasetTable | None:
    where = f"[[datasets]] {index + 1}"
    ends = ("directory", "jsonl_file", "table_file", "tars")
    given = {end: values[f"{kind}_{end}"] for end in ends} | {"cogvideox_root": values["cogvideox_root"]}
    directory, jsonl_file = given["directory"], given["jsonl_file"]
    fields = given | {name: value for name, value in values.items() if name not in SOURCES}
    if jsonl_file and fields["control_directory"]:
        logger.warning(
            "%s, %s: control_directory is ignored because a list itself names control files (control_path)",
            path,
            where,
        )
        fields["control_directory"] = None
    folder = directory or given["cogvideox_root"]
    if fields["cache_directory"] is None and not folder:
        problems.append(f"{where}: cache_directory is required with {source_key}")
        return None
    if fields["mask_directory"] and (jsonl_file or fields["alpha_mask"]):
        other = "give mask_path in the lines of the list" if jsonl_file else "leave out it or alpha_mask"
        problems.append(f"{where}: mask_directory cannot be used here; {other}")
        return None
    if fields["load_tensors"] and fields["alpha_mask"]:
        problems.append(
            f"{where}: alpha_mask cannot be used with load_tensors, which reads no frames; leave out one"
        )
        return None
    unused = [name for name in FRAME_KEYS if fields["load_tensors"] and fields[name] != KEYS[name].default]
    if unused:
        logger.warning(
            "%s, %s: %s is ignored because with load_tensors each clip is what was prepared, whole",
            path,
            where,
            " and ".join(unused),
        )
    fields["cache_directory"] = fields["cache_directory"] or folder
    fields["bucket_no_upscale"] = fields["bucket_no_upscale"] and fields["enable_bucket"]
    fields["target_frames"] = _round_targets(fields["target_frames"], f"{path}, {where}")
    if fields["frame_extraction"] == "uniform" and fields["frame_sample"] == 1:
        logger.warning(
            '%s, %s: frame_extraction = "uniform" with frame_sample = 1 is the same as "head"', path, where
        )
        fields["frame_extraction"] = "head"
    return DatasetTable(path, index, kind, **fields)


def _round_targets(targets: tuple[int, ...], where: str) -> tuple[int, ...]:
    rounded = tuple(sorted({(target - 1) // FRAME_STEP * FRAME_STEP + 1 for target in targets}))
    if not set(targets) <= set(rounded):
        logger.warning(
            "%s: target_frames %s become %s, because clips have 4n + 1 frames",
            where,
            list(targets),
            list(rounded),
        )
    return rounded


def _check_cache_directories(datasets: tuple[DatasetTable, ...], problems: list[str]) -> None:
    users: dict[str, DatasetTable] = {}
    for table in datasets:
        folder = table.cache_directory
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            problems.append(
                f"{table.place}: cache_directory = {folder}: {there} is a file; name a "
                "folder, which is made if it is not there"
            )
        if table.kind == "video" and table.cache_format == "npz":
            problems.append(
                f'{table.place}: cache_format = "npz" is for tables of pictures; use "files" or "shards"'
            )
        first = users.setdefault(os.path.normcase(table.cache_directory.resolve()), table)
        if first is not table and not first.cache_format == table.cache_format == "npz":
            problems.append(
                f"{first.place} and {table.place.removeprefix('[[datasets]] ')} share the cache directory "
                f"{table.cache_directory}; "
                "give each its own cache_directory (the default is the folder of the images or videos)"
            )
