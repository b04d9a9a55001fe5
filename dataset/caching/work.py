"""The work of caching a dataset, in parts that any process on any machine can do by itself.

Names of existing caches are listed before the sources are: an entry that was there belongs to a source that
was there, so additions meanwhile never count as stale.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.cache.forms import require_form
from dataset.cache.index import Indexes
from dataset.cache.npz import NpzNames
from dataset.cache.store import Stores
from dataset.caching.existing import ExistingNames, LatentNames, list_texts
from dataset.caching.given_tensors import refuse_moments, use_moments
from dataset.caching.latents import EncodersOnDemand, LatentEncoding
from dataset.caching.planning import (
    Caches,
    Recipe,
    SourcePlan,
    latent_index,
    media_table,
    plan_all,
)
from dataset.caching.reports import CacheReport, Failure
from dataset.caching.text_plans import CaptionFile, KnownTexts, list_caption_files, text_index
from dataset.caching.texts import TextBatch, TextEncoding, text_batches
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import CachingOptions, ShardOptions
from dataset.sources.decoding import check_resolution
from dataset.sources.faults import LISTED, Fault, list_faults
from dataset.sources.listing import (
    find_all_sources,
    require_captions,
    warn_missing_captions,
    warn_unreadable_captions,
)
from dataset.sources.media_source import MediaSource
from dataset.sources.rates import find_wrong_rates
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

# shows what is to do: how many sources there are, and the plans of those to encode
Announce = Callable[[int, Sequence[SourcePlan]], None]


@dataclass(frozen=True)
class EntryPlaces:
    """Where the entries of a run are kept."""

    stores: Stores
    trusts: bool = False  # shared files that are there are taken to be right, unread

    def require_form(self, config: DatasetConfig, tag: str) -> None:
        """Raise DatasetError if caches are there in another form than tables say that decide it."""
        tables = tuple(table for table in config.datasets if table.index not in self.stores.given)
        require_form(DatasetConfig(config.path, tables), tag)


@dataclass(frozen=True)
class EncodedPart:
    """Results for a part of the sources."""

    report: CacheReport
    right: frozenset[tuple[int, str]]  # table index and name of each valid entry


class MediaWork:
    """The latents of a dataset. The encoders are loaded when they are first needed and stay until `free`."""

    def __init__(
        self,
        family: Caches,
        config: DatasetConfig,
        options: CachingOptions,
        device: torch.device,
        places: EntryPlaces | None = None,
    ) -> None:
        """List entries and sources. places: where entries are kept, if not where the tables say.

        Raises DatasetError if the dataset cannot be used, CheckpointError if a file of an encoder is wrong.
        """
        places = places or EntryPlaces(Stores(npz_names(family)))
        self.stores = places.stores
        self.existing: ExistingNames = {
            table.index: LatentNames(self.stores.of(table), family.cache_tag, table.kind)
            for table in config.datasets
        }
        sources, self.not_listed, self.whole_tables = _list_sources(config, captions=False)
        _check_tables(family, config, sources)
        warn_missing_captions(sources)
        warn_unreadable_captions(sources)
        family.check_given_files()
        self.sources: Sequence[MediaSource] = use_moments(family, sources)
        places.require_form(config, family.cache_tag)
        self._recipe = recipe_of(family, options, self.stores, places.trusts)
        self._family = family
        self._config = config
        self._options = options
        self._encoders = EncodersOnDemand(family, device)

    def encode(
        self, sources: Sequence[MediaSource], show: bool, announce: Announce | None = None
    ) -> EncodedPart:
        """Encode every item of some sources that has no valid entry.

        A source that cannot be read becomes a failure of the report and does not stop the others. Raises
        CheckpointError if an encoder cannot be loaded, OutputError if an entry cannot be written.
        """
        recipe, workers = self._recipe, workers_of(self._options)
        plans, failures = plan_all(sources, self.existing, recipe, workers, show)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        wrong = find_wrong_rates([plan.source for plan in to_do])
        if wrong:  # told and done: the option decides, as a file's header may be wrong
            logger.warning("%s", escape_control_codes("\n".join(list_faults(wrong, LISTED))))
        if announce is not None:
            announce(len(plans) + len(failures), to_do)
        encoding = LatentEncoding(self._family, recipe, self._encoders, self._options.batch_size)
        if to_do:
            encoding.run(to_do, self.existing, workers, show)
        finished = [plan for plan in plans if plan.missing == ()] + encoding.finished
        log_outdated(finished)
        report = CacheReport(
            written=len(encoding.written),
            kept=sum(len(plan.kept) for plan in finished),
            foreign=sum(plan.foreign for plan in finished),
            failures=(*failures, *encoding.failures),
            dropped=tuple(
                Failure.of(plan.source, plan.reason) for plan in finished if plan.reason is not None
            ),
            shortened=tuple(
                Failure.of(plan.source, plan.short) for plan in finished if plan.short is not None
            ),
            share=len(sources),
            whole=len(self.sources),
        )
        kept = {(plan.source.table.index, name) for plan in finished for name in plan.kept}
        return EncodedPart(report, frozenset(kept | encoding.written))

    @property
    def index(self) -> Indexes[Any]:
        """Return the facts about the entries."""
        return self._recipe.index

    def encode_shard(self, shard: ShardOptions) -> CacheReport:
        """Encode a shard, so that it survives. Raises as `encode` does."""
        report = self.encode(shard.of(self.sources), show=False).report
        self.stores.finish(self._config.datasets)
        return report

    def free(self) -> None:
        """Free the encoders."""
        self._encoders.free()


class TextWork:
    """The texts of a dataset, in the batches in which they are encoded."""

    def __init__(
        self,
        family: Caches,
        config: DatasetConfig,
        options: CachingOptions,
        device: torch.device,
        show: bool,
        places: EntryPlaces | None = None,
    ) -> None:
        """List entries and captions. show: whether this process shows its progress. places: see `MediaWork`.

        Raises DatasetError if the dataset cannot be used or a caption is missing, CheckpointError if a file
        of an encoder is wrong.
        """
        places = places or EntryPlaces(Stores(npz_names(family)))
        self.stores = places.stores
        self.existing: Mapping[int, Collection[str]] = {
            table.index: list_texts(self.stores.of(table), family.cache_tag) for table in config.datasets
        }
        for table in config.datasets:
            _refuse_changing(table, table.changes.varying_keys, "texts")
        sources, self.not_listed, self.whole_tables = _list_sources(config, captions=True)
        self.sources: Sequence[MediaSource] = sources
        require_captions(self.sources)
        family.check_given_files()
        self._config = config
        places.require_form(config, family.cache_tag)
        self.files = distinct_texts(list_caption_files(self.sources, family.cache_tag), self.stores)
        self.batches: Sequence[TextBatch] = text_batches(self.files, options.batch_size)
        self.index = text_index(options.verify)
        known = KnownTexts(self.stores, self.index, places.trusts)
        self._encoding = TextEncoding(
            family, device, workers_of(options), options.skip_existing, show, self.stores, known
        )

    def encode(self, batches: Sequence[TextBatch]) -> CacheReport:
        """Encode every caption of some batches that has no valid entry, one encoder after the other.

        Raises CheckpointError if an encoder cannot be loaded, OutputError if an entry cannot be written.
        """
        done = self._encoding.run(batches)
        return CacheReport(
            done.written, done.kept, done.foreign, share=sum(map(len, batches)), whole=len(self.files)
        )

    def encode_shard(self, shard: ShardOptions) -> CacheReport:
        """Encode a shard, so that it survives. Raises as `encode` does."""
        report = self.encode(shard.of(self.batches))
        self.stores.finish(self._config.datasets)
        return report

    def free(self) -> None:
        """Free the encoders."""
        self._encoding.free()


def _list_sources(
    config: DatasetConfig, captions: bool
) -> tuple[list[MediaSource], CacheReport, list[DatasetTable]]:
    """Return all sources, a report of unreadable ones, such as the end of a tar, and the completely listed
    tables: only their entries can be stale.
    """
    skipped: list[tuple[DatasetTable, Fault]] = []
    sources = find_all_sources(config, captions, skipped=skipped)
    failures = [Failure(table.source, fault.text, table.index, fault.stem or "") for table, fault in skipped]
    broken = {table.index for table, _ in skipped}
    whole = [table for table in config.datasets if table.index not in broken]
    return sources, CacheReport(failures=tuple(failures)), whole


MASKS_HINT = (
    " If conditioning_data_dir holds masks of the loss, train with --masked_loss, or call the key "
    "mask_directory."
)


def _check_tables(family: Caches, config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError with the reasons of all tables that cannot be cached."""
    problems = []
    controlled = {source.table.index for source in sources if source.control}
    for table in config.datasets:
        has_control = table.index in controlled
        try:
            _refuse_changing(table, table.augmentation.varying_keys, "latents")
            # first: load_tensors ignores the keys that a family's own check would have changed
            refuse_moments(family, table)
            check_resolution(table, family.latent.pixel_step)
            family.check_table(media_table(table, has_control))
        except DatasetError as error:
            is_hint = has_control and table.conditioning_directory is not None
            problems.append(f"{error}{MASKS_HINT if is_hint else ''}")
    if problems:
        raise DatasetError("\n".join(problems))


