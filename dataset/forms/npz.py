"""Caches that image trainers share: npz files next to the pictures, with arrays of several resolutions."""

from pathlib import Path
from typing import TYPE_CHECKING

from dataset.forms.contract import DataForm, ListPictures
from dataset.table import DatasetTable
from modules.errors import DatasetError

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.cache_files import NpzNames
    from dataset.forms.npz_store import NpzStore


def find_conflict(kind: str) -> str | None:
    if kind == "video":
        return 'cache_format = "npz" is for tables of pictures; use "files" or "shards"'
    return None


def open_caches(
    table: DatasetTable,
    names: "NpzNames | None",
    folder: Path,
    list_pictures: ListPictures,
) -> "NpzStore":
    """Return the npz files of a table. folder: of its pictures, except those that `list_pictures` returns.

    Raises DatasetError if the family has no caches in npz files.
    """
    if names is None or names[1].npz is None:
        raise DatasetError(
            f'{table.name}: cache_format = "npz": this model has no caches in npz files. Use "files" or '
            '"shards"'
        )
    from dataset.forms.npz_store import NpzStore  # it loads torch

    tag, latent, text_keys = names
    return NpzStore(
        table=table, tag=tag, latent=latent, text_keys=text_keys, folder=folder, listed=list_pictures()
    )


NPZ = DataForm(
    "npz",
    cache_format="npz",
    open_caches=open_caches,
    cache_conflict=find_conflict,
    not_converted=(
        'cache_format = "npz": only a caching script knows which of the sizes in a file are this table\'s. '
        "Set another cache_format and cache again"
    ),
)
