"""Encode the latents of a dataset, in shares that processes on any machine can work on independently.

Existing caches are listed before the sources, so that entries and sources added in the meantime never count
as stale.
"""

import contextlib
import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch

from dataset.cache.records import LatentRecord
from dataset.cache.store import (
    ExistingNames,
    LatentNames,
    Names,
    Stores,
    npz_names,
    remove_caches,
)
from dataset.cache_files import SUFFIX, LatentName, is_latent_cache
from dataset.caching import audio, latents, prefetch
from dataset.caching.audio import AudioCachingFamily, AudioWork
from dataset.caching.planning import LatentCacheSettings, SourcePlan, plan_all
from dataset.caching.precomputed import reject_moments, use_moments
from dataset.caching.taking_over import OtherCaches
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import IGNORE
from dataset.listing import warn_captions, warn_unused
from dataset.options import CachingOptions
from dataset.sources.decoding import DecodedMedia, check_resolution
from dataset.sources.frames import find_wrong_rates, media_table
from dataset.sources.media_source import LISTED, Fault, MediaSource
from dataset.sources.remarks import find_media_warnings, log_warnings
from dataset.subsets import reject_changing
from modules.atomic_write import free_bytes
from modules.bars import Bar
from modules.console import Row, format_count, format_size, pluralize, show_box
from modules.devices import free_memory
from modules.errors import DatasetError
from protocols.data import FPS, CacheEntry, MediaEncoders
from protocols.family import Caches, get_audio_spec, trains_audio
from protocols.rules import ReferenceMedium

logger = logging.getLogger(__name__)

NUMBER_BYTES = 2  # bytes of a latent value, for an estimate: some families cache float32, which takes 4


@dataclass
class _TableMedia:
    """Facts about a table's media that decide whether a model family can use the table."""

    has_control: bool = False
    companions: list[MediaSource] = field(default_factory=list)  # items with references or control masks
    reference_media: list[tuple[ReferenceMedium, ...]] = field(default_factory=list)  # of each row


