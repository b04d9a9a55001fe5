"""List the texts to encode, and find out which text encoders still have to run for each.

Valid outputs may be in the finished file of a text or in its unfinished one (`.part`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from dataset.cache.records import TextRecord, difference, is_unchanged, text_records, verify_tensors
from dataset.cache.store import Stores
from dataset.cache_files import EMPTY, PART, Entry, empty_text_name, text_file_name
from dataset.caching.prefetch import MANY, map_ahead
from dataset.config import DatasetTable
from dataset.config_keys import TEXTS
from dataset.sources.colors import find_changed_reading
from dataset.sources.decoding import find_bucket_fit
from dataset.sources.media_source import MediaSource, Origin, pause_garbage_collection
from modules.bars import Bar
from modules.errors import CacheError, DatasetError, MediaError
from modules.media.reading import image_size
from protocols.family import Caches, FitsCaptions, TextEncoder, has_cache_metadata

logger = logging.getLogger(__name__)

# pairs of an encoder and its identity, in the order in which encoders run
Encoders = Sequence[tuple[TextEncoder, Mapping[str, str]]]


class VisibleMedia(NamedTuple):
    """Which media text encoders see in addition to caption and references: the clip, or media of a row."""

    frames: bool = False  # whether they see the frames of the item
    reference_media: bool = False  # whether they see the reference media in the item's row


CAPTIONS_ONLY = VisibleMedia()


def find_visible_media(encoders: Sequence[TextEncoder]) -> VisibleMedia:
    """Return which media at least one of a family's text encoders sees."""
    return VisibleMedia(
        any(encoder.abilities.encodes_clip for encoder in encoders),
        any(encoder.abilities.encodes_media for encoder in encoders),
    )


@dataclass(frozen=True, slots=True, eq=False)
class CaptionFile:
    """A caption, the cache file of its embeddings, and the encoders that still have to run."""

    table: DatasetTable
    file_name: str  # name of the cache file
    name: str  # name of the source, for messages
    caption: str | None  # None: the source has no caption
    caption_path: Path | None  # caption file, which need not exist
    settings: Mapping[str, Any] = field(default_factory=dict)  # as in `TextRecord`
    # round in which it is encoded; 0: first captions, 1: further ones, 2: empty prompts
    encoding_round: int = 0
    embeds: Path | None = None  # file with precomputed outputs of text encoders
    source: MediaSource | None = None  # set if an encoder sees media of the source with the caption
    references: Sequence[tuple[Path, Origin | None]] = ()  # files of these media
    visible_media: "VisibleMedia" = CAPTIONS_ONLY
    # the following are set by `plan_texts`
    encoders_to_run: tuple[str, ...] = ()  # names of the encoders that must run, in order
    has_partial_outputs: bool = False  # valid outputs of some other encoders are only in the unfinished file
    lacks_record: bool = False  # valid outputs have no record, because another program made them


# (source, caption) -> caption whose positions in the image are converted to positions in the bucket
FitText = Callable[[MediaSource, str], str]


def _fit_caption(family: FitsCaptions, step: int, source: MediaSource, caption: str) -> str:
    """Return a caption whose pixel positions, if any, are converted to those in the resized image."""
    if not family.has_coordinates(caption):
        return caption
    try:
        size = image_size(source.path)
        bucket_fit = find_bucket_fit(source.table, size, step, source.path)
        return family.fit_caption(caption, size, bucket_fit)
    except (MediaError, OSError) as error:
        logger.warning("%s: the places in its caption stay as they are (%s)", source.stem, error)
        return caption


def list_caption_files(
    sources: Sequence[MediaSource],
    tag: str,
    visible_media: VisibleMedia = CAPTIONS_ONLY,
    family: Caches | None = None,
) -> list[CaptionFile]:
    """Return the captions of all tables, in order: first captions, further ones, then the empty prompt.

    In this order, additional captions do not change the batches of first captions.

    Args:
        sources: Media files with their captions.
        tag: The family's cache_tag.
        visible_media: Which media text encoders see.
        family: Family whose captions may contain positions in the image, which are converted to positions in
            the bucket; None leaves captions as they are.
    """
    fit: FitText | None = None
    if family is not None and family.abilities.adjusts_captions:
        fit = partial(_fit_caption, cast("FitsCaptions", family), family.latent.pixel_step)
    by_table: dict[int, list[MediaSource]] = {}
    for source in sources:
        by_table.setdefault(source.table.index, []).append(source)
    files: list[CaptionFile] = []
    with pause_garbage_collection():
        for table_sources in by_table.values():
            files += _list_table_files(
                table_sources[0].table, table_sources, tag=tag, visible_media=visible_media, fit=fit
            )
    return files


