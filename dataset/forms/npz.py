"""Caches shared with sd-scripts: npz files next to the images, with arrays of several resolutions."""

from pathlib import Path
from typing import TYPE_CHECKING

from dataset.forms.contract import ListImages, SharedCaches
from dataset.table import DatasetTable
from modules.errors import DatasetError

if TYPE_CHECKING:  # torch is not loaded to read a dataset file
    from dataset.cache_files import NpzNames
    from dataset.forms.npz_store import NpzStore


def open_store(
    table: DatasetTable, names: "NpzNames | None", folder: Path, list_images: ListImages
) -> "NpzStore":
    """Open the npz caches of a table, which are next to its images as in sd-scripts.

    Args:
        table: Table of the dataset file.
        names: The family's latent space and keys of text caches; None for a family without npz caches.
        folder: Folder of the table's images.
        list_images: Returns the paths, without suffix, of images in other folders, by stem.

    Raises:
        DatasetError: If the family has no caches in npz files.
    """
    if names is None or names.latent.npz is None:
        raise DatasetError(
            f'{table.name}: cache_format = "npz": this model has no caches in npz files. Use "files" or '
            '"shards"'
        )
    from dataset.forms.npz_store import NpzStore  # it loads torch

    return NpzStore(
        table=table,
        tag=names.tag,
        latent=names.latent,
        text_keys=names.text_keys,
        folder=folder,
        image_paths=list_images(),
    )


NPZ = SharedCaches("npz", open_store)
