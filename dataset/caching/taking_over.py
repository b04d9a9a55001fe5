"""Take over latents that another model has cached, if they are the ones that this run would make.

Models that share an autoencoder and cache the means of its posteriors (`LatentSpec.shares_caches`) write
equal latents, if its file, its dtype and its tiles are equal, which records say.
"""

import logging
import re
from collections import Counter
from dataclasses import replace

from dataset.cache.store import LatentNames, Stores
from dataset.cache_files import CacheStore, parse_latent_name
from dataset.caching.planning import Planning, Recipe, SourcePlan
from modules.console import count_of
from modules.errors import CacheError
from protocols.family import Caches

logger = logging.getLogger(__name__)

_TAG = re.compile(r"_[0-9]+x[0-9]+_([a-z0-9]+)\.safetensors$")
_SIZES_OF_REFERENCES = "its reference pictures were cached in the sizes that the other model gives them"


class OtherCaches:
    """The latent caches of other models in the folders of a run."""

    def __init__(self, family: Caches, recipe: Recipe) -> None:
        self._family, self._recipe = family, recipe
        self._by_table: dict[int, dict[str, LatentNames]] = {}  # by the models' tags
        self._taken: Counter[str] = Counter()  # by the name of the model that cached them
        self._rejected: dict[str, str] = {}  # file -> why it cannot be taken over
        self._makers: set[str] = set()  # of those that are refused
        self._is_made_otherwise = False  # one of these by another autoencoder, or with other options

    def take_source(self, plan: SourcePlan) -> SourcePlan:
        """Copy usable latents of another model for a source without valid caches, under this model's names.

        Returns the plan of the source, which is finished if latents were found.

        Raises:
            OutputError: If an entry cannot be written.
        """
        source = plan.source
        if source.table.kind != "image" or source.tensors is not None:
            return plan
        store = self._recipe.stores.of(source.table)
        refused: dict[str, str] = {}
        is_made_otherwise = False
        for tag, names in self._list_others(plan, self._recipe.stores).items():
            existing = names.of(source.stem)
            if not existing or not self._has_our_shape(store, next(iter(existing))):
                continue
            file = next(iter(existing))
            why: str | None = _SIZES_OF_REFERENCES
            if not source.control:
                compared = Planning(source, existing, self._recipe).plan()
                if compared.kept and compared.missing == () and not compared.foreign:
                    files = [self._copy(store, name, tag) for name in sorted(compared.kept)]
                    return replace(compared, kept=frozenset(files))
                why = compared.outdated
                is_made_otherwise = is_made_otherwise or compared.is_other
            refused[file] = why or f"{file}: it has no record of what it was made from"
        self._rejected |= refused
        self._is_made_otherwise = self._is_made_otherwise or is_made_otherwise
        self._makers |= {self._read_maker(store, file) for file in refused}
        return plan

    def report(self, shows: bool) -> None:
        """Log how many caches were taken over, and why others could not be.

        Args:
            shows: Whether this process writes to the log.
        """
        if not shows:
            return
        for maker, count in sorted(self._taken.items()):
            logger.info(
                "%s: the latents that %s has cached with the same autoencoder are taken over, and nothing is "
                "encoded for them",
                count_of(count, "picture"),
                maker,
            )
        if self._rejected:
            remedy = ". To take them over, give the file and the options of the autoencoder that made them"
            logger.info(
                "%s: the latents that %s has cached are not those that this command makes, and are not used. "
                "The first: %s%s",
                count_of(len(self._rejected), "picture"),
                " and ".join(sorted(self._makers)),
                next(iter(self._rejected.values())),
                remedy if self._is_made_otherwise else "",
            )

    def _list_others(self, plan: SourcePlan, stores: Stores) -> dict[str, LatentNames]:
        """Return the latent caches of other models in the folder of a table, by the tag of the model."""
        table = plan.source.table
        if table.index not in self._by_table:
            store = stores.of(table)
            found = (_TAG.search(name) for name in store.names())
            tags = sorted({match[1] for match in found if match is not None} - {self._recipe.tag})
            self._by_table[table.index] = {tag: LatentNames(store, tag, table.kind) for tag in tags}
        return self._by_table[table.index]

    def _has_our_shape(self, store: CacheStore, file: str) -> bool:
        """Return whether an entry has latents of the shape that this model has for its size."""
        try:
            header = store.read(file, is_full=False)
        except CacheError:
            return False
        channels = {shape[0] for name, shape in header.shapes.items() if name.startswith("latents_")}
        return channels == {self._recipe.latent.channels}

    def _read_maker(self, store: CacheStore, file: str) -> str:
        return store.read(file, is_full=False).metadata.get("architecture", "another program")

    def _copy(self, store: CacheStore, file: str, tag: str) -> str:
        """Write an entry of another model under this model's name, which is returned."""
        name = parse_latent_name(file, tag, "image")
        assert name is not None  # it was listed by this rule
        entry = store.read(file)
        ours = name.file_name(self._recipe.tag)
        store.write(ours, entry.named, {**entry.metadata, "architecture": self._family.name})
        self._taken[entry.metadata.get("architecture", "another program")] += 1
        return ours
