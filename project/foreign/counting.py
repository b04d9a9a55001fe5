"""Count the steps of an epoch of a folder that is being described, as its training will."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.batches.order import count_batches
from dataset.config import load_dataset_config, with_lengths
from dataset.listing import find_sources
from dataset.sources.frames import find_bucket
from dataset.table import DatasetTable
from modules.atomic_write import write_text
from modules.console import quiet
from modules.errors import UserError
from modules.integers import ceil_div
from modules.run_limits import temporary_folder
from modules.text_files import real_path
from project import describing
from project.media import Media
from project.options import DATASET_FILE

DEFAULT_STEP = 8  # pixels; used until the autoencoder's file is available


@dataclass(frozen=True)
class CountedFile:
    """A media file in an epoch, with what determines which batch it belongs to."""

    table: DatasetTable
    bucket: tuple[int, ...]

    @property
    def group(self) -> tuple[int, ...]:
        """Key that is equal for items that can share a batch: the table's batch group and the bucket."""
        return (self.table.batch_group, *self.bucket)


def find_pixel_step(family: Any) -> int:
    """Return the number that image sides must be divisible by; a default before the model is downloaded."""
    with contextlib.suppress(UserError):
        return int(family.latent.pixel_step)
    return DEFAULT_STEP


def _list_items(
    setup: describing.RunSetup, table: DatasetTable, path: Path, media: Media | None
) -> list[CountedFile]:
    """Return a file's training items: one for an image, one for each frame count for a clip."""
    bucket = _find_bucket(setup, table, path, None if media is None else media.size)
    lengths = [1]
    if media is not None and media.is_clip:
        # [1] if the clip is too short for any target
        frames = describing.count_frames(media, setup.model)
        reached = [target for target in table.buckets.target_frames if target <= frames]
        lengths = reached or [1]
    return [CountedFile(table, (*bucket, length)) for length in lengths]


def count_epoch_steps(setup: describing.RunSetup) -> int:
    """Return the optimizer steps in one epoch of the dataset.toml that `new` would write.

    File sizes and clip lengths determine which files share a batch, as in training.
    """
    # the dataset file is not written yet: a temporary copy is loaded, in whose folder its paths are relative
    files: list[CountedFile] = []
    media_by_path = {real_path(item.path): item for item in setup.media}
    with temporary_folder() as temporary, contextlib.chdir(setup.options.folder), quiet():
        copy = temporary / DATASET_FILE
        write_text(copy, describing.describe_dataset(setup))
        try:
            config = with_lengths(load_dataset_config(copy), describing.get_clip_lengths(setup.model))
            for table in config.datasets:
                for source in find_sources(table, faults=[]):
                    item = media_by_path.get(real_path(source.path))
                    files += _list_items(setup, table, source.path, item)
        except UserError:  # `new` reports errors of the files
            return max(len(setup.media), 1)
    accumulated = setup.training_options.get("gradient_accumulation_steps", 1)
    return ceil_div(count_batches(files), accumulated)


def _find_bucket(
    setup: describing.RunSetup, table: DatasetTable, path: Path, size: tuple[int, int] | None
) -> tuple[int, ...]:
    """Return the size of the bucket for a file; () if it is unknown."""
    if size is None:
        return ()
    try:
        return find_bucket(table, size, find_pixel_step(setup.model_info.family), path)
    except UserError:
        return ()
