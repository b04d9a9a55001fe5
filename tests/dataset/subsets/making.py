"""Configurations of the image guides, and their options, for the tests of this folder."""

from pathlib import Path

from dataset.config import DatasetConfig, load_dataset_config
from dataset.subset_options import SubsetOptions
from modules.parser import parse_options


def given(*words: str | Path) -> SubsetOptions:
    """What a command line with these words says."""
    return parse_options("", [str(word) for word in words], SubsetOptions)[0]


def load(folder: Path, text: str, *words: str | Path) -> DatasetConfig:
    path = folder / "data.toml"
    path.write_text(text.replace("FOLDER", folder.as_posix()), encoding="utf-8")
    return load_dataset_config(path, given(*words))
