"""Make a dataset from a folder without a dataset file: its images and clips, each with a caption file."""

import json
from dataclasses import replace
from pathlib import Path

from data_tools.folders import walk_folders
from data_tools.masks.places import list_media
from dataset.config import DatasetConfig, load_dataset_config
from modules.atomic_write import write_text
from modules.errors import DatasetError
from modules.text_files import real_path


def make_folder_dataset(folder: Path, extension: str, is_recursive: bool, temporary: Path) -> DatasetConfig:
    """Write a temporary dataset.toml for the images and clips in a folder, and return it.

    Args:
        folder: The folder.
        extension: Suffix of the caption files.
        is_recursive: Whether the folders below it belong to the dataset.
        temporary: An empty folder, in which the dataset file is written.

    Raises:
        DatasetError: If there are no images or clips.
    """
    tables: list[str] = []
    for subfolder in walk_folders(folder, is_recursive):
        # a folder with images and clips gets two tables
        for key in sorted({f"{kind}_directory" for _, kind in list_media(subfolder)}):
            table_values = {
                key: str(real_path(subfolder)),
                "caption_extension": extension,
                "cache_directory": str(temporary / f"{len(tables)}"),
            }
            lines = [
                f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in table_values.items()
            ]
            tables.append("\n".join(["[[datasets]]", *lines]))
    if not tables:
        hint = "" if is_recursive else ". --recursive also searches its subfolders"
        raise DatasetError(f"{folder} has no images and no clips{hint}")
    file = temporary / "dataset.toml"
    write_text(file, "\n\n".join(tables))
    return replace(load_dataset_config(file), path=folder)
