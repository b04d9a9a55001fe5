"""Training items: one as the loops see it, and a million of them in columns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataset.cache.files import EMPTY, SUFFIX, LatentName, empty_text_name, text_file_name
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource
from modules.media.buckets import Size

Places = NDArray[np.integer[Any]]  # numbers of items


@dataclass(frozen=True)
class ItemKind:
    """Facts that all items of a table share."""

    tag: str  # the family's cache_tag
    text_keys: frozenset[str] = frozenset()  # what a text file has to hold
    has_latents: bool = True  # False: pictures are encoded while training
    has_text: bool = True  # False: captions are


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """A pair of cache files.

    There may be millions: they are kept in the columns of `Items`, and made when a batch is read.
    """

    key: str  # name of the latent file without suffix
    stem_length: int  # of `key`, how much is the name of the source
    table: DatasetTable
    # width, height in pixels; for videos also frames: of a section, those that it decodes to
    bucket: tuple[int, ...]
    kind: ItemKind
    parts: int = 1  # how many files of the same clip are there
    captions: int = 1  # how many text files of the source are there, besides the empty prompt's

    @property
    def source_stem(self) -> str:
        """The name of the source without suffix."""
        return self.key[: self.stem_length]

    @property
    def latent_path(self) -> Path:
        return self.table.cache_directory / f"{self.key}{SUFFIX}"

    @property
    def text_path(self) -> Path:
        """The file of the first caption."""
        return self.caption_path(0)

    def caption_path(self, number: int) -> Path:
        """Return the text file of a caption, or of the empty prompt if `number` is EMPTY."""
        tag = self.kind.tag
        name = empty_text_name(tag) if number == EMPTY else text_file_name(self.source_stem, tag, number)
        return self.table.cache_directory / name


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """All of an item but the name of its source; the same for many."""

    tail: str  # of the key, behind the name of the source
    table: DatasetTable
    bucket: tuple[int, ...]
    kind: ItemKind
    parts: int = 1
    captions: int = 1

    def item(self, stem: str) -> TrainingItem:
        """Return the item of a source."""
        return TrainingItem(
            stem + self.tail, len(stem), self.table, self.bucket, self.kind, self.parts, self.captions
        )

    @property
    def group(self) -> tuple[int, ...]:
        """Return the common key of a batch's items: the table, or its group, and the bucket."""
        return (self.table.batch_group, *self.bucket)


class Stems:
    """Many names in one text: a list of texts takes 60 bytes more for each."""

    def __init__(self, stems: Sequence[str]) -> None:
        self._text = "".join(stems)
        self._ends = np.zeros(len(stems) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, stems), np.int64, len(stems)), out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> str:
        return self._text[self._ends[place] : self._ends[place + 1]]

    def at(self, places: Places) -> list[str]:
        """Return the names at these places; faster than one by one."""
        text, starts, ends = self._text, self._ends[places].tolist(), self._ends[places + 1].tolist()
        return [text[start:end] for start, end in zip(starts, ends, strict=True)]


