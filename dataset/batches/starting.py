"""Check before a model is loaded that caches can be read and match the media files."""

import contextlib
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dataset.batches.checks import shorten_fingerprint
from dataset.batches.finding import FoundItems
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.reading import read_batch
from dataset.cache.records import CacheChecks
from dataset.cache.store import Stores
from dataset.cache_files import parse_latent_name, text_file_name
from dataset.config import DatasetTable
from dataset.config_keys import IGNORE
from dataset.forms.composing import SHARED_CACHES
from dataset.listing import find_sources
from dataset.sources.audio import list_silent
from dataset.sources.clock import selects_frames_as_before
from dataset.sources.colors import reading_difference
from dataset.sources.media_source import MediaSource
from modules.console import format_count
from modules.errors import CacheError, DatasetError, MediaError
from protocols.data import CacheOrigin
from protocols.family import Family

logger = logging.getLogger(__name__)

FRAMES_DIFFER = (
    "%s is of an earlier version, which read control clips and masks without regard to their clip's rate: "
    "if the rates differ, as here, the frames do not match. Cache again: only such caches change.\n  %s"
)
DECODED_OTHERWISE = "%s is of an earlier version: %s. Cache again: only such caches change.\n  %s"
MAX_DECODED = 100  # clips that are decoded for one frame
MAX_READ, MAX_READ_BYTES = 1000, 1 << 30  # how much is read from caches: this takes a few seconds
MAX_LISTED = 50_000  # files of a folder, including captions
UNKNOWN_ENCODERS: Mapping[str, Mapping[str, str]] = {}  # for a training run that does not know its encoders


class _ReadCaches(NamedTuple):
    """An item whose caches were read, as a batch of one, before training."""

    item: TrainingItem
    caption_index: int
    origins: tuple[CacheOrigin, ...]  # who made the item's caches


def check_caches(
    family: Family,
    items: Sequence[TrainingItem],
    commands: CachingCommands,
    stores: Stores,
    encodes_texts_on_the_fly: bool,
    process: tuple[int, int] = (0, 1),
    condition_set: str = "",
    trained_encoder_ids: Mapping[str, Mapping[str, str]] = UNKNOWN_ENCODERS,
) -> None:
    """Read caches before training begins: all caches of a small dataset, a sample of a large one.

    At most MAX_READ items and captions and MAX_READ_BYTES are read; additional captions of an item come
    last. Items and texts that are encoded during training are not read. Logs warnings about caches from
    earlier versions, and about clips that lack some of their caches.

    Args:
        family: Family that is trained.
        items: Items of the run.
        commands: Commands that repair caches, for messages.
        stores: Stores of the run.
        encodes_texts_on_the_fly: Whether captions are encoded during training.
        process: Rank of this process, and number of processes; each reads a part.
        condition_set: Part of a batch that a teacher sees (`Batch.condition_set`); "" if there is no teacher.
        trained_encoder_ids: Identities of the trained model's text encoders by name, if cached texts are
            compared with them.

    Raises:
        CacheError: For everything that reading a batch would reject: damage, another encoder or release,
            changed captions.
    """
    rank, num_processes = process
    cached = [item for item in items if item.cache_info.on_the_fly_buckets is None]
    size_bytes = 0
    checks = CacheChecks()
    read_caches: list[_ReadCaches] = []
    for item, caption_index in itertools.islice(_sample_captions(cached), rank, None, num_processes):
        batch = read_batch(
            [item], family.latent, commands, checks=checks, captions=[caption_index], stores=stores
        )
        read_caches.append(_ReadCaches(item, caption_index, batch.cache_origins))
        for origin in batch.cache_origins:
            if origin.part in trained_encoder_ids:
                _require_trained_encoder(origin, trained_encoder_ids[origin.part], commands)
        if item.cache_info.has_cached_texts and not encodes_texts_on_the_fly:
            latents = family.latent.to_model(batch.tensor("latents"))
            family.batch_conditions(latents, batch)  # raises CacheError if the texts do not suit the model
            if condition_set:
                family.batch_conditions(latents, replace(batch, condition_set=condition_set))
        for tensors in batch.tensors.values():
            tensor_list = tensors if isinstance(tensors, list) else [tensors]
            size_bytes += sum(tensor.nbytes for tensor in tensor_list)
        if size_bytes > MAX_READ_BYTES:
            break
    _warn_of_earlier_versions(read_caches, family, commands)
    if rank == 0:  # what the first process has read is enough for a warning
        _warn_of_missing_windows(cached, read_caches, commands)


