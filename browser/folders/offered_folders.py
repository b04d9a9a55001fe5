"""Find the folders with images and clips for which a page offers tools.

These are a dataset's media folders, or the folder of a run.toml.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from browser.folders.datasets import list_named_paths
from browser.folders.described_folder import DATASET_FILE, is_described, read_own_file
from browser.folders.folders import find_folder, is_closed, read_media_folder
from browser.runs.runs import Runs
from modules.pages.language import refusal
from modules.text_files import parse_json, parse_toml

# keys of a table or subset of a dataset that name media folders
MEDIA_KEYS = ("image_directory", "video_directory", "image_dir")


def find_open_folder(runs: Runs, text: str) -> Path | None:
    """Return a folder below the roots, unless this project writes its files; None for any other text."""
    folder = find_folder(runs, text)
    return None if folder is None or is_closed(runs, folder) else folder


def read_tables(config: Path) -> list[Mapping[str, Any]]:
    """Return the dataset tables of a dataset.toml, each with its subsets; [] if it cannot be read."""
    try:
        text = read_own_file(config).decode()
        tables = (parse_json(text) if config.suffix == ".json" else parse_toml(text))["datasets"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    all_tables: list[Mapping[str, Any]] = []
    for table in tables if isinstance(tables, list) else ():
        if isinstance(table, dict):
            subsets = table.get("subsets")
            subset_tables = subsets if isinstance(subsets, list) else []
            all_tables += [table, *(subset for subset in subset_tables if isinstance(subset, dict))]
    return all_tables


def list_table_folders(runs: Runs, config: Path, base: Path) -> list[Path]:
    """Return the distinct real paths of the media folders below the roots that a dataset file names.

    `base` is the folder to which its relative paths refer.
    """
    folders = []
    for table in read_tables(config):
        for key in MEDIA_KEYS:
            folder = find_folder(runs, str(base / table[key])) if isinstance(table.get(key), str) else None
            if folder is not None and not is_closed(runs, folder) and read_media_folder(folder) is not None:
                folders.append(folder)
    return list(dict.fromkeys(folders))


def list_dataset_media_folders(runs: Runs, folder: Path) -> list[Path]:
    """Return the media folders that a folder's dataset.toml names; if it names none, the folder itself."""
    inner = list_table_folders(runs, folder / DATASET_FILE, folder) if is_described(folder) else []
    return inner or [folder]


def require_inside(runs: Runs, folder: Path) -> None:
    """Raise OptionError if the folder's dataset.toml names files outside the roots."""
    path = folder / DATASET_FILE
    if not path.is_file():
        raise refusal("It is not prepared yet: press Prepare first.")
    outside = [named_path for named_path in list_named_paths(path, folder) if not runs.is_below(named_path)]
    if outside:
        raise refusal(
            "%(path)s names %(outside)s, which is outside the folders that are shown.",
            path=path,
            outside=outside[0],
        )
