"""Options of `tools/convert_cache.py`. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError


@dataclass(frozen=True)
class ConvertCacheOptions:
    """Which cache folders to convert, and to what."""

    dataset_config: Path | None
    cache_directory: tuple[Path, ...] | None
    to: str  # files or shards
    keep: bool
    dry_run: bool

    def __post_init__(self) -> None:
        if (self.dataset_config is None) == (self.cache_directory is None):
            raise OptionError(
                "give either --dataset_config, for the cache folders of all its tables, or --cache_directory"
            )
        for folder in self.cache_directory or ():
            if not folder.is_dir():
                raise OptionError(f"--cache_directory {folder}: no such folder. Give that of existing caches")


def add_convert_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ConvertCacheOptions`."""
    parser.add_argument("--dataset_config", help="TOML or JSON file: convert the cache folders of its tables")
    parser.add_argument("--cache_directory", nargs="+", help="convert these folders, without a dataset file")
    parser.add_argument(
        "--to",
        required=True,
        choices=["files", "shards"],
        help="files: a file for each entry, as other programs read them; shards: few large tar files, for "
        'cache_format = "shards"',
    )
    parser.add_argument("--keep", action="store_true", help="keep what was converted too, in its old form")
    parser.add_argument("--dry_run", action="store_true", help="only count what would be converted")
