"""Order of batches: a function of the items' names and a seed."""

import random
from collections.abc import Iterable

from dataset.batches.finding import TrainingItem
from modules.seeds import derive_seed


class BatchOrder:
    """Order of batches of every epoch, a function of the items' names and the seed only.

    Each epoch is shuffled anew: first the items within each bucket, then the batches. A bucket is a table and
    a size; its items occur `num_repeats` times; the last batch of a bucket may be smaller.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        self._seed = seed
        self._buckets: dict[tuple[int, ...], list[TrainingItem]] = {}
        for item in sorted(items, key=lambda item: (item.table.index, item.key)):
            self._buckets.setdefault((item.table.index, *item.bucket), []).append(item)

    @property
    def num_items(self) -> int:
        """Number of items in an epoch, repeats included."""
        return sum(len(bucket) * bucket[0].table.num_repeats for bucket in self._buckets.values())

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return sum(
            -(-len(bucket) * bucket[0].table.num_repeats // bucket[0].table.batch_size)
            for bucket in self._buckets.values()
        )

    @property
    def learning_keys(self) -> list[str]:
        """Return what the tables set that changes the run but not its items, in words."""
        tables = {bucket[0].table.index: bucket[0].table for bucket in self._buckets.values()}
        return [
            f"{name} = {value} in [[datasets]] {index + 1}"
            for index, table in sorted(tables.items())
            for name, value in table.learning_keys.items()
        ]

    def epoch(self, number: int) -> tuple[tuple[TrainingItem, ...], ...]:
        """Return the batches of an epoch in order. number: from 0."""
        shuffle = random.Random(derive_seed(self._seed, "items", number)).shuffle
        batches: list[tuple[TrainingItem, ...]] = []
        for key in sorted(self._buckets):
            table = self._buckets[key][0].table
            items = self._buckets[key] * table.num_repeats
            shuffle(items)
            batches += [
                tuple(items[start : start + table.batch_size])
                for start in range(0, len(items), table.batch_size)
            ]
        shuffle(batches)
        return tuple(batches)
