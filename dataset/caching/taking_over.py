"""Copy latents that another model has cached, if this run would make the same latents.

Models that share an autoencoder and cache the means of its posteriors (`LatentSpec.shares_caches`) write
equal latents if file, dtype and tiling of the autoencoder are equal. The records of the caches contain these.
"""

import logging
import re
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from dataset.cache.store import LatentNames, Names, Stores
from dataset.cache_files import CacheStore, parse_latent_name
from dataset.caching.planning import LatentCacheSettings, SourcePlan, SourcePlanner
from dataset.sources.media_source import MediaSource
from modules.console import format_count
from modules.errors import CacheError
from protocols.family import Caches

logger = logging.getLogger(__name__)

_TAG = re.compile(r"_[0-9]+x[0-9]+_([a-z0-9]+)\.safetensors$")
_OTHER_REFERENCE_SIZES = "its reference images were cached in the sizes that the other model uses"


class OtherCaches:
    """Latent caches of other models in this run's folders, to copy if the autoencoder is the same."""

    def __init__(self, family: Caches, cache_settings: LatentCacheSettings) -> None:
        self._family, self._cache_settings = family, cache_settings
        # latent caches by table index, then by the cache_tag of the other model
        self._by_table: dict[int, dict[str, LatentNames]] = {}
        self._num_copied: Counter[str] = Counter()  # by name of the other model
        self._rejected: dict[str, str] = {}  # file -> why it cannot be copied
        self._makers: set[str] = set()  # models that made the rejected files
        # whether a rejected file was made by another autoencoder, or with other options
        self._has_incompatible = False

    def copy_for_source(self, plan: SourcePlan) -> SourcePlan:
        """Copy usable latents of another model, under this model's names, for an item without valid caches.

        The first model with usable latents is used; if there is none, the reasons are kept for `log_results`.

        Returns the plan of the item, which is finished if latents were found.

        Raises:
            OutputError: If a cache file cannot be written.
        """
        source = plan.source
        if source.table.kind != "image" or source.precomputed is not None:
            return plan
        store = self._cache_settings.stores.latent_store(source.table)
        rejections: list[_Rejection] = []
        for other_tag, names in self._list_others(plan, self._cache_settings.stores).items():
            existing = names.of(source.stem)
            first_file = next(iter(existing), None)
            if first_file is None or not self._has_our_channels(store, first_file):
                continue
            result = self._plan_as_ours(source, existing, first_file)
            if isinstance(result, SourcePlan):
                files = [self._copy(store, name, other_tag) for name in sorted(result.valid_files)]
                return replace(result, valid_files=frozenset(files))
            rejections.append(result)
        for rejection in rejections:
            self._rejected[rejection.file] = rejection.reason
            self._has_incompatible = self._has_incompatible or rejection.is_incompatible
            self._makers.add(
                store.read(rejection.file, is_full=False).metadata.get("architecture", "another program")
            )
        return plan

    def _plan_as_ours(
        self, source: MediaSource, existing: Names, first_file: str
    ) -> "SourcePlan | _Rejection":
        """Plan an item as if another model's caches of it were this model's caches."""
        # Returns the plan if the caches are complete and fit this run's settings, otherwise why they cannot
        # be copied. `first_file` is the first of the `existing` caches.
        if source.control:  # models resize reference images differently
            return _Rejection(first_file, _OTHER_REFERENCE_SIZES)
        plan = SourcePlanner(source, existing, self._cache_settings).plan()
        nothing_to_encode = plan.missing_spans == ()  # None would mean that this is unknown
        if plan.valid_files and nothing_to_encode and not plan.num_without_record:
            return plan
        no_record = f"{first_file}: it has no record of what it was made from"
        return _Rejection(first_file, plan.outdated_reason or no_record, plan.is_incompatible)

    def log_results(self) -> None:
        """Log how many latents of other models were copied, and why others could not be."""
        for maker, count in sorted(self._num_copied.items()):
            logger.info(
                "%s: the latents that %s has cached with the same autoencoder are reused, and nothing is "
                "encoded for them",
                format_count(count, "image"),
                maker,
            )
        if self._rejected:
            # shown only if another autoencoder or other options made a file
            remedy = ". To reuse them, pass the file and the options of the autoencoder that made them"
            logger.info(
                "%s: the latents that %s has cached differ from those that this command makes and are not "
                "used. The first: %s%s",
                format_count(len(self._rejected), "image"),
                " and ".join(sorted(self._makers)),
                next(iter(self._rejected.values())),
                remedy if self._has_incompatible else "",
            )

    def _list_others(self, plan: SourcePlan, stores: Stores) -> dict[str, LatentNames]:
        """Return the latent caches of other models in the table's folder, by the cache tag in their names."""
        table = plan.source.table
        if table.index not in self._by_table:
            store = stores.latent_store(table)
            found = (_TAG.search(name) for name in store.names())
            tags = sorted({match[1] for match in found if match is not None} - {self._cache_settings.tag})
            self._by_table[table.index] = {tag: LatentNames(store, tag, table.kind) for tag in tags}
        return self._by_table[table.index]

    def _has_our_channels(self, store: CacheStore, file: str) -> bool:
        """Return whether the latents in a cache file have as many channels as this model's latents."""
        try:
            header = store.read(file, is_full=False)
        except CacheError:
            return False
        channels = {shape[0] for name, shape in header.shapes.items() if name.startswith("latents_")}
        return channels == {self._cache_settings.latent.channels}

    def _copy(self, store: CacheStore, file: str, tag: str) -> str:
        """Copy a cache file of another model; return the copy's name, which contains this model's tag."""
        name = parse_latent_name(file, tag, "image")
        assert name is not None  # `LatentNames` lists only names that can be parsed
        entry = store.read(file)
        new_file = name.file_name(self._cache_settings.tag)
        store.write(new_file, entry.named, {**entry.metadata, "architecture": self._family.name})
        self._num_copied[entry.metadata.get("architecture", "another program")] += 1
        return new_file


class _Rejection(NamedTuple):
    """Why the caches of an item that another model made cannot be copied."""

    file: str  # the first of them
    reason: str
    is_incompatible: bool = False  # made by another autoencoder, or with other options
