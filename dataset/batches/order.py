"""Order of batches: a function of the items' names and a seed."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dataset.batches.items import Items, Places, TrainingItem
from modules.seeds import derive_seed


class EpochBatches(Sequence[tuple[TrainingItem, ...]]):
    """The batches of an epoch in order, 12 bytes an item; a batch is made when it is asked for."""

    def __init__(self, items: Items, places: Places, starts: NDArray[np.int64]) -> None:
        """places: of the items, batch by batch. starts: where each batch begins, and the end of the last."""
        self._items, self._places = items, places
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[TrainingItem, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[TrainingItem, ...], ...]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[TrainingItem, ...] | tuple[tuple[TrainingItem, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        return tuple(self._items.take(self._places[self.starts[number] : self.starts[number + 1]]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def keys(self, start: int, end: int) -> list[list[str]]:
        """Return the keys of the items of batches `start` to `end`."""
        starts = self.starts[start : end + 1]
        keys = self._items.keys(self._places[starts[0] : starts[-1]])
        bounds = (starts - starts[0]).tolist()
        return [keys[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


class BatchOrder:
    """Order of batches of every epoch, a function of the items' names and the seed only.

    Each epoch is shuffled anew: first the items within each bucket, then the batches. A bucket is a table and
    a size; its items occur `num_repeats` times; the last batch of a bucket may be smaller.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        self._seed = seed
        self._items = _sorted(Items.of(items))
        self._buckets = {
            key: (self._items[int(places[0])].table, places) for key, places in self._items.groups().items()
        }
        tables = [(table, len(places)) for table, places in self._buckets.values()]
        # in an epoch, repeats included
        self.num_items = sum(count * table.num_repeats for table, count in tables)
        self.num_batches = sum(-(-count * table.num_repeats // table.batch_size) for table, count in tables)
        self._last: tuple[int, EpochBatches] | None = None

    @property
    def learning_keys(self) -> list[str]:
        """Return what the tables set that changes the run but not its items, in words."""
        return [
            f"{name} = {value} in [[datasets]] {table.index + 1}"
            for table in self._items.tables
            for name, value in table.learning_keys.items()
        ]

    def epoch(self, number: int) -> EpochBatches:
        """Return the batches of an epoch in order. number: from 0. The last one asked for is remembered."""
        if self._last is None or self._last[0] != number:
            self._last = number, self._order(number)
        return self._last[1]

    def _order(self, number: int) -> EpochBatches:
        """Shuffle as a list of all items, then a list of all batches, would be."""
        draw_bits = random.Random(derive_seed(self._seed, "items", number)).getrandbits
        places: list[Places] = [np.zeros(0, np.int32)]
        sizes = [np.zeros(0, np.int64)]
        for key in sorted(self._buckets):
            table, members = self._buckets[key]
            count = len(members) * table.num_repeats
            places.append(members[_shuffled(count, draw_bits) % len(members)])
            size = np.full(-(-count // table.batch_size), table.batch_size, np.int64)
            size[-1] = count - (len(size) - 1) * table.batch_size
            sizes.append(size)
        size, order = np.concatenate(sizes), _shuffled(self.num_batches, draw_bits)
        before = np.cumsum(size) - size  # where each batch begins, before batches are shuffled
        starts = np.zeros(len(size) + 1, np.int64)
        np.cumsum(size[order], out=starts[1:])
        # item i of a batch that now begins at s, and began at b before, was at b + i - s
        was = np.repeat(before[order] - starts[:-1], size[order]) + np.arange(starts[-1])
        return EpochBatches(self._items, np.concatenate(places)[was], starts)


def _shuffled(count: int, draw_bits: Callable[[int], int]) -> Places:
    """Return where each place of a list of this length, shuffled by `random.shuffle`, came from.

    draw_bits: `getrandbits` of the generator. Written out, as later Pythons must give the same batches; it is
    a fifth faster too.
    """
    numbers = list(range(count))
    for place in range(count - 1, 0, -1):
        bits = (place + 1).bit_length()
        other = draw_bits(bits)
        while other > place:
            other = draw_bits(bits)
        numbers[place], numbers[other] = numbers[other], numbers[place]
    return np.array(numbers, np.int32)


def _sorted(items: Items) -> Items:
    """Return the items by table and key."""
    keys = items.keys()
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int32)
    tables = np.array([facts.table.index for facts in items.facts], np.int32)[items.numbers[order]]
    return items.take(order[np.argsort(tables, kind="stable")])