def _check_tables(family: Caches, config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError with all reasons why the model family cannot use the tables."""
    errors = []
    audio_spec = get_audio_spec(family)
    trains_audio_only = audio_spec is not None and audio_spec.audio_only
    media_by_table: defaultdict[int, _TableMedia] = defaultdict(_TableMedia)  # by table index
    for source in sources:
        media = media_by_table[source.table.index]
        media.has_control = media.has_control or bool(source.control)
        if source.table.references.reads_row_references:
            media.reference_media.append(source.row_references)
        if source.references or source.control_mask is not None:
            media.companions.append(source)
    for table in config.datasets:
        media = media_by_table[table.index]
        try:
            _check_table(family, table, media)
            if trains_audio_only or table.source.is_audio_only:
                _check_audio(table, trains_audio_only)
        except DatasetError as error:
            # image trainers use this key for control images and, with --masked_loss, for masks
            may_be_masks = media.has_control and table.source.conditioning_directory is not None
            errors.append(f"{error}{MASKS_HINT}" if may_be_masks else str(error))
    if errors:
        raise DatasetError("\n".join(errors))


def _check_table(family: Caches, table: DatasetTable, media: _TableMedia) -> None:
    """Raise DatasetError if a model family cannot use a table with these media."""
    if table.group is not None:
        reject_changing(table, table.buckets.augmentation.varying_keys, "latents")
    # checked first: precomputed latents ignore keys that the family's own check rejects
    if table.source.has_precomputed_latents:
        reject_moments(family, table)
    check_resolution(table, family.latent.pixel_step)
    described_table = media_table(
        table,
        has_control=media.has_control,
        has_references=bool(media.companions),
        has_guides=table.references.has_guides,
        reference_media=tuple(media.reference_media),
    )
    family.check_table(described_table)
    if media.companions:
        from dataset.sources.companions import reject_companions  # few tables have companions

        reject_companions(table, media.companions)


def _check_audio(table: DatasetTable, trains_audio_only: bool) -> None:
    """Raise DatasetError if a table has no audio in an audio-only run, or only audio in another run."""
    if trains_audio_only and (table.kind == "image" or table.source.audio == IGNORE):
        why = "it has images" if table.kind == "image" else 'audio = "ignore" leaves none'
        raise DatasetError(f"{table.name}: this run trains audio only, and {why}. Omit the table")
    if table.source.is_audio_only and not trains_audio_only:
        raise DatasetError(
            f"{table.name}: it has audio files, but this run trains on images. Use the mode audio, "
            "which trains audio only"
        )


def _check_sources(
    family: Caches, config: DatasetConfig, sources: Sequence[MediaSource]
) -> Sequence[MediaSource]:
    """Check the media files and the model family's files before encoding; return the media to encode."""
    _check_tables(family, config, sources)
    warn_captions(sources)
    # only lists have columns that may be unused, and only models that edit take reference images
    if any(table.source.directory is None or table.references.rules is not None for table in config.datasets):
        warn_unused(config, sources)
    family.check_named_files()
    if any(source.precomputed is not None for source in sources):
        return use_moments(family, sources)
    return sources


def _describe_item(item: DecodedMedia, name: LatentName) -> dict[str, str]:
    """Return the metadata that all cache files of an item share: its size, and for clips frames and rate."""
    width, height = name.size
    metadata = {"width": str(width), "height": str(height)}
    if name.span is not None:
        _, num_frames = name.span
        metadata["frame_count"] = str(num_frames)
    if item.rate is not None:  # also in the header, because training reads only headers to form batches
        metadata[FPS] = repr(item.rate)
    return metadata


class MediaWork:
    """Encodes and caches the latents of a dataset.

    Encoders are loaded when they are first needed and stay loaded until `free` is called. Video and
    audio encoders are never on the device at the same time.
    """

    def __init__(
        self,
        family: Caches,
        config: DatasetConfig,
        options: CachingOptions,
        device: torch.device,
        stores: Stores | None = None,
    ) -> None:
        """List existing cache files and all media files; nothing is encoded yet.

        `stores` replaces the cache folders of the tables.

        Raises:
            DatasetError: If the dataset cannot be used.
            CheckpointError: If the file of an encoder cannot be used.
        """
        self._family, self._config = family, config
        self._options, self._device = options, device
        self._encoders: MediaEncoders | None = None
        self.stores = dataclasses.replace(
            stores or Stores(npz_names(family)), skip_existing=options.skip_existing, verify=options.verify
        )
        self._existing: ExistingNames = {
            table.index: LatentNames(self.stores.latent_store(table), family.cache_tag, table.kind)
            for table in config.datasets
        }
        self._audio: AudioWork | None = None
        if not family.latent.caches_audio and trains_audio(family):
            self._audio = audio.AudioWork(
                cast("AudioCachingFamily", self._family),
                tables=self._config.datasets,
                stores=self.stores,
                device=self._device,
                before_loading=self.free,
            )
        listing = prefetch.list_sources(config, captions=False)
        self.listing_report = listing.report
        self.complete_tables = listing.complete_tables
        self.work_items: Sequence[MediaSource] = _check_sources(family, config, listing.sources)
        self.stores.require_declared_formats(config.datasets, family.cache_tag)
        self._cache_settings = LatentCacheSettings(
            tag=family.cache_tag,
            encoder_identity=family.media_identity,
            latent=family.latent,
            fps=family.defaults.fps,
            count_sections=family.sections_of,
            stores=self.stores,
            stores_frame_rate=family.abilities.takes_fps,
            audio=get_audio_spec(family),
        )

    def encode(self, sources: Sequence[MediaSource], label: str | None) -> prefetch.CacheReport:
        """Encode the items of `sources` that have no valid cache.

        An unreadable media file becomes a failure in the report and does not stop the run. `label` names this
        share of the work; None means that no progress is shown.

        Raises:
            CheckpointError: If an encoder cannot be loaded.
            OutputError: If a cache file cannot be written.
        """
        workers = prefetch.count_workers(self._options)
        shows = label is not None
        plans, failures = plan_all(
            sources,
            existing=self._existing,
            cache_settings=self._cache_settings,
            workers=workers,
            show_progress=shows,
        )
        if self._family.latent.shares_caches:
            plans = self._copy_from_other_models(plans, shows)
        # missing_spans is None for sources whose items are unknown until they are decoded
        to_do = [plan for plan in plans if plan.missing_spans is None or plan.missing_spans]
        self._warn_about_media([plan.source for plan in to_do])
        if label is not None:
            self._show_start(to_do, len(sources), label)
        incompatible = [plan for plan in to_do if plan.is_incompatible]
        if incompatible and shows:
            # the caches of other settings may be needed for another model
            logger.warning(
                "%s, which this command replaces. If they are to stay, press Ctrl-C, and set another "
                "cache_directory or use the options that made them. The first: %s",
                pluralize(len(incompatible), "sources have cache files of another kind"),
                incompatible[0].outdated_reason,
            )
        results = _EncodedMedia([plan for plan in plans if plan.missing_spans == ()], list(failures))
        if to_do:
            self._encode_missing(to_do, results, workers=workers, shows=shows)
        outdated = [plan for plan in results.finished if plan.outdated_reason is not None]
        if len(outdated) > len(incompatible):  # some have not been logged
            logger.info(
                "%d sources had outdated cache files, which were replaced. The first: %s",
                len(outdated),
                outdated[0].outdated_reason,
            )
        report = _make_report(results, num_assigned=len(sources), num_total=len(self.work_items))
        if self._audio is None:
            return report
        audio_report = self._audio.encode(sources, report.valid, workers, shows)
        return prefetch.join_reports([report, audio_report])

    def _copy_from_other_models(self, plans: Sequence[SourcePlan], shows: bool) -> list[SourcePlan]:
        """Copy latents that another model with the same VAE has cached; return what remains to be encoded."""
        others = OtherCaches(self._family, self._cache_settings)
        remaining = [plan if plan.missing_spans == () else others.copy_for_source(plan) for plan in plans]
        if shows:
            others.log_results()
        return remaining

    def _encode_missing(
        self, plans: Sequence[SourcePlan], results: "_EncodedMedia", workers: int, shows: bool
    ) -> None:
        """Decode the media of these plans in threads; encode and write their missing items in batches."""
        items = self._decode_items(plans, results, workers=workers, shows=shows)
        batches = prefetch.fill_batches(
            items,
            get_group=lambda item: item.group,
            get_batch_size=lambda item: self._options.batch_size or item.source.table.learning.batch_size,
            get_num_bytes=lambda item: item.size_bytes,
            max_bytes=latents.PARTIAL_BYTES,
        )
        with prefetch.write_behind() as write, contextlib.closing(items), torch.no_grad():
            for batch in batches:
                results.written |= self._encode_and_write(batch, write)
                del batch  # frees its frames before waiting for the next source

    def _warn_about_media(self, sources: Sequence[MediaSource]) -> None:
        """Log warnings about media files whose frame rate, frame order or colors may be wrong."""
        cache_settings = self._cache_settings
        warnings: list[Fault] = []
        # with a number as source_fps, the rate is not taken from the files and may differ from theirs
        if any(table.buckets.declared_fps is not None for table in self._config.datasets):
            warnings += find_wrong_rates(sources)
        warnings += find_media_warnings(
            sources, cache_settings.latent, cache_settings.fps, cache_settings.stores_frame_rate
        )
        log_warnings(warnings, LISTED)

    def remove_stale(
        self,
        table: DatasetTable,
        valid: Collection[tuple[int, str]],
        failed: Collection[str],
        keep_cache: bool,
    ) -> int:
        """Remove a table's cache files that belong to no item; return their number.

        Args:
            table: Table whose cache files are removed.
            valid: Table index and name of the valid files of all processes.
            failed: Stems of media files that failed; their cache files stay.
            keep_cache: Whether to remove nothing.
        """
        if keep_cache:
            return 0
        valid_names = {name for index, name in valid if index == table.index}
        num_removed = 0
        if self._audio is not None:
            num_removed += self._audio.remove_stale(table, valid_names, failed)
        # files of this table that no item has, except files of media that could not be read
        stale = self._existing[table.index].list_stale(valid_names, failed)
        if stale:
            is_family_cache = partial(is_latent_cache, architecture=self._family.name)
            num_removed += remove_caches(self.stores.latent_store(table), stale, is_family_cache)
        return num_removed

    def free(self) -> None:
        """Free the memory of the loaded video and audio encoders."""
        if self._encoders is not None:
            self._encoders = None
            free_memory(self._device)
        if self._audio is not None:
            self._audio.free()

    def _decode_items(
        self, plans: Sequence[SourcePlan], results: "_EncodedMedia", workers: int, shows: bool
    ) -> Generator[DecodedMedia, None, None]:
        """Yield the missing items of the plans in order, while threads decode the next media files."""
        # Completed plans and unreadable media files are added to `results`.
        ahead = prefetch.read_ahead(
            plans,
            get_source=lambda plan: plan.source,
            work=lambda plan: latents.decode(
                plan, self._existing[plan.source.table.index], self._cache_settings
            ),
            workers=workers,
            bar=Bar(len(plans), "Encoding", "source", shows, shows_immediately=True),
            decodes=True,
        )
        with contextlib.closing(ahead):
            for _, result in ahead:
                if isinstance(result, prefetch.Failure):
                    results.failures.append(result)
                else:
                    plan, items = result
                    results.finished.append(plan)
                    yield from items
                    del items
                del result  # frees its frames before waiting for the next source

    def _encode_and_write(self, batch: Sequence[DecodedMedia], write: prefetch.Write) -> set[tuple[int, str]]:
        """Encode a batch and pass its cache files to `write`; return table index and name of each file."""
        # Files of sections that an item no longer has are removed afterwards.
        if self._encoders is None and not batch[0].moments:
            self.free()  # video and audio encoders are not loaded at the same time
            self._encoders = latents.load_encoders(self._family, self._device)
        cache_names = []
        for item in batch:
            if item.source.table.kind == "image":
                cache_name = LatentName(item.source.stem, item.size)
            else:
                cache_name = LatentName(item.source.stem, item.bucket, item.spans[0])
            cache_names.append(cache_name)
        keys = [name.file_name(self._cache_settings.tag).removesuffix(SUFFIX) for name in cache_names]
        encoded = latents.encode(batch, keys, self._family, self._encoders)
        written: set[tuple[int, str]] = set()
        for item, cache_name, entries in zip(batch, cache_names, encoded, strict=True):
            files = self._schedule_writes(item, cache_name, entries, write)
            written |= {(item.source.table.index, file) for file in files}
            existing = self._existing[item.source.table.index].of(item.source.stem)
            if existing:
                surplus = _list_surplus(existing, cache_name, files)
                if surplus:
                    is_family_cache = partial(is_latent_cache, architecture=self._family.name)
                    write(
                        partial(
                            remove_caches,
                            self.stores.latent_store(item.source.table),
                            surplus,
                            is_family_cache,
                        )
                    )
        return written

    def _schedule_writes(
        self, item: DecodedMedia, name: LatentName, entries: Sequence[CacheEntry], write: prefetch.Write
    ) -> list[str]:
        """Schedule the writing of an item's cache files, one for each entry (section); return their names."""
        # `write` runs each write in another thread.
        options = self._cache_settings.record_options(
            item.source, size=item.size, bucket=item.bucket, span=item.spans[0]
        )
        record = LatentRecord(
            encoder=self._cache_settings.encoder_identity,
            options=options,
            files=item.files,
            clip=item.clip,
            parts=len(entries),
            crc32={},  # filled in by `write_entry`
        )
        item_metadata = _describe_item(item, name)
        fingerprints = {}
        if self._family.latent.required_metadata:  # other programs that read these caches require them
            paths_and_origins = self._cache_settings.source_files(item.source)
            # sizes and modification times by path
            stamps = {}
            for identity, (path, _) in zip(item.files, paths_and_origins, strict=True):
                stamps[str(path.absolute())] = f"{identity.size_bytes}-{identity.mtime_ns}"
            fingerprints["media_fingerprints"] = json.dumps(stamps, sort_keys=True)
        files = []
        for entry in entries:
            file = dataclasses.replace(name, section=entry.section).file_name(self._cache_settings.tag)
            write_file = partial(
                latents.write_entry,
                self.stores.latent_store(item.source.table),
                self._family,
                file=file,
                named=latents.name_tensors(item, entry, self._family.latent),
                record=record,
                additional_metadata={**item_metadata, **entry.metadata, **fingerprints},
            )
            write(write_file)
            files.append(file)
        return files

    def _show_start(self, to_do: Sequence[SourcePlan], num_sources: int, label: str) -> None:
        """Show how many media files will be encoded; `label` names this run's share of the work."""
        sources = format_count(num_sources, "source")
        rows: list[Row] = [
            ("data", str(self._config.path)),
            (f"latents{label}", f"{sources}, {len(to_do)} of them to encode"),
            ("disk", self._describe_disk(to_do)),
            ("device", str(self._device)),
        ]
        show_box("Caching latents", rows)

    def _describe_disk(self, plans: Sequence[SourcePlan]) -> str | None:
        """Return the estimated disk space for latents as text; None if no size is known yet."""
        sizes = [size for plan in plans for size in plan.item_sizes]  # width, height; for clips also frames
        # `missing_spans` is None until the size of a source is known
        num_with_sizes = sum(plan.missing_spans is not None for plan in plans)
        if not sizes:
            return None
        latent = self._family.latent
        _, height_stride, width_stride = latent.stride
        num_values = 0
        for width, height, *lengths in sizes:
            num_frames = lengths[0] if lengths else 1  # the size of an image has no third number
            latent_frames = latent.count_latents(num_frames)
            latent_pixels = (height // height_stride) * (width // width_stride)
            num_values += latent.channels * latent_frames * latent_pixels
        # sources of unknown size are assumed to have the average size
        needed = num_values * NUMBER_BYTES * len(plans) / num_with_sizes  # bytes
        free = free_bytes(self._config.datasets[0].cache_directory)
        return f"about {format_size(needed)}, more with control or start images; {format_size(free)} free"


MASKS_HINT = (
    " If conditioning_data_dir holds masks of the loss, train with --masked_loss, or call the key "
    "mask_directory."
)


def _list_surplus(existing: Names, item: LatentName, files: Collection[str]) -> list[str]:
    """Return the existing cache files of an item that are not among its current `files`."""
    # `existing` are the files of the item's clip; `item` has the size and the span of the item.
    surplus = []
    for file, name in existing.items():
        matches_item = (name.size, name.span) == (item.size, item.span)
        if matches_item and file not in files:
            surplus.append(file)
    return surplus


@dataclass
class _EncodedMedia:
    """Results of encoding a share of the media files."""

    finished: list[SourcePlan]  # plans whose items are known
    failures: list[prefetch.Failure]  # media files that could not be read
    written: set[tuple[int, str]] = field(default_factory=set)  # table index and name of each written file


def _make_report(results: _EncodedMedia, num_assigned: int, num_total: int) -> prefetch.CacheReport:
    """Return the report about the media files that this process has handled."""
    finished, written = results.finished, results.written
    reused = {(plan.source.table.index, name) for plan in finished for name in plan.valid_files}
    dropped, shortened, resized, silent = [], [], [], []
    for plan in finished:
        if plan.why_no_items is not None:
            dropped.append(prefetch.Failure.of(plan.source, plan.why_no_items))
        if plan.too_short_for is not None:
            shortened.append(prefetch.Failure.of(plan.source, plan.too_short_for))
        if plan.size_changes:
            resized.append(prefetch.Failure.of(plan.source, "; ".join(plan.size_changes)))
        if plan.silence_reason is not None:
            silent.append(prefetch.Failure.of(plan.source, plan.silence_reason))
    return prefetch.CacheReport(
        written=len(written),
        reused=sum(len(plan.valid_files) for plan in finished),
        num_without_record=sum(plan.num_without_record for plan in finished),
        failures=tuple(results.failures),
        dropped=tuple(dropped),
        shortened=tuple(shortened),
        resized=tuple(resized),
        silent=tuple(silent),
        num_assigned=num_assigned,
        num_total=num_total,
        valid=frozenset(reused | written),
    )