class Items(Sequence[TrainingItem]):
    """Training items in columns, about 30 bytes each beside the names of the sources.

    It can be read like a tuple of items; an item is made when it is asked for. Parts of it share the columns.
    """

    def __init__(
        self, facts: Sequence[ItemFacts], stems: Stems, which: Places, rows: Places | None = None
    ) -> None:
        """facts: of all items. which: the number of the facts of each stem. rows: which stems are items, in
        order; all without it.
        """
        self.facts = tuple(facts)
        self._stems, self._which = stems, which
        self._rows = np.arange(len(stems), dtype=np.int32) if rows is None else rows

    @classmethod
    def of(cls, items: Iterable[TrainingItem]) -> "Items":
        """Return items in columns, in the same order."""
        if isinstance(items, Items):
            return items
        numbers: dict[tuple[object, ...], int] = {}
        facts, stems, which = [], [], []
        for item in items:
            tail = item.key[item.stem_length :]
            key = (tail, id(item.table), item.bucket, item.kind, item.parts, item.captions)
            if key not in numbers:
                numbers[key] = len(numbers)
                facts.append(ItemFacts(tail, item.table, item.bucket, item.kind, item.parts, item.captions))
            stems.append(item.source_stem)
            which.append(numbers[key])
        return cls(facts, Stems(stems), np.array(which, np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TrainingItem: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...
    def __getitem__(self, index: int | slice) -> "TrainingItem | Items":
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int32)[index])
        row = self._rows[index]
        return self.facts[self._which[row]].item(self._stems[row])

    def __iter__(self) -> Iterator[TrainingItem]:
        for start in range(0, len(self), 4096):
            rows = self._rows[start : start + 4096]
            for number, stem in zip(self._which[rows].tolist(), self._stems.at(rows), strict=True):
                yield self.facts[number].item(stem)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def take(self, places: Places) -> "Items":
        """Return the items at these places."""
        return Items(self.facts, self._stems, self._which, self._rows[places])

    def where(self, is_wanted: Sequence[bool]) -> "Items":
        """Return the items of certain facts. is_wanted: for each of `facts`."""
        return self.take(np.flatnonzero(np.array(is_wanted, bool)[self.numbers]).astype(np.int32))

    def with_tables(self, change: Callable[[DatasetTable], DatasetTable]) -> "Items":
        """Return the items with other tables; the index of each stays."""
        tables = {id(facts.table): facts.table for facts in self.facts}
        changed = {key: change(table) for key, table in tables.items()}
        facts = [replace(one, table=changed[id(one.table)]) for one in self.facts]
        return Items(facts, self._stems, self._which, self._rows)

    @property
    def numbers(self) -> Places:
        """The number in `facts` of each item."""
        return self._which[self._rows]

    @property
    def stems(self) -> list[str]:
        """Return the name of each item's source, without suffix."""
        return self._stems.at(self._rows)

    def keys(self, places: Places | None = None) -> list[str]:
        """Return the keys of the items, or of those at these places."""
        rows = self._rows if places is None else self._rows[places]
        tails = [facts.tail for facts in self.facts]
        pairs = zip(self._stems.at(rows), self._which[rows].tolist(), strict=True)
        return [stem + tails[number] for stem, number in pairs]

    @property
    def tables(self) -> list[DatasetTable]:
        """The tables of the items, by index."""
        used = {facts.table.index: facts.table for facts in (self.facts[n] for n in np.unique(self.numbers))}
        return [table for _, table in sorted(used.items())]

    def groups(self) -> dict[tuple[int, ...], Places]:
        """Return the places of the items that can share a batch, by table or group, and bucket.

        The first group is the one of the first item, and so on; places ascend.
        """
        numbers: dict[tuple[int, ...], int] = {}
        of_facts = [numbers.setdefault(facts.group, len(numbers)) for facts in self.facts]
        group = np.array(of_facts, np.int32)[self.numbers]
        ordered = np.argsort(group, kind="stable").astype(np.int32)
        counts = np.bincount(group, minlength=len(numbers))
        ends = np.cumsum(counts)
        found = {
            key: ordered[ends[number] - counts[number] : ends[number]] for key, number in numbers.items()
        }
        there = [(key, places) for key, places in found.items() if len(places)]
        return dict(sorted(there, key=lambda pair: int(pair[1][0])))


@dataclass(frozen=True)
class LiveTable:
    """Parts that training reads from a table's sources."""

    sources: Mapping[str, MediaSource]  # by stem
    texts: bool  # captions are not cached
    sizes: Mapping[str, Size] | None = None  # of pictures, by stem; None: their latents are cached

    @property
    def media(self) -> bool:
        """Return whether pictures are not cached."""
        return self.sizes is not None

    def latent_names(self, tag: str) -> list[str]:
        """Return the names that latent caches of its pictures would have. tag: the family's cache_tag."""
        return [LatentName(stem, size).file_name(tag) for stem, size in (self.sizes or {}).items()]

    def num_captions(self, stem: str) -> int:
        """Return how many captions a source has."""
        return 1 + len(self.sources[stem].more_captions)

    def caption(self, stem: str, number: int) -> str:
        """Return a caption of a source as its file has it. number: EMPTY for the empty one."""
        if number == EMPTY:
            return ""
        source = self.sources[stem]
        return (source.caption or "", *source.more_captions)[number]


@dataclass(frozen=True)
class LiveParts:
    """Parts of a batch that do not come from caches."""

    tables: Mapping[int, LiveTable] = field(default_factory=dict)  # by index
    # what was encoded for items of the batch, by their places: tensors without batch dimension
    encoded: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


NO_LIVE_PARTS = LiveParts()
