"""List the texts to encode, and find out which text encoders still have to run for each.

Valid outputs may be in the finished file of a text or in its unfinished one (`.part`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dataset.sources.media_source import MediaSource, Origin, pause_garbage_collection
from modules.bars import Bar
from modules.errors import CacheError, DatasetError, MediaError
from modules.media.reading import image_size
from protocols.family import Caches, TextEncoder, can_mark, fits_captions

logger = logging.getLogger(__name__)

# pairs of an encoder and its identity, in the order in which encoders run
Encoders = Sequence[tuple[TextEncoder, Mapping[str, str]]]


class Sight(NamedTuple):
    """What text encoders see in addition to captions and reference images."""

    clip: bool = False  # whether they see the frames of the item
    media: bool = False  # whether they see the reference media in the item's row (`ShownMedium`)


BLIND = Sight()


@dataclass(frozen=True, slots=True, eq=False)
class CaptionFile:
    """One text, the cache file of its embeddings, and the work left to do. There may be a million."""

    table: DatasetTable
    file_name: str  # name of the cache file
    name: str  # name of the source, for messages
    caption: str | None  # None: the source has no caption
    caption_path: Path | None  # caption file, which need not exist
    settings: Mapping[str, Any] = field(default_factory=dict)  # as in `TextRecord`
    pass_over: int = 0  # round in which it is encoded; 0: first captions, 1: further ones, 2: empty prompts
    embeds: Path | None = None  # file with precomputed outputs of text encoders
    source: MediaSource | None = None  # set if an encoder sees media of the source with the caption
    references: Sequence[tuple[Path, Origin | None]] = ()  # files of these media
    sight: "Sight" = BLIND
    # the following are set by `plan_texts`
    missing: tuple[str, ...] = ()  # names of the encoders that must run, in order
    in_part: bool = False  # valid outputs of some other encoders are only in the unfinished file
    is_foreign: bool = False  # valid outputs have no record, because another program made them


# (source, caption) -> caption whose positions in the image are converted to positions in the bucket
FitText = Callable[[MediaSource, str], str]
FITTED = "fitted"  # key in a record's settings, set if positions in the caption were converted


def caption_fitter(family: Caches) -> FitText | None:
    """Return the function that converts positions in captions to the bucket.

    Returns None if the family's captions contain no positions.
    """
    step = family.latent.pixel_step
    if not fits_captions(family):
        return None
    fitting_family = family  # of the narrower type, also inside the function

    def fit(source: MediaSource, caption: str) -> str:
        """Return a caption with its positions converted to those in the resized image, if it has any."""
        if not fitting_family.names_places(caption):
            return caption
        try:
            size = image_size(source.path)
            bucket_fit = fit_of(source.table, size, step, source.path)
            return fitting_family.fit_caption(caption, size, bucket_fit)
        except (MediaError, OSError) as error:
            logger.warning("%s: the places in its caption stay as they are (%s)", source.stem, error)
            return caption

    return fit


def list_caption_files(
    sources: Sequence[MediaSource], tag: str, sight: Sight = BLIND, fit: FitText | None = None
) -> list[CaptionFile]:
    """Return the texts of all sources, by table: first captions, additional ones, then the empty prompt.

    In this order, additional captions do not change the batches of first captions.

    Args:
        sources: Sources with their captions.
        tag: The family's cache_tag.
        sight: Which media text encoders see.
        fit: Result of `caption_fitter`.
    """
    by_table: dict[int, list[MediaSource]] = {}
    for source in sources:
        by_table.setdefault(source.table.index, []).append(source)
    files: list[CaptionFile] = []
    with pause_garbage_collection():
        for table_sources in by_table.values():
            files += _files_of_table(table_sources[0].table, table_sources, tag=tag, sight=sight, fit=fit)
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
    for source in sources:
        seen = _list_seen(source, sight)
        for number, file in enumerate(_list_captions(source, seen, tag=tag, sight=sight, fit=fit)):
            if number == 0:
                first.append(file)
            else:
                additional.append(file)
        # an empty prompt for this source, which the encoder sees with its reference images
        if table.caches_empty_prompt and table.texts_see_references:
            file = CaptionFile(
                table=table,
                file_name=text_file_name(source.stem, tag, EMPTY),
                name=f"the empty prompt of {source.stem}",
                caption="",
                caption_path=None,
                settings={} if seen.source is None else _list_reference_settings(source),
                pass_over=2,
                source=seen.source,
                references=seen.files,
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


class _SeenMedia(NamedTuple):
    """The media of a source that text encoders see with its captions."""

    source: MediaSource | None  # None: they see no media
    files: tuple[tuple[Path, Origin | None], ...]
    settings: Mapping[str, Any]  # settings of the captions' records that depend on these media


def _list_seen(source: MediaSource, sight: Sight) -> _SeenMedia:
    """Return the media of a source that text encoders see: reference images and what `sight` selects."""
    table = source.table
    seen_source = None  # stays None if the encoders see no media
    files: tuple[tuple[Path, Origin | None], ...] = ()
    settings: dict[str, Any] = {}
    if source.control and table.texts_see_references:
        seen_source = source
        files = source.parts[1 : 1 + len(source.control)]  # the first part is the source itself
        settings |= _list_reference_settings(source)
    if sight != BLIND:
        seen_source = source
        files = (*files, *_list_seen_files(source, sight))
        media = source.shown if sight.media else None
        settings |= table.sight_settings(sight.clip, media, further_text=source.further_text)
    return _SeenMedia(seen_source, files, settings)


def _list_captions(
    source: MediaSource, seen: _SeenMedia, tag: str, sight: Sight, fit: FitText | None
) -> Iterator[CaptionFile]:
    """Yield the cache file of each caption of a source, in order.

    `seen` and `sight` say which files the text encoder sees with a caption; `fit` converts positions in a
    caption to the resized image.
    """
    captions = (source.caption, *source.more_captions)
    settings = {**source.table.changed(TEXTS), **seen.settings}
    if len(captions) > 1:
        settings["captions"] = len(captions)
    for number, caption in enumerate(captions):
        embeds = None
        if source.tensors is not None and number == 0:  # only first captions have precomputed embeddings
            embeds = source.tensors.embeds
        fitted = caption
        caption_settings = settings
        if fit is not None and caption is not None:
            fitted = fit(source, caption)
            if fitted != caption:
                caption_settings = {**settings, FITTED: True}
        yield CaptionFile(
            table=source.table,
            file_name=text_file_name(source.stem, tag, number),
            name=source.stem,
            caption=fitted,
            caption_path=source.caption_path,
            settings=caption_settings,
            pass_over=1 if number else 0,  # further captions are encoded after all first ones
            embeds=embeds,
            source=seen.source,
            references=seen.files,
            sight=sight,
        )


def _list_seen_files(source: MediaSource, sight: Sight) -> tuple[tuple[Path, Origin | None], ...]:
    """Return the files that an encoder sees: clip or image, control images, reference media of the row."""
    files: list[tuple[Path, Origin | None]] = []
    if sight.clip:
        files += source.parts[: 1 + len(source.control)]
    if sight.media:
        for medium in source.shown:
            files += [(path, None) for path in (medium.path, medium.audio) if path is not None]
    return tuple(files)


def _list_reference_settings(source: MediaSource) -> dict[str, Any]:
    """Return the settings that change how text encoders see a source's reference images, by name.

    Its bucket, which they depend on, is read from its header: () if the source has to be downloaded, and
    (0, 0) if it cannot be read.
    """
    table = source.table
    if source.remote_or_packed or table.references is None or not table.references.as_encoded:
        return table.seen_settings(())
    try:
        bucket = fit_of(table, image_size(source.path), table.references.step, source.path).bucket
    except (MediaError, OSError):  # encoding reports the reason
        bucket = (0, 0)
    return table.seen_settings(bucket)


def distinct_texts(files: Sequence[CaptionFile], stores: Stores) -> list[CaptionFile]:
    """Return the texts without those that share a cache file with a text of an earlier table.

    Raises:
        DatasetError: If two texts with the same cache file have different captions.
    """
    by_entry: dict[tuple[Path | int, str], CaptionFile] = {}
    for file in files:
        store = stores.of_texts(file.table)
        # shared files are next to the images, so tables with the same images have the same files
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
    # the files are equal, but the version that cached them may have decoded them differently
    return find_changed_reading(file.references, record.as_shown)


def plan_texts(
    files: Sequence[CaptionFile], encoders: Encoders, stores: Stores, workers: int = 1
) -> list[CaptionFile]:
    """Compare all texts with their caches; return them with the encoders that still have to run."""
    reads_values = stores.verify or len(files) < MANY
    plan = partial(_plan, encoders=encoders, stores=stores, reads_values=reads_values)
    bar = Bar(len(files), "Comparing", "caption", shown=False)
    with pause_garbage_collection():
        return list(map_ahead(files, plan, workers, bar))


def _plan(file: CaptionFile, encoders: Encoders, stores: Stores, reads_values: bool) -> CaptionFile:
    """Return a text with the encoders that still have to run, from its finished and unfinished cache.

    With `reads_values`, tensors are compared with their checksums, too.
    """
    store = stores.of_texts(file.table)
    # files of other programs count as valid without being read
    if stores.trusts and store.is_shared and file.file_name in store:
        return file
    find = partial(find_outputs, file, encoders, stores)
    # names of encoders with valid outputs in the finished file -> whether these have a record
    _, finished = find(reads_values=reads_values)
    if len(finished) == len(encoders):  # the unfinished file, if there is one, is not needed
        return file if all(finished.values()) else replace(file, is_foreign=True)
    _, unfinished = find(in_part=True)
    # read again, because another process may have finished the file in the meantime
    _, finished = find(reads_values=reads_values)
    not_finished = [encoder.name for encoder, _ in encoders if encoder.name not in finished]
    missing = tuple(name for name in not_finished if name not in unfinished)
    return replace(
        file,
        missing=missing,
        in_part=len(missing) < len(not_finished),
        is_foreign=not all(finished.values()),
    )


def find_outputs(
    file: CaptionFile, encoders: Encoders, stores: Stores, in_part: bool = False, reads_values: bool = True
) -> tuple[Entry | None, Mapping[str, bool]]:
    """Find the valid outputs in a text's cache.

    Args:
        file: The text.
        encoders: Encoders of the family with their identities.
        stores: Stores of the run.
        in_part: Whether to search the unfinished file. If any output in it is outdated, no outputs are
            returned, because merging the file would corrupt valid outputs.
        reads_values: Whether to compare tensors with their checksums; else only the header is read.

    Returns:
        The entry, or None if the file is missing or damaged; and for each encoder with valid outputs, whether
        these have a record.

    Raises:
        CacheError: If a file of another program does not fit this model.
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
            needs_no_record = store.is_shared or (stores.skip_existing and not in_part and not file.settings)
            is_same_caption = entry.metadata.get("caption1", file.caption) == file.caption
            if needs_no_record and is_same_caption and encoder.keys <= entry.keys:
                if can_mark(encoder):  # then metadata tell which encoder made the outputs
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
    outdated = records.keys() - has_record.keys()
    if in_part and (outdated or not has_record):
        return None, {}
    return entry, has_record