def _refuse_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if the items to cache change each time. keys: that make it so."""
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Leave out the keys, or train without caching these."
        )


def log_outdated(plans: Sequence[SourcePlan]) -> None:
    """Log why existing files were made again, so that the extra work is explained."""
    reasons = [plan.outdated for plan in plans if plan.outdated is not None]
    if reasons:
        logger.info(
            "%d sources had outdated cache files, which were made again. The first: %s",
            len(reasons),
            reasons[0],
        )


def distinct_texts(files: Sequence[CaptionFile], stores: Stores) -> Sequence[CaptionFile]:
    """Return the texts without those that an earlier table has in the same shared file.

    Raises DatasetError if their captions differ.
    """
    seen: dict[tuple[Path, str], CaptionFile] = {}
    for file in files:
        store = stores.of(file.table)
        folder = store.folder if store.is_shared(file.file_name) else file.table.cache_directory
        first = seen.setdefault((folder, file.file_name), file)
        if first is not file and first.caption != file.caption:
            raise DatasetError(
                f"{file.table.name}: the caption of {file.name} is {file.caption!r} here, but "
                f"{first.caption!r} in {first.table.name}, and both have one npz file.\n  Let the tables "
                "make equal captions, or keep the embeddings elsewhere: --cache_text_encoder_outputs without "
                "_to_disk"
            )
    return list(seen.values())


def npz_names(family: Caches) -> NpzNames:
    """Return how a family's caches are named in npz files."""
    # the keys may be known only if all encoders are given, which a check does not need
    has_npz = family.latent.npz is not None
    return NpzNames(family.cache_tag, family.latent, family.text_keys if has_npz else frozenset())


def recipe_of(family: Caches, options: CachingOptions, stores: Stores, trusts: bool = False) -> Recipe:
    """Return how this run makes latents. Reads the identity of the encoders' files."""
    latent, fps, encoder = family.latent, family.defaults.fps, family.media_identity
    skip_existing, index = options.skip_existing, latent_index(options.verify)
    sections = family.sections_of
    return Recipe(family.cache_tag, encoder, latent, fps, skip_existing, sections, stores, index, trusts)


def workers_of(options: CachingOptions) -> int:
    """Return how many threads read ahead."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)
