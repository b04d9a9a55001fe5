"""What is there already: caches of a table by their sources.

A cache is removed only if its tensor names show that it is one, and only if it was there before the run
listed its sources.
"""

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from dataset.cache.files import Entry, LatentName, latent_names
from dataset.cache.store import CacheStore
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource
from modules.contract.data import MediaTable
from modules.contract.family import Caches
from modules.errors import CacheError, DatasetError

logger = logging.getLogger(__name__)


# the latent cache files of one source, with what their names say but for the stem
Names = Mapping[str, LatentName]


class LatentNames:
    """The latent caches of a table by the stem of their source. There may be millions."""

    def __init__(self, store: CacheStore, tag: str, kind: str) -> None:
        """List them, without opening one. kind: of the table, "image" or "video"."""
        self._rest: dict[str, LatentName] = {}  # by the end of a name
        self._files: dict[str, tuple[str, ...]] = {}  # by stem; mostly there is one
        for file, stem, rest in latent_names(store.names(), tag, kind):
            self._rest.setdefault(file[len(stem) :], rest)
            self._files[stem] = (*self._files.get(stem, ()), file)

    def of(self, stem: str) -> Names:
        return {file: self._rest[file[len(stem) :]] for file in self._files.get(stem, ())}

    def not_in(self, names: Container[str], but_of: Container[str]) -> list[str]:
        """Return the files that are not among `names`, by stem, without those of the sources `but_of`."""
        stale = [
            (stem, file)
            for stem, files in self._files.items()
            for file in files
            if file not in names and stem not in but_of
        ]
        return [file for _, file in sorted(stale)]


ExistingNames = Mapping[int, LatentNames]  # by table index


def remove_caches(store: CacheStore, names: Iterable[str], is_cache: Callable[[Entry], bool]) -> int:
    """Remove those of `names` whose tensor names show that they are caches; return how many were removed."""
    count = 0
    for name in () if store.is_shared else names:
        try:
            is_ours = is_cache(store.read(name, is_whole=False))
        except CacheError as error:
            if name not in store:  # another process has just removed it
                continue
            is_ours = store.holds_only_caches
            if not is_ours:
                logger.warning(
                    "%s. It belongs to no item, but is kept because it may not be a cache file.", error
                )
        if is_ours:
            store.remove(name)
            count += 1
    return count


def refuse_moments(family: Caches, table: DatasetTable) -> None:
    """Raise DatasetError for a table with load_tensors if the family cannot use moments."""
    if family.moments.refusal is not None:
        raise DatasetError(f"{table.name}: load_tensors cannot be used: {family.moments.refusal}.")


def refuse_changing(table: DatasetTable, keys: Sequence[str], what: str) -> None:
    """Raise DatasetError if the items to cache change each time. keys: that make it so."""
    if keys:
        raise DatasetError(
            f"{table.name}: {' and '.join(keys)} change what is encoded, so that its {what} cannot be "
            "cached. Leave out the keys, or train without caching these."
        )


def refuse_companions(table: DatasetTable, sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError for references, and masks of controls, that the model does not take.

    sources: those of the table that have some.
    """
    rules = table.clip_references
    for source in sources:
        if len(source.references) > (0 if rules is None else rules.most):
            takes = "none beside control_path" if rules is None else f"{rules.most} at most"
            raise DatasetError(f"{table.name}: {source.path} has references; this model takes {takes}.")
        if source.control_mask is not None and not (rules is not None and rules.control_masks):
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, which this model does not take."
            )
        if source.control_mask is not None and not source.control:
            raise DatasetError(
                f"{table.name}: {source.path} has a control mask, which says what of a control clip is made "
                "new, and no such clip. Give control_directory, or control_path in a list."
            )


def media_table(table: DatasetTable, has_control: bool = False, has_references: bool = False) -> MediaTable:
    """Return a table's facts for families: also whether its items have control media, and references."""
    return MediaTable(
        name=table.name,
        kind=table.kind,
        has_control=has_control,
        has_references=has_references,
        target_frames=()
        if table.kind == "image" or table.frame_extraction == "full"
        else table.target_frames,
        max_frames=table.max_frames if table.kind == "video" and table.frame_extraction == "full" else None,
        window=table.fp_latent_window_size,
        clean_indices=table.fp_1f_clean_indices or (),
        target_index=table.fp_1f_target_index,
        has_post=not table.fp_1f_no_post,
    )