def _list_table_files(
    table: DatasetTable,
    sources: Sequence[MediaSource],
    tag: str,
    visible_media: VisibleMedia,
    fit: FitText | None,
) -> list[CaptionFile]:
    """Return the text caches of a table: first captions, further ones, then the empty prompts."""
    # The first captions are encoded first, so that an interrupted run has one for each media file. There is
    # one empty prompt, or one for each media file if text encoders see its reference images.
    first_captions: list[CaptionFile] = []
    further_captions: list[CaptionFile] = []
    empty_prompts: list[CaptionFile] = []
    for source in sources:
        seen = _SeenMedia()
        if table.references.are_seen_by_texts or visible_media != CAPTIONS_ONLY:
            seen = _list_seen(source, visible_media)
        captions = _list_captions(source, seen, tag=tag, visible_media=visible_media, fit=fit)
        first_captions.append(next(captions))
        further_captions += captions
        if table.captions.caches_empty_prompt and table.references.are_seen_by_texts:
            empty_prompts.append(
                CaptionFile(
                    table=source.table,
                    file_name=text_file_name(source.stem, tag, EMPTY),
                    name=f"the empty prompt of {source.stem}",
                    caption="",
                    caption_path=None,
                    settings={} if seen.source is None else _list_reference_settings(source),
                    encoding_round=2,
                    source=seen.source,
                    references=seen.files,
                )
            )
    if table.captions.caches_empty_prompt and not table.references.are_seen_by_texts:
        empty_prompts.append(
            CaptionFile(
                table=table,
                file_name=empty_text_name(tag),
                name="the empty prompt",
                caption="",
                caption_path=None,
                encoding_round=2,
            )
        )
    return [*first_captions, *further_captions, *empty_prompts]


class _SeenMedia(NamedTuple):
    """The media of an item that text encoders see together with its captions; by default none."""

    source: MediaSource | None = None  # None: they see no media
    # recorded, so that changed files make text caches stale
    files: tuple[tuple[Path, Origin | None], ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})  # also recorded: table keys that change how these look


def _list_seen(source: MediaSource, visible_media: VisibleMedia) -> _SeenMedia:
    """Return the media that text encoders see with a caption: reference images and `visible_media`."""
    table = source.table
    seen_source = None  # stays None if the item has no media that the encoders see
    files: tuple[tuple[Path, Origin | None], ...] = ()
    settings: dict[str, Any] = {}
    if source.control and table.references.are_seen_by_texts:
        seen_source = source
        num_references = len(source.control)
        files = source.latent_inputs[1 : 1 + num_references]  # 0 is the source itself
        settings |= _list_reference_settings(source)
    if visible_media != CAPTIONS_ONLY:
        seen_source = source
        if visible_media.frames:  # clip or image, and control images
            files += source.latent_inputs[: 1 + len(source.control)]
        if visible_media.reference_media:
            for medium in source.row_references:
                files += tuple((path, None) for path in (medium.path, medium.audio_path) if path is not None)
        media = source.row_references if visible_media.reference_media else None
        settings |= table.visible_media_settings(
            visible_media.frames, media, further_text=source.further_text
        )
    return _SeenMedia(seen_source, files, settings)