def _require_trained_encoder(
    origin: CacheOrigin, trained_id: Mapping[str, str], commands: CachingCommands
) -> None:
    """Raise CacheError if a cached embedding was not made by the text encoder that is trained."""
    # `trained_id` is the identity of the trained encoder: hashes by key. Text caches of other trainers have
    # no record and pass. Dtype, length and the tokenizer's files are not compared.
    if not origin.encoder:  # another program's cache
        return
    compared_keys = [key for key in trained_id if not key.endswith(("_dtype", "_tokenizer", "_chunks"))]
    for key in compared_keys:
        recorded = origin.encoder.get(key)
        if recorded != trained_id[key]:
            raise CacheError(
                f"{origin.path}: it was not made by the {origin.part.replace('_', ' ')} of the trained "
                f"checkpoint: its {key} is {shorten_fingerprint(str(recorded))}, but here it is "
                f"{shorten_fingerprint(trained_id[key])}. Cache texts again:\n  {commands.text}\n  or add "
                "--skip_cache_check if both checkpoints have the same text encoders."
            )


def _sample_captions(cached: Sequence[TrainingItem]) -> Iterator[tuple[TrainingItem, int]]:
    """Yield up to MAX_READ random items, each with a caption index; further captions come last."""
    # a fixed seed, so that all processes draw the same sample and each can take its part
    sample = random.Random(0).sample(cached, min(len(cached), MAX_READ))
    first = ((item, 0) for item in sample)
    further = ((item, number) for item in sample for number in range(1, item.num_captions))
    return itertools.islice(itertools.chain(first, further), MAX_READ)


def _warn_of_earlier_versions(
    read_caches: Sequence[_ReadCaches], family: Family, commands: CachingCommands
) -> None:
    """Warn about caches from earlier versions that would be made differently now."""
    # Those versions decoded some clips differently, or timed control clips and masks separately: without
    # regard to their clip's frame rate.
    timed_separately: list[TrainingItem] = []
    decoded_earlier: list[tuple[TrainingItem, int]] = []  # each with its `LatentRecord.decoding_version`
    for item, caption_index, origins in read_caches:
        if caption_index != 0:  # further captions have the same latents
            continue
        for origin in origins:
            if origin.has_separate_timing:
                timed_separately.append(item)
            if origin.earlier_decoder_version is not None:
                decoded_earlier.append((item, origin.earlier_decoder_version))
    if timed_separately:
        _compare_frame_selection(timed_separately, family.defaults.fps, commands)
    if decoded_earlier:
        _compare_decoding(decoded_earlier, family.latent.keeps_alpha, commands)


def _warn_of_missing_windows(
    cached: Sequence[TrainingItem], read_caches: Sequence[_ReadCaches], commands: CachingCommands
) -> None:
    """Warn about clips with fewer cached items than the windows into which they were cut."""
    # `read_caches` record the number of windows; `cached` are all cached items of the run.
    num_windows: dict[tuple[int, str], int] = {}  # by table index and stem of the clip
    for item, _, origins in read_caches:
        clip = item.table.index, item.source_stem
        num_windows[clip] = max((origin.windows for origin in origins), default=0)
    num_cached = Counter((item.table.index, item.source_stem) for item in cached)
    incomplete = [clip for clip, expected in num_windows.items() if num_cached[clip] < expected]
    if incomplete:
        first_clip = incomplete[0]
        _, stem = first_clip
        logger.warning(
            "%s with fewer latents than windows, such as %s, %d of %d: the others are left out. Cache again: "
            "%s",
            format_count(len(incomplete), "clip"),
            stem,
            num_cached[first_clip],
            num_windows[first_clip],
            commands.latents,
        )


