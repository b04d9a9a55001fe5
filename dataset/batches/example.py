"""Find the files and the caption of a training item, for an example generation command."""

import contextlib
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.batches.items import TrainingItem
from dataset.cache.records import latent_record, text_records
from dataset.cache.store import Stores
from dataset.sources.frames import one_frame_settings
from dataset.table import Guide
from modules.console import quiet
from modules.errors import UserError

MAX_LISTED = 50_000  # files of a folder, including captions
MAX_PROMPT_LENGTH = 1000  # characters


@dataclass(frozen=True)
class ExampleItem:
    """A training item's files, to use as an example in a generation command."""

    caption: str = ""
    image: Path | None = None  # the item itself, if it is an image on disk
    controls: tuple[Path, ...] = ()  # control images in order, or one control clip
    control_mask: Path | None = None
    references: tuple[Path, ...] = ()  # of a clip
    cached: frozenset[str] = frozenset()  # keys of its latents' cache
    # times of a single image and of its control images, as --one_frame_inference expects them
    one_frame_settings: str = ""
    guides: tuple[Guide, ...] = ()  # images that guide the clips of its table
    spatial_crop_region: tuple[int, ...] | None = None  # given part of these clips: top, left, bottom, right


def find_example(item: TrainingItem, stores: Stores) -> ExampleItem:
    """Return an item's media files and caption for an example command; what cannot be found is omitted."""
    table = item.table
    cached_keys: frozenset[str] = frozenset()
    if item.cache_info.on_the_fly_buckets is None:  # its latents are cached, not encoded during training
        with contextlib.suppress(UserError, OSError):
            cached_keys = stores.latent_store(table).read(item.file_name, is_full=False).keys
    example = ExampleItem(
        _read_caption(item, stores),
        cached=cached_keys,
        one_frame_settings=one_frame_settings(table) if table.kind == "image" else "",
        guides=table.references.guides,
        spatial_crop_region=table.references.spatial_crop_region,
    )
    companion_folders = (
        table.references.control_directory,
        table.references.control_mask_directory,
        table.references.reference_directory,
    )
    has_companions = table.source.directory is None or any(
        companion_folders
    )  # the rows of a list may name some
    if has_companions or table.kind == "image":  # the command for a clip alone needs no file
        with contextlib.suppress(UserError, OSError), quiet():
            return _add_files(example, item, stores, has_companions)
    return example


def _add_files(example: ExampleItem, item: TrainingItem, stores: Stores, has_companions: bool) -> ExampleItem:
    """Add the files of an item, found in the record of its cache or by listing its table."""
    # Only a listing finds the companion files (controls, references) of an item.
    folder = item.table.source.directory
    if not has_companions and folder is not None and item.cache_info.on_the_fly_buckets is None:
        record = latent_record(stores.latent_store(item.table).read(item.file_name, is_full=False))
        if record is not None and record.files and (folder / record.files[0].name).is_file():
            return replace(example, image=folder / record.files[0].name)
    if folder is not None:
        with os.scandir(folder) as entries:
            if next(itertools.islice(entries, MAX_LISTED, None), None) is not None:
                return example  # listing it would take long
    # local files are found by listing the table; tar members and downloads are omitted
    from dataset.listing import find_sources  # only for lists and companions

    sources = find_sources(item.table, captions=False, faults=[])
    source = next((source for source in sources if source.stem == item.source_stem), None)
    if source is None or any(source.remote_or_packed) or source.precomputed is not None:
        return example
    return replace(
        example,
        image=source.path if item.table.kind == "image" else None,
        controls=source.control,
        control_mask=source.control_mask,
        references=source.references,
    )


def _read_caption(item: TrainingItem, stores: Stores) -> str:
    """Return the first caption of an item on one line; "" if it cannot be read."""
    caption = ""
    with contextlib.suppress(UserError, OSError, LookupError):
        if item.cache_info.has_cached_texts:
            entry = stores.text_store(item.table).read(item.caption_path(0).name, is_full=False)
            records = text_records(entry)
            captions = [record.caption for record in records.values()]
            caption = captions[0] if captions else entry.metadata.get("caption1", "")
        else:
            caption = item.cache_info.on_the_fly_caption(item.source_stem, 0)
    return " ".join(caption.split())[:MAX_PROMPT_LENGTH]