def _list_captions(
    source: MediaSource, seen: _SeenMedia, tag: str, visible_media: VisibleMedia, fit: FitText | None
) -> Iterator[CaptionFile]:
    """Yield each caption of a media file with its cache file, in order."""
    # `seen` and `visible_media` say which files the encoder sees with a caption; `fit` converts positions in
    # a caption to the resized image.
    captions = (source.caption, *source.more_captions)
    settings = {**source.table.non_default_values(TEXTS), **seen.settings}
    if len(captions) > 1:
        settings["captions"] = len(captions)
    for number, caption in enumerate(captions):
        precomputed = None
        if source.precomputed is not None and number == 0:  # only first captions have precomputed embeddings
            precomputed = source.precomputed.embeds
        fitted = caption
        caption_settings = settings
        if fit is not None and caption is not None:
            fitted = fit(source, caption)
            if fitted != caption:
                caption_settings = settings | source.table.fitted_caption_settings()
        yield CaptionFile(
            table=source.table,
            file_name=text_file_name(source.stem, tag, number),
            name=source.stem,
            caption=fitted,
            caption_path=source.caption_path,
            settings=caption_settings,
            encoding_round=1 if number else 0,  # further captions are encoded after all first ones
            embeds=precomputed,
            source=seen.source,
            references=seen.files,
            visible_media=visible_media,
        )


def _list_reference_settings(source: MediaSource) -> dict[str, Any]:
    """Return, by name, the settings that change how text encoders see an item's reference images."""
    # They depend on the item's bucket. Instead of an unknown bucket, () is used for a file that has to be
    # downloaded first, and (0, 0) for an unreadable file.
    table = source.table
    if (
        source.remote_or_packed
        or table.references.rules is None
        or not table.references.rules.text_sees_vae_input
    ):
        return table.visible_reference_settings(())
    try:
        bucket = find_bucket_fit(
            table, image_size(source.path), table.references.rules.step, source.path
        ).bucket
    except (MediaError, OSError):  # encoding reports the reason
        bucket = (0, 0)
    return table.visible_reference_settings(bucket)


def distinct_texts(files: Sequence[CaptionFile], stores: Stores) -> list[CaptionFile]:
    """Return the captions without those that share a cache file with a caption of an earlier table.

    Raises:
        DatasetError: If two different captions have the same cache file.
    """
    first_texts: dict[tuple[Path | int, str], CaptionFile] = {}  # by store and name of the cache file
    for file in files:
        store = stores.text_store(file.table)
        # shared files are next to the images, so tables with the same images have the same files
        owner = store.folder if store.is_shared else file.table.index
        first_file = first_texts.setdefault((owner, file.file_name), file)
        if first_file is not file and first_file.caption != file.caption:
            raise DatasetError(
                f"{file.table.name}: the caption of {file.name} is {file.caption!r} here, but "
                f"{first_file.caption!r} in {first_file.table.name}, and both share one npz file.\n"
                "  Make the captions equal, or keep the embeddings in memory: "
                "--cache_text_encoder_outputs without _to_disk"
            )
    return list(first_texts.values())


def why_outdated(record: TextRecord, identity: Mapping[str, str], file: CaptionFile) -> str | None:
    """Return why a cached caption has to be encoded again; None if it is up to date.

    Compares encoder, caption, settings and reference images.
    """
    changed_setting = (
        difference(record.encoder, identity)
        or difference({"caption": record.caption}, {"caption": file.caption})
        or difference(record.settings, file.settings)
    )
    if changed_setting is not None:
        return changed_setting
    recorded = record.references
    if len(recorded) != len(file.references):
        return f"it was made with {len(recorded)} reference images, but now there are {len(file.references)}"
    for (path, origin), recorded_image in zip(file.references, recorded, strict=True):
        try:
            if not is_unchanged(recorded_image, path, origin):
                return f"{path} has changed since"
        except OSError as error:  # encoding the image will report the error
            return str(error)
    # the files are equal, but the version that cached them may have decoded them differently
    return find_changed_reading(file.references, record.decoding_version)


def plan_texts(
    files: Sequence[CaptionFile], encoders: Encoders, stores: Stores, workers: int = 1
) -> list[CaptionFile]:
    """Compare all captions with their cache files; return them with the encoders that still have to run."""
    verifies_tensors = stores.verify or len(files) < MANY
    plan = partial(_plan, encoders=encoders, stores=stores, verifies_tensors=verifies_tensors)
    bar = Bar(len(files), "Comparing", "caption", shown=False)
    with pause_garbage_collection():
        return list(map_ahead(files, plan, workers, bar))


