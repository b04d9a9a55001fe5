"""Read and verify the cached sound of an item."""

from collections.abc import Iterator

from torch import Tensor

from dataset.batches.items import TrainingItem
from dataset.cache.records import CacheChecks, LatentRecord, latent_record, verify_tensors
from dataset.cache.store import CacheStore
from modules.contract.data import SOUND
from modules.errors import CacheError


def read_sound(
    item: TrainingItem, store: CacheStore, checks: CacheChecks
) -> tuple[Tensor, LatentRecord | None]:
    """Return the latents of an item's sound, C T M, and their record; None if another program made them.

    Raises CacheError if they are damaged, or not what the table asks for now.
    """
    entry = store.read(item.sound_path.name)
    if SOUND not in entry.tensors:
        raise CacheError(f"{item.sound_path}: it has no {SOUND}, so it is not a cache; move it elsewhere")
    latents, record = entry.tensors[SOUND], latent_record(entry.header)
    if record is not None:
        verify_tensors(entry, record.crc32)
    fault = next(_faults(item, latents, record, checks), None)
    if fault is not None:
        raise CacheError(f"{item.sound_path}: {fault}")
    return latents, record


def _faults(
    item: TrainingItem, latents: Tensor, record: LatentRecord | None, checks: CacheChecks
) -> Iterator[str]:
    """Yield why latents of sound are not what a table asks for."""
    table, found = item.table, tuple(latents.shape)
    if item.sound and found != item.sound:
        yield f"its latents have the shape {found}, a clip of its frames and rate has {item.sound}"
    if record is None:
        return
    rate = record.options.get("source_fps")
    if rate != table.source_fps:
        yield f"made for source_fps = {rate}, {table.name} has {table.source_fps}"
    if table.directory is None:  # lists need not be there
        return
    is_given = len(record.files) > 1
    if is_given != (table.audio_directory is not None):
        made = "a file of audio_directory" if is_given else "the track of its clip"
        yield f"it was made from {made}, which {table.name} does not use now"
    if not checks.knows(table.index, item.key):
        folders = [table.directory, table.audio_directory][: len(record.files)]
        file = checks.changed_file(folders, record.files)
        if file is not None:
            yield f"{file} has changed since it was encoded"