def _compare_frame_selection(items: Sequence[TrainingItem], fps: float, commands: CachingCommands) -> None:
    """Warn if an earlier version of this program took other frames of control clips and masks than this one.

    It did if their frame rate differs from the rate of their clip. The rates are read from the headers of the
    media files; missing files are skipped.
    """
    by_source = {(item.table.index, item.source_stem): item for item in items}
    for table in {item.table.index: item.table for item in items}.values():
        for source in _list_sources(table):
            item = by_source.get((table.index, source.stem))
            # tars and downloads are not opened for a warning
            if item is None or source.remote_or_packed:
                continue
            with contextlib.suppress(MediaError, OSError):
                if not selects_frames_as_before(source, fps):
                    logger.warning(FRAMES_DIFFER, item.latent_path, commands.latents)
                    return  # one warning is enough


def _compare_decoding(
    items: Sequence[tuple[TrainingItem, int]], keeps_alpha: bool, commands: CachingCommands
) -> None:
    """Warn about a cache from an earlier version that decoded a clip in another frame order or orientation.

    At most MAX_DECODED clips are checked, up to the first with a difference; missing files are skipped.

    Args:
        items: Pairs of an item and the `LatentRecord.decoding_version` in its record.
        keeps_alpha: `LatentSpec.keeps_alpha` of the family.
        commands: Caching commands, for the warning.
    """
    by_source: dict[tuple[int, str], tuple[TrainingItem, int]] = {}
    for item, decoder_version in items[:MAX_DECODED]:
        by_source[item.table.index, item.source_stem] = item, decoder_version
    for table in {item.table.index: item.table for item, _ in items}.values():
        for source in _list_sources(table):
            # tars and downloads are not opened for a warning
            if source.remote_or_packed or (table.index, source.stem) not in by_source:
                continue
            item, decoder_version = by_source[table.index, source.stem]
            with contextlib.suppress(MediaError, OSError):
                difference = reading_difference(source, keeps_alpha, decoder_version)
                if difference is not None:
                    logger.warning(DECODED_OTHERWISE, item.latent_path, difference, commands.latents)
                    return  # one warning is enough


def _list_sources(table: DatasetTable) -> Sequence[MediaSource]:
    """Return a table's media files; () if they cannot be listed."""
    with contextlib.suppress(DatasetError, OSError):
        return find_sources(table, captions=False, faults=[])
    return ()


class _SourceDifferences(NamedTuple):
    """How a table's media files and its caches differ."""

    without_latents: list[str]  # paths of media files that are not cached
    without_source: list[str]  # stems with latents, but without a file
    uncached_audio: list[str]  # clips whose audio is not cached


def compare_sources(
    tables: Iterable[DatasetTable],
    found: FoundItems,
    commands: CachingCommands,
    tag: str,
    trains_audio: bool = False,
) -> None:
    """Warn about media files without latents, latents without a media file, and audio that is not cached.

    The differences come from the index of the caches. Without an index, the folder is listed if it has at
    most MAX_LISTED files.

    Args:
        tables: Tables of the dataset file.
        found: Items that were found for them.
        commands: Caching commands, for messages.
        tag: The family's cache_tag.
        trains_audio: Whether the run trains audio.
    """
    for table in tables:
        items = [item for item in found.items if item.table.index == table.index]
        _compare_lengths(table, items, commands)
        if table.source.directory is None or not items or table.cache_format in SHARED_CACHES:
            continue
        if table.index in found.left_out:  # the index of the caches has the answer
            differences = _SourceDifferences(found.left_out[table.index], [], [])
        else:
            sources = _find_small_folder_sources(table, table.source.directory)
            if sources is None:
                continue
            checks_audio = trains_audio and table.kind == "video" and table.source.audio != IGNORE
            # `require_items` has warned about media without texts
            differences = _find_differences(sources, items, found.missing_text, tag, checks_audio)
        if any(differences):
            _warn_of_cache_differences(table, differences, commands)