def _plan(file: CaptionFile, encoders: Encoders, stores: Stores, verifies_tensors: bool) -> CaptionFile:
    """Return a caption with the encoders that still have to run, judged by its finished and `.part` cache."""
    # With `verifies_tensors`, tensors are compared with their checksums, too.
    store = stores.text_store(file.table)
    # files of other programs count as valid without being read
    if stores.trusts_shared_caches and store.is_shared and file.file_name in store:
        return file
    find_valid = partial(find_outputs, file, encoders, stores)
    finished = find_valid(verifies_tensors=verifies_tensors).has_record  # encoders with valid outputs
    if len(finished) == len(encoders):  # the unfinished file, if there is one, is not needed
        return file if all(finished.values()) else replace(file, lacks_record=True)
    unfinished = find_valid(in_part=True).has_record
    # read again, because another process may have finished the file in the meantime
    finished = find_valid(verifies_tensors=verifies_tensors).has_record
    not_finished = [encoder.name for encoder, _ in encoders if encoder.name not in finished]
    encoders_to_run = tuple(name for name in not_finished if name not in unfinished)
    return replace(
        file,
        encoders_to_run=encoders_to_run,
        has_partial_outputs=len(encoders_to_run) < len(not_finished),
        lacks_record=not all(finished.values()),
    )


class ValidOutputs(NamedTuple):
    """The valid text encoder outputs in the cache file of one caption."""

    entry: Entry | None  # None if the file is missing or damaged
    has_record: Mapping[str, bool]  # for each encoder with valid outputs: whether these have a record


def find_outputs(
    file: CaptionFile,
    encoders: Encoders,
    stores: Stores,
    in_part: bool = False,
    verifies_tensors: bool = True,
) -> ValidOutputs:
    """Return which encoders have valid outputs in a caption's cache, so that they need not run again.

    Outputs are valid if their record is up to date and their tensors are intact.

    Args:
        file: The caption and its cache file.
        encoders: Encoders of the family with their identities.
        stores: Stores of the run.
        in_part: Whether to search the unfinished file (`.part`). If any output in it is outdated, no outputs
            are returned, because merging the file would corrupt valid outputs.
        verifies_tensors: Whether to compare tensors with their checksums; otherwise only the header is read.

    Raises:
        CacheError: If another trainer's file does not fit this model.
    """
    store = stores.text_store(file.table)
    name = file.file_name + PART if in_part else file.file_name
    path = store.folder / name
    try:
        entry = store.read(name, verifies_tensors)
        records = text_records(entry)
    except CacheError as error:
        if name in store:
            logger.warning("%s. It is made again.", error)
        return ValidOutputs(None, {})
    accepts_no_record = stores.skip_existing and not in_part and not file.settings
    # a cache in another program's format needs no record, because that program writes none
    needs_no_record = store.is_shared or accepts_no_record
    has_record: dict[str, bool] = {}  # the encoders with valid outputs, by name
    for encoder, identity in encoders:
        record = records.get(encoder.name)
        if record is None:
            is_valid = needs_no_record and _is_valid_without_record(entry, encoder, file, path)
        else:
            outdated_reason = why_outdated(record, identity, file)
            if outdated_reason is not None:
                logger.debug("%s: %s", path, outdated_reason)
            is_valid = outdated_reason is None
            if is_valid and verifies_tensors:
                is_valid = _is_intact(entry, record)
        if is_valid:
            has_record[encoder.name] = record is not None
    outdated = records.keys() - has_record.keys()
    if in_part and (outdated or not has_record):
        return ValidOutputs(None, {})
    return ValidOutputs(entry, has_record)


def _is_intact(entry: Entry, record: TextRecord) -> bool:
    """Return whether an encoder's tensors match the checksums in their record; if not, log a warning."""
    try:
        verify_tensors(entry, record.crc32)
    except CacheError as error:
        logger.warning("%s. It is made again.", error)
        return False
    return True


def _is_valid_without_record(entry: Entry, encoder: TextEncoder, file: CaptionFile, path: Path) -> bool:
    """Return whether another program's text cache has this encoder's outputs for the caption."""
    is_same_caption = entry.metadata.get("caption1", file.caption) == file.caption
    if not is_same_caption or not encoder.keys <= entry.keys:
        return False
    if has_cache_metadata(encoder):
        encoder.check_metadata(path, entry.metadata)
    return True
