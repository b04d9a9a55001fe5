"""List the texts to encode, and find out which encoders still have to run for each.

Outputs may be valid in finished files and in unfinished ones (`.part`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.cache.records import TextRecord, difference, is_unchanged, text_records, verify_tensors
from dataset.cache.store import Stores
from dataset.cache_files import EMPTY, PART, Entry, empty_text_name, text_file_name
from dataset.caching.prefetch import MANY, map_ahead
from dataset.config import DatasetTable
from dataset.config_keys import TEXTS
from dataset.sources.colors import find_changed_reading
from dataset.sources.decoding import fit_of
from dataset.sources.media_source import MediaSource, Origin, pause_collection
from modules.bars import Bar
from modules.errors import CacheError, DatasetError, MediaError
from modules.media.reading import image_size
from protocols.family import Caches, TextEncoder, can_mark, fits_captions

logger = logging.getLogger(__name__)

# (encoder, its identity), in the order in which they run
Encoders = Sequence[tuple[TextEncoder, Mapping[str, str]]]


class Sight(NamedTuple):
    """What text encoders see in addition to captions and reference images."""

    clip: bool = False  # the frames of the item
    media: bool = False  # the reference media in its row (`ShownMedium`)


BLIND = Sight()


@dataclass(frozen=True, slots=True, eq=False)
class CaptionFile:
    """One text, the cache file of its embeddings, and the work left to do. There may be a million."""

    table: DatasetTable
    file_name: str  # name of the cache file
    name: str  # name of the source, for messages
    caption: str | None
    caption_path: Path | None  # caption file, which need not exist
    settings: Mapping[str, Any] = field(default_factory=dict)  # as in `TextRecord`
    pass_over: int = 0  # 0: the first captions of a table, 1: further ones, 2: the empty prompt
    embeds: Path | None = None  # file with precomputed outputs of text encoders
    source: MediaSource | None = None  # set if an encoder sees media of the source with the caption
    references: Sequence[tuple[Path, Origin | None]] = ()  # files of these media
    sight: "Sight" = BLIND
    # the following are set by `plan_texts`: names of the encoders that must run, in order
    missing: tuple[str, ...] = ()
    in_part: bool = False  # valid outputs of some other encoders are only in the unfinished file
    is_foreign: bool = False  # valid outputs have no record, because another program made them


FitText = Callable[[MediaSource, str], str]  # (source, caption) -> caption with positions in the bucket
FITTED = "fitted"  # setting in records of captions whose positions were changed to those in the bucket


def caption_fitter(family: Caches) -> FitText | None:
    """Return the function that converts positions in captions to the bucket; None if it is not needed."""
    step = family.latent.pixel_step
    if not fits_captions(family):
        return None
    fitting = family

    def fit(source: MediaSource, caption: str) -> str:
        if not fitting.names_places(caption):
            return caption
        try:
            size = image_size(source.path)
            return fitting.fit_caption(caption, size, fit_of(source.table, size, step, source.path))
        except (MediaError, OSError) as error:
            logger.warning("%s: the places in its caption stay as they are (%s)", source.stem, error)
            return caption

    return fit


def list_caption_files(
    sources: Sequence[MediaSource], tag: str, sight: Sight = BLIND, fit: FitText | None = None
) -> list[CaptionFile]:
    """Return the texts of all sources, by table: first captions, additional ones, then the empty prompt.

    Batches of first captions are thereby the same as without other texts. `sight` says which media text
    encoders see. `fit` is the result of `caption_fitter`.
    """
    by_table: dict[int, list[MediaSource]] = {}
    for source in sources:
        by_table.setdefault(source.table.index, []).append(source)
    files: list[CaptionFile] = []
    with pause_collection():
        for of_table in by_table.values():
            files += _files_of_table(of_table[0].table, of_table, tag=tag, sight=sight, fit=fit)
    return files


def _files_of_table(
    table: DatasetTable, sources: Sequence[MediaSource], tag: str, sight: Sight, fit: FitText | None
) -> list[CaptionFile]:
    """Return the texts of a table: first captions, additional ones, then the empty prompts.

    The first captions are encoded first, so that an interrupted run has one for each source. There is one
    empty prompt, or one for each source if text encoders see its reference images.
    """
    first: list[CaptionFile] = []
    additional: list[CaptionFile] = []
    empty: list[CaptionFile] = []
    table_settings = table.changed(TEXTS)
    for source in sources:
        references: tuple[tuple[Path, Origin | None], ...] = ()
        shown_source = None
        if source.control and table.texts_see_references:
            shown_source = source
            references = source.parts[1 : 1 + len(source.control)]
        captions = (source.caption, *source.more_captions)
        settings = (
            table_settings if shown_source is None else {**table_settings, **_list_seen_settings(source)}
        )
        if sight != BLIND:
            shown_source = source
            references = (*references, *_list_seen_files(source, sight))
            media = source.shown if sight.media else None
            seen = table.sight_settings(sight.clip, media, further_text=source.further_text)
            settings = {**settings, **seen}
        if len(captions) > 1:
            settings = {**settings, "captions": len(captions)}
        for number, caption in enumerate(captions):
            embeds = None if source.tensors is None or number else source.tensors.embeds
            caption_settings = settings
            if fit is not None and caption is not None:
                fitted = fit(source, caption)
                if fitted != caption:
                    caption_settings = {**settings, FITTED: True}
                caption = fitted
            file = CaptionFile(
                table=table,
                file_name=text_file_name(source.stem, tag, number),
                name=source.stem,
                caption=caption,
                caption_path=source.caption_path,
                settings=caption_settings,
                pass_over=1 if number else 0,
                embeds=embeds,
                source=shown_source,
                references=references,
                sight=sight,
            )
            if number:
                additional.append(file)
            else:
                first.append(file)
        if table.caches_empty_prompt and table.texts_see_references:
            file = CaptionFile(
                table=table,
                file_name=text_file_name(source.stem, tag, EMPTY),
                name=f"the empty prompt of {source.stem}",
                caption="",
                caption_path=None,
                settings={} if shown_source is None else _list_seen_settings(source),
                pass_over=2,
                source=shown_source,
                references=references,
            )
            empty.append(file)
    if table.caches_empty_prompt and not table.texts_see_references:
        file = CaptionFile(
            table=table,
            file_name=empty_text_name(tag),
            name="the empty prompt",
            caption="",
            caption_path=None,
            pass_over=2,
        )
        empty.append(file)
    return [*first, *additional, *empty]


def _list_seen_files(source: MediaSource, sight: Sight) -> tuple[tuple[Path, Origin | None], ...]:
    """Return the files that an encoder sees: clip or image, control images, reference media of the row."""
    files = source.parts[: 1 + len(source.control)] if sight.clip else ()
    if not sight.media:
        return files
    paths = (path for medium in source.shown for path in (medium.path, medium.audio) if path is not None)
    return (*files, *((path, None) for path in paths))


def _list_seen_settings(source: MediaSource) -> dict[str, Any]:
    """Return `DatasetTable.seen_settings` for a source, whose bucket is read from its header.

    The bucket is () if the source has to be downloaded, and (0, 0) if it cannot be read.
    """
    table = source.table
    if source.origins or table.references is None or not table.references.as_encoded:
        return table.seen_settings(())
    try:
        bucket = fit_of(table, image_size(source.path), table.references.step, source.path).bucket
    except (MediaError, OSError):  # encoding reports the reason
        bucket = (0, 0)
    return table.seen_settings(bucket)


def distinct_texts(files: Sequence[CaptionFile], stores: Stores) -> list[CaptionFile]:
    """Return the texts without those that share a cache file with a text of an earlier table.

    Raises:
        DatasetError: If two texts with the same file have different captions.
    """
    by_entry: dict[tuple[Path | int, str], CaptionFile] = {}
    for file in files:
        store = stores.of_texts(file.table)
        owner = store.folder if store.is_shared else file.table.index
        first = by_entry.setdefault((owner, file.file_name), file)
        if first is not file and first.caption != file.caption:
            raise DatasetError(
                f"{file.table.name}: the caption of {file.name} is {file.caption!r} here, but "
                f"{first.caption!r} in {first.table.name}, and both have one npz file.\n  Let the tables "
                "make equal captions, or keep the embeddings elsewhere: --cache_text_encoder_outputs without "
                "_to_disk"
            )
    return list(by_entry.values())


def why_outdated(record: TextRecord, identity: Mapping[str, str], file: CaptionFile) -> str | None:
    """Return why a cached text has to be encoded again; None if it is up to date.

    Compares encoder, caption, settings and reference images.
    """
    changed = (
        difference(record.encoder, identity)
        or difference({"caption": record.caption}, {"caption": file.caption})
        or difference(record.settings, file.settings)
    )
    if changed is not None:
        return changed
    recorded = record.references
    if len(recorded) != len(file.references):
        return f"it was made with {len(recorded)} reference pictures, now there are {len(file.references)}"
    for (path, origin), image in zip(file.references, recorded, strict=True):
        try:
            if not is_unchanged(image, path, origin):
                return f"{path} changed since"
        except OSError as error:  # encoding the image will report the error
            return str(error)
    return find_changed_reading(file.references, record.as_shown)


def plan_texts(
    files: Sequence[CaptionFile], encoders: Encoders, stores: Stores, workers: int = 1
) -> list[CaptionFile]:
    """Compare all texts with their caches; return them with the encoders that still have to run."""
    reads_values = stores.verify or len(files) < MANY
    plan = partial(_plan, encoders=encoders, stores=stores, reads_values=reads_values)
    bar = Bar(len(files), "Comparing", "caption", shown=False)
    with pause_collection():
        return list(map_ahead(files, plan, workers, bar))


def _plan(file: CaptionFile, encoders: Encoders, stores: Stores, reads_values: bool) -> CaptionFile:
    """Return a text with the encoders that still have to run, from its finished and unfinished cache.

    With `reads_values`, tensors are compared with their checksums, too.
    """
    store = stores.of_texts(file.table)
    if stores.trusts and store.is_shared and file.file_name in store:
        return file
    find = partial(find_outputs, file, encoders, stores)
    # names of encoders with valid outputs -> whether these have a record
    _, has_record = find(reads_values=reads_values)
    if len(has_record) == len(encoders):  # the unfinished file, if there is one, is not needed
        return file if all(has_record.values()) else replace(file, is_foreign=True)
    _, in_part = find(in_part=True)
    _, has_record = find(reads_values=reads_values)  # another process may have finished the file now
    incomplete = [encoder.name for encoder, _ in encoders if encoder.name not in has_record]
    missing = tuple(name for name in incomplete if name not in in_part)
    is_foreign = not all(has_record.values())
    return replace(file, missing=missing, in_part=len(missing) < len(incomplete), is_foreign=is_foreign)


def find_outputs(
    file: CaptionFile, encoders: Encoders, stores: Stores, in_part: bool = False, reads_values: bool = True
) -> tuple[Entry | None, Mapping[str, bool]]:
    """Find the valid outputs in a text's cache.

    With `in_part`, the unfinished file is searched. If any output in it is outdated, no outputs are returned,
    because merging the file would corrupt valid outputs. Without `reads_values`, only
    the header is read.

    Returns:
        The entry, None if the file is missing or damaged; and for each encoder with valid outputs, whether
        these have a record.

    Raises:
        CacheError: If another program's file is to be kept but is for something else.
    """
    store = stores.of_texts(file.table)
    has_record: dict[str, bool] = {}
    name = file.file_name + PART if in_part else file.file_name
    try:
        entry = store.read(name, reads_values)
        records = text_records(entry)
    except CacheError as error:
        if name in store:
            logger.warning("%s. It is made again.", error)
        return None, has_record
    for encoder, identity in encoders:
        record = records.get(encoder.name)
        if record is None:
            # a cache in another program's format needs no record, because that program writes none
            accepts = store.is_shared or (stores.skip_existing and not in_part and not file.settings)
            is_same_caption = entry.metadata.get("caption1", file.caption) == file.caption
            if accepts and is_same_caption and encoder.keys <= entry.keys:
                if can_mark(encoder):
                    encoder.check_metadata(store.folder / name, entry.metadata)
                has_record[encoder.name] = False
            continue
        changed = why_outdated(record, identity, file)
        if changed is not None:
            logger.debug("%s: %s", store.folder / name, changed)
            continue
        try:
            if reads_values:
                verify_tensors(entry, record.crc32)
            has_record[encoder.name] = True
        except CacheError as error:
            logger.warning("%s. It is made again.", error)
    has_outdated_outputs = records.keys() - has_record.keys()
    if in_part and (has_outdated_outputs or not has_record):
        return None, {}
    return entry, has_record
