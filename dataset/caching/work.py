"""The work of caching a dataset, in parts that any process on any machine can do by itself: the latents, and
what the texts (texts.py) need too.

Names of existing caches are listed before the sources are: an entry that was there belongs to a source that
was there, so additions meanwhile never count as stale.
"""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dataset.cache.files import is_latent_cache, parse_latent_name
from dataset.cache.forms import require_form
from dataset.cache.npz import NpzNames
from dataset.cache.store import Stores
from dataset.caching.existing import (
    Caches,
    ExistingNames,
    LatentNames,
    refuse_moments,
    remove_caches,
    use_moments,
)
from dataset.caching.latents import EncodersOnDemand, LatentEncoding
from dataset.caching.planning import Recipe, SourcePlan, media_table, plan_all
from dataset.caching.reports import CacheReport, Failure
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import CachingOptions
from dataset.sources.decoding import check_resolution
from dataset.sources.faults import LISTED, Fault, list_faults
from dataset.sources.listing import find_all_sources, warn_missing_captions, warn_unreadable_captions
from dataset.sources.media_source import MediaSource
from dataset.sources.rates import find_wrong_rates
from modules.atomic_write import free_bytes
from modules.console import Row, as_size, show_box
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

NUMBER_BYTES = 2  # of a latent; float32 ones take twice as much


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
        places = places_of(family, places)
        self.stores = places.stores
        self._existing: ExistingNames = {
            table.index: LatentNames(self.stores.of(table), family.cache_tag, table.kind)
            for table in config.datasets
        }
        sources, self.not_listed, self.whole_tables = list_sources(config, captions=False)
        _check_tables(family, config, sources)
        warn_missing_captions(sources)
        warn_unreadable_captions(sources)
        family.check_given_files()
        self.pieces: Sequence[MediaSource] = use_moments(family, sources)
        places.require_form(config, family.cache_tag)
        self._recipe = Recipe(
            family.cache_tag,
            family.media_identity,
            family.latent,
            family.defaults.fps,
            options.skip_existing,
            family.sections_of,
            self.stores,
            options.verify,
            places.trusts,
        )
        self.index = self._recipe.index
        self._family, self._config, self._options, self._device = family, config, options, device
        self._encoders = EncodersOnDemand(family, device)

    def encode(self, pieces: Sequence[MediaSource], who: str | None) -> EncodedPart:
        """Encode every item of some sources that has no valid entry.

        A source that cannot be read becomes a failure of the report and does not stop the others. who: which
        share of the work this is, to show it; None shows nothing. Raises CheckpointError if an encoder cannot
        be loaded, OutputError if an entry cannot be written.
        """
        workers, shows = workers_of(self._options), who is not None
        plans, failures = plan_all(pieces, self._existing, self._recipe, workers, shows)
        to_do = [plan for plan in plans if plan.missing is None or plan.missing]
        wrong = find_wrong_rates([plan.source for plan in to_do])
        if wrong:  # told and done: the option decides, as a file's header may be wrong
            logger.warning("%s", escape_control_codes("\n".join(list_faults(wrong, LISTED))))
        if who is not None:
            rows: list[Row] = [
                ("data", str(self._config.path)),
                (f"latents{who}", f"{len(pieces)} sources, {len(to_do)} of them to encode"),
                ("disk", self._disk(to_do)),
                ("device", str(self._device)),
            ]
            show_box("Caching latents", rows)
        encoding = LatentEncoding(self._family, self._recipe, self._encoders, self._options.batch_size)
        if to_do:
            encoding.run(to_do, self._existing, workers, shows)
        finished = [plan for plan in plans if plan.missing == ()] + encoding.finished
        reasons = [plan.outdated for plan in finished if plan.outdated is not None]
        if reasons:  # so that the extra work is explained
            logger.info(
                "%d sources had outdated cache files, which were made again. The first: %s",
                len(reasons),
                reasons[0],
            )
        report = CacheReport(
            written=len(encoding.written),
            kept=sum(len(plan.kept) for plan in finished),
            foreign=sum(plan.foreign for plan in finished),
            failures=(*failures, *encoding.failures),
            dropped=tuple(Failure.of(one.source, one.reason) for one in finished if one.reason is not None),
            shortened=tuple(Failure.of(one.source, one.short) for one in finished if one.short is not None),
            share=len(pieces),
            whole=len(self.pieces),
        )
        kept = {(plan.source.table.index, name) for plan in finished for name in plan.kept}
        return EncodedPart(report, frozenset(kept | encoding.written))

    def remove_stale(
        self, table: DatasetTable, done: Sequence[EncodedPart], failed: Collection[str], keep_cache: bool
    ) -> int:
        """Remove the entries of a table that belong to no item; return how many there were.

        done: of all processes. failed: stems of sources that failed: theirs stay.
        """
        if keep_cache:
            return 0
        belongs = {name for one in done for index, name in one.right if index == table.index}
        store, family = self.stores.of(table), self._family
        stale = self._existing[table.index].not_in(belongs, but_of=failed)
        store.sweep(lambda name: parse_latent_name(name, family.cache_tag, table.kind) is not None)
        return remove_caches(store, stale, partial(is_latent_cache, architecture=family.name))

    def free(self) -> None:
        """Free the encoders."""
        self._encoders.free()

    def _disk(self, plans: Sequence[SourcePlan]) -> str | None:
        """Estimate what the latents of some sources take on disk; None if no size is known yet."""
        spec, sizes = self._family.latent, [size for plan in plans for size in plan.items]
        known = sum(plan.missing is not None for plan in plans)
        if not sizes:
            return None
        step, rows, columns = spec.stride

        def numbers(width: int, height: int, frames: int = 1) -> int:
            return spec.channels * ((frames - 1) // step + 1) * (height // rows) * (width // columns)

        needed = sum(numbers(*size) for size in sizes) * NUMBER_BYTES * len(plans) / known
        free = free_bytes(self._config.datasets[0].cache_directory)
        return f"about {as_size(needed)}, more with control or start images; {as_size(free)} free"


def list_sources(
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
            refuse_changing(table, table.augmentation.varying_keys, "latents")
            # first: load_tensors ignores the keys that a family's own check would have changed
            refuse_moments(family, table)
            check_resolution(table, family.latent.pixel_step)
            family.check_table(media_table(table, has_control))
        except DatasetError as error:
            is_hint = has_control and table.conditioning_directory is not None
            problems.append(f"{error}{MASKS_HINT if is_hint else ''}")
    if problems:
        raise DatasetError("\n".join(problems))


def refuse_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if the items to cache change each time. keys: that make it so."""
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Leave out the keys, or train without caching these."
        )


def npz_names(family: Caches) -> NpzNames:
    """Return how a family's caches are named in npz files."""
    # the keys may be known only if all encoders are given, which a check does not need
    has_npz = family.latent.npz is not None
    return NpzNames(family.cache_tag, family.latent, family.text_keys if has_npz else frozenset())


def places_of(family: Caches, places: EntryPlaces | None) -> EntryPlaces:
    """Return where entries are kept: as given, else where the tables say."""
    return places or EntryPlaces(Stores(npz_names(family)))


def workers_of(options: CachingOptions) -> int:
    """Return how many threads read ahead."""
    return options.num_workers or max(1, (os.cpu_count() or 2) - 1)
