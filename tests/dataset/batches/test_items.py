"""Items in columns are what items in lists were: names, orders, splits."""

import dataclasses
import hashlib
import math
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dataset.batches.items import ItemKind, Items, TrainingItem
from dataset.batches.order import BatchOrder
from dataset.batches.validation_split import split_validation
from modules.seeds import derive_seed
from tests.dataset.making import make_table
from training.planning.memory import largest_batch

KIND = ItemKind("toy")
Batches = list[tuple[TrainingItem, ...]]


def order_of_lists(items: Sequence[TrainingItem], seed: int, number: int) -> Batches:
    """The order as it was computed before items were columns; runs of that time are resumed."""
    buckets: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in sorted(items, key=lambda item: (item.table.index, item.key)):
        buckets.setdefault((item.table.index, *item.bucket), []).append(item)
    shuffle = random.Random(derive_seed(seed, "items", number)).shuffle
    batches: Batches = []
    for key in sorted(buckets):
        table = buckets[key][0].table
        repeated = buckets[key] * table.num_repeats
        shuffle(repeated)
        batches += [
            tuple(repeated[start : start + table.batch_size])
            for start in range(0, len(repeated), table.batch_size)
        ]
    shuffle(batches)
    return batches


def split_of_lists(items: Sequence[TrainingItem], fraction: float) -> tuple[list[str], list[str]]:
    """The split as it was computed before."""
    stems = sorted(
        {item.source_stem for item in items if not item.table.validation},
        key=lambda stem: hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest(),
    )
    held = set(stems[: min(max(round(fraction * len(stems)), 1), len(stems) - 1)])
    sides: tuple[list[str], list[str]] = ([], [])
    for item in items:
        sides[item.table.validation or item.source_stem in held].append(item.key)
    return sides


@pytest.fixture
def made_up(tmp_path: Path) -> list[TrainingItem]:
    """Items of three tables and many sizes, in no order, with names that are no ASCII."""
    first = make_table(tmp_path, batch_size=3, num_repeats=2)
    tables = [
        first,
        dataclasses.replace(first, index=1, batch_size=2, num_repeats=1),
        dataclasses.replace(first, index=2, validation=True),
    ]
    numbers = random.Random(5)
    items = []
    for number in range(150):
        stem = numbers.choice(["clip", "clïp", "猫", "a-", "a", "😀\udce9"]) + str(number // 2)
        tail = f"_{number:05d}-005_toy"
        bucket = numbers.choice([(32, 32, 5), (32, 48, 5), (32, 32, 9), (64, 64)])
        table = tables[number % 3]
        items.append(
            TrainingItem(stem + tail, len(stem), table, bucket, KIND, 1 + number % 2, 1 + number % 3)
        )
    numbers.shuffle(items)
    return items


def test_columns_give_back_the_items(made_up: list[TrainingItem]) -> None:
    items = Items.of(made_up)
    assert list(items) == made_up
    assert items == made_up
    assert [items[place] for place in (0, 7, -1)] == [made_up[place] for place in (0, 7, -1)]
    assert items[3:140:7] == made_up[3:140:7]
    assert items.keys() == [item.key for item in made_up]
    assert items.stems == [item.source_stem for item in made_up]
    assert [table.index for table in items.tables] == [0, 1, 2]
    assert list(pickle.loads(pickle.dumps(items))) == made_up
    assert items != made_up[1:]
    with pytest.raises(IndexError):
        items[150]


def test_groups_are_the_buckets_in_the_order_of_their_first_items(made_up: list[TrainingItem]) -> None:
    expected: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(made_up):
        expected.setdefault((item.table.index, *item.bucket), []).append(place)
    found = Items.of(made_up).groups()
    assert [(key, places.tolist()) for key, places in found.items()] == list(expected.items())
    assert Items.of(made_up).take(np.array([4, 2])).groups().keys() == {
        (made_up[place].table.index, *made_up[place].bucket) for place in (4, 2)
    }
    assert Items.of([]).groups() == {}


@pytest.mark.parametrize("seed", [0, 42])
def test_an_order_is_the_one_of_before(made_up: list[TrainingItem], seed: int) -> None:
    order = BatchOrder(made_up, seed)
    for number in (0, 1, 7):
        batches, expected = order.epoch(number), order_of_lists(made_up, seed, number)
        assert batches == expected
        assert [len(batch) for batch in batches] == np.diff(batches.starts).tolist()
        assert batches.keys(2, 9) == [[item.key for item in batch] for batch in expected[2:9]]
    assert (order.num_batches, order.num_items) == (len(expected), sum(map(len, expected)))
    assert BatchOrder([], seed).num_batches == len(BatchOrder([], seed).epoch(0)) == 0


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_a_split_is_the_one_of_before(made_up: list[TrainingItem], fraction: float) -> None:
    sides = split_validation(made_up, fraction)
    assert tuple(side.keys() for side in sides) == split_of_lists(made_up, fraction)


def test_the_largest_batch_is_of_the_first_items_of_its_bucket(made_up: list[TrainingItem]) -> None:
    buckets: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in made_up:
        buckets.setdefault((item.table.index, *item.bucket), []).append(item)
    batches = [
        (found * found[0].table.num_repeats)[: found[0].table.batch_size] for found in buckets.values()
    ]
    expected = max(batches, key=lambda batch: math.prod(batch[0].bucket) * len(batch))
    assert largest_batch(made_up) == tuple(expected)


def test_an_epoch_of_many_items_takes_few_bytes(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    count = 2000
    items = [TrainingItem(f"clip_{number:08d}_toy", 13, table, (32, 32), KIND) for number in range(count)]
    order = BatchOrder(items, 0)
    order.epoch(0)
    assert len(pickle.dumps(order)) < 60 * count  # what a worker that is spawned is sent
