"""Existing latent caches by the stem of their source, read from their names."""

from collections.abc import Container, Mapping, Sequence

from dataset.cache.files import LatentName, latent_names
from dataset.cache.store import CacheStore
from dataset.sources.media_source import MediaSource

# the latent cache files of one source, with what their names say but for the stem
Names = Mapping[str, LatentName]


class LatentNames:
    """The latent caches of a table by the stem of their source. There may be millions."""

    def __init__(self, store: CacheStore, tag: str, kind: str) -> None:
        """List them, without opening one. kind: of the table, "image" or "video"."""
        self._rest: dict[str, LatentName] = {}  # by the end of a name
        self._names: dict[str, str | list[str]] = {}  # by stem; mostly there is one
        for file, stem, rest in latent_names(store.names(), tag, kind):
            self._rest.setdefault(file[len(stem) :], rest)
            before = self._names.setdefault(stem, file)
            if before is not file:
                self._names[stem] = [*([before] if isinstance(before, str) else before), file]

    def of(self, stem: str) -> Names:
        """Return those of one source."""
        return {file: self._rest[file[len(stem) :]] for file in self._files(stem)}

    def not_in(self, names: Container[str], but_of: Container[str]) -> list[str]:
        """Return the files that are not among `names`, by stem, without those of the sources `but_of`."""
        stale = {
            stem: [file for file in sorted(self._files(stem)) if file not in names]
            for stem in self._names
            if stem not in but_of and not all(file in names for file in self._files(stem))
        }
        return [file for _, files in sorted(stale.items()) for file in files]

    def _files(self, stem: str) -> Sequence[str]:
        found = self._names.get(stem)
        return () if found is None else (found,) if isinstance(found, str) else found


ExistingNames = Mapping[int, LatentNames]  # by table index


def names_of(existing: ExistingNames, source: MediaSource) -> Names:
    """Return the existing cache files of one source."""
    return existing[source.table.index].of(source.stem)
