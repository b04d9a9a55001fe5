"""Datasets without a file: folders `<repeats>_<class>`, or pictures that a JSON file names."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from dataset.subset_options import SubsetOptions
from dataset.subsets.reading import read_subsets
from dataset.table import DatasetConfig
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)


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
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) == 0:
            logger.warning(
                "%s: %s is left out because its name does not begin with a number of repeats, such as 10_%s",
                option,
                folder / name,
                match[2] if match else name,
            )
            continue
        subset = {"image_dir": str(folder / name), "num_repeats": int(match[1]), "class_tokens": match[2]}
        found.append({**subset, "is_reg": is_reg})
    if not found:
        raise DatasetError(
            f"{option} {folder} has no folder whose name begins with a number of repeats, such as 10_cat. "
            "Move the pictures into one."
        )
    return found