def _warn_of_cache_differences(
    table: DatasetTable, differences: _SourceDifferences, commands: CachingCommands
) -> None:
    """Log a warning for each kind of difference between a table's media files and its caches."""
    warnings = (
        (differences.without_latents, "no latents", "not cached, too short or unreadable: left out"),
        (
            differences.without_source,
            "caches whose file no longer exists",
            "trained on until the table is cached again",
        ),
        (differences.uncached_audio, "sound that is not cached", "only their pictures are learned"),
    )
    for names, problem, consequence in warnings:
        if names:
            logger.warning(
                "%s: %s with %s, such as %s: %s. Cache again: %s",
                table.name,
                format_count(len(names), table.kind if table.kind == "image" else "clip"),
                problem,
                names[0],
                consequence,
                commands.latents,
            )


def _find_differences(
    sources: Mapping[str, MediaSource],
    items: Sequence[TrainingItem],
    missing_text: Collection[Path],
    tag: str,
    checks_audio: bool,
) -> _SourceDifferences:
    """Compare a folder's media files, by stem, with the training items found in the cache."""
    # `missing_text` are text caches, of all tables, of media with latents but without an item. `checks_audio`
    # says whether clips with audio must have cached audio.
    folder = items[0].table.cache_directory
    cached = {item.source_stem for item in items}
    without_latents = []
    for stem, source in sources.items():
        if stem not in cached and folder / text_file_name(stem, tag) not in missing_text:
            without_latents.append(str(source.path))
    uncached_audio: list[str] = []
    if checks_audio:
        silent_stems = {item.source_stem for item in items if not item.has_cached_audio}
        uncached_audio = [*map(str, list_silent(sources.values(), silent_stems))]
    return _SourceDifferences(without_latents, sorted(cached - sources.keys()), uncached_audio)


def _find_small_folder_sources(table: DatasetTable, folder: Path) -> dict[str, MediaSource] | None:
    """Return a table's media files by stem; None if `folder` is large or cannot be listed."""
    # The folder may be missing because only the caches were copied to this machine.
    try:
        with os.scandir(folder) as entries:
            if next(itertools.islice(entries, MAX_LISTED, None), None) is not None:
                return None
        return {source.stem: source for source in find_sources(table, captions=False, faults=[])}
    except (DatasetError, OSError):
        return None


def _compare_lengths(table: DatasetTable, items: Sequence[TrainingItem], commands: CachingCommands) -> None:
    """Log a warning about target_frames without caches, and cached frame counts not in target_frames."""
    if table.kind != "video" or table.buckets.frame_extraction == "full" or not items:
        return
    first_name = parse_latent_name(items[0].file_name, items[0].cache_info.tag, table.kind)
    if first_name is None or first_name.section is not None:  # sections have their own length
        return
    cached = {item.bucket[2] for item in items}  # numbers of frames
    targets = {*table.buckets.target_frames}
    lines = []
    if targets - cached:
        lengths = ", ".join(map(str, sorted(targets - cached)))
        lines.append(
            f"{lengths} frames are in no cache: all clips are shorter, or the length was added after caching"
        )
    if cached - targets:
        lengths = ", ".join(map(str, sorted(cached - targets)))
        lines.append(
            f"{lengths} frames are in caches, but not in target_frames: they are trained on until cached "
            "again"
        )
    for line in lines:
        logger.warning("%s: clips of %s. Cache again: %s", table.name, line, commands.latents)
