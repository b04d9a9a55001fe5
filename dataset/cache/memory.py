"""Entries held in host memory for one run, and stores in which latents and texts are kept apart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dataset.cache.files import PART, Entry, Header, is_text_name
from dataset.cache.store import CacheStore, Stamp
from modules.errors import CacheError


@dataclass(frozen=True)
class MemoryStore:
    """Entries that end with the process. Nothing is copied when they are read: they must not be changed.

    It is not meant to be sent to other processes: those that read from it are in the training process.
    """

    folder: Path  # for messages
    entries: dict[str, Entry] = field(default_factory=dict)
    holds_only_caches: ClassVar[bool] = True

    def is_shared(self, name: str) -> bool:
        return False

    def names(self) -> Collection[str]:
        return list(self.entries)

    def has(self, name: str) -> bool:
        return name in self.entries

    def stamp(self, name: str) -> None:
        """Return None: without files on disk there is no index."""

    def read_header(self, name: str) -> Header:
        return self.read(name).header

    def read(self, name: str) -> Entry:
        if name not in self.entries:
            raise CacheError(f"{self.folder / name}: it is not in memory")
        return self.entries[name]

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        # copies: what an encoder gives may be a part of a larger tensor
        named = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in named.items()}
        self.entries[name] = Entry(Header(self.folder / name, dict(metadata), tuple(named), shapes), named)

    def replace(
        self, old: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.write(name, tensors, metadata)
        self.remove(old)

    def remove(self, name: str) -> None:
        self.entries.pop(name, None)

    def sweep(self, of: Callable[[str], bool]) -> None:
        """Do nothing: killed processes leave nothing behind."""

    def finish(self) -> None:
        """Do nothing: no entry survives the process."""

    def settle(self) -> None:
        """Do nothing: there is no order to put it in."""

    def faults(self) -> list[str]:
        return []

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(tensor.nbytes for entry in self.entries.values() for tensor in entry.named.values())


@dataclass(frozen=True)
class SplitStore:
    """Latents in one store, texts in another."""

    latents: CacheStore
    texts: CacheStore
    tag: str  # the family's cache_tag, which tells the two by their names
    holds_only_caches: ClassVar[bool] = False

    @property
    def folder(self) -> Path:
        return self.latents.folder

    @property
    def stores(self) -> Sequence[CacheStore]:
        """Return both."""
        return self.latents, self.texts

    def is_shared(self, name: str) -> bool:
        return self._of(name).is_shared(name)

    def names(self) -> Collection[str]:
        return [name for store in self.stores for name in store.names() if self._of(name) is store]

    def has(self, name: str) -> bool:
        return self._of(name).has(name)

    def stamp(self, name: str) -> Stamp | None:
        return self._of(name).stamp(name)

    def read_header(self, name: str) -> Header:
        return self._of(name).read_header(name)

    def read(self, name: str) -> Entry:
        return self._of(name).read(name)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._of(name).write(name, tensors, metadata)

    def replace(
        self, old: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self._of(name).replace(old, name, tensors, metadata)

    def remove(self, name: str) -> None:
        self._of(name).remove(name)

    def sweep(self, of: Callable[[str], bool]) -> None:
        for store in self.stores:
            store.sweep(of)

    def finish(self) -> None:
        for store in self.stores:
            store.finish()

    def settle(self) -> None:
        for store in self.stores:
            store.settle()

    def faults(self) -> list[str]:
        return [line for store in self.stores for line in store.faults()]

    def _of(self, name: str) -> CacheStore:
        return self.texts if is_text_name(name.removesuffix(PART), self.tag) else self.latents
