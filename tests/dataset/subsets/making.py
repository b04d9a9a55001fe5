"""Configurations of the image guides, and their options, for the tests of this folder."""

import argparse
from pathlib import Path

from dataset.config import DatasetConfig, load_dataset_config
from dataset.subset_options import SubsetOptions, add_subset_arguments
from modules.options import read_options


def given(*words: str | Path) -> SubsetOptions:
    """What a command line with these words says."""
    parser = argparse.ArgumentParser()
    add_subset_arguments(parser)
    return read_options(SubsetOptions, parser.parse_args([str(word) for word in words]))


def load(folder: Path, text: str, *words: str | Path) -> DatasetConfig:
    path = folder / "data.toml"
    path.write_text(text.replace("FOLDER", folder.as_posix()), encoding="utf-8")
    return load_dataset_config(path, given(*words))
