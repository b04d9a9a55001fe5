"""Subsets of one dataset share batches; regularisation images are as many as those that are learned."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.batches.items import ItemKind, TrainingItem
from dataset.batches.order import BatchOrder, repeat_regularisation
from tests.dataset.making import subset_table
from training.planning.memory import largest_batch

KIND = ItemKind("toy")


def make_items(table, count: int, bucket: tuple[int, int] = (64, 64)) -> list[TrainingItem]:
    return [
        TrainingItem(f"s{table.index}n{number}_0064x0064_toy", 4, table, bucket, KIND)
        for number in range(count)
    ]


def keys_of(order: BatchOrder, epoch: int = 0) -> Counter[str]:
    return Counter(item.key for batch in order.epoch(epoch) for item in batch)


def test_subsets_of_a_dataset_share_batches_of_one_size(tmp_path: Path) -> None:
    table = subset_table(tmp_path, batch_size=4, num_repeats=2)
    other = replace(table, index=1, subset=1, num_repeats=1)
    apart = replace(table, index=2, group=1, subset=0, num_repeats=1)
    items = [
        *make_items(table, 3),
        *make_items(other, 2),
        *make_items(apart, 3),
        *make_items(other, 1, (64, 32)),
    ]
    order = BatchOrder(items, 5)

    batches = list(order.epoch(0))

    assert sorted(len(batch) for batch in batches) == [1, 3, 4, 4]
    assert any({item.table.index for item in batch} == {0, 1} for batch in batches)
    assert all(len({item.table.batch_group for item in batch}) == 1 for batch in batches)
    assert keys_of(order)["s0n0_0064x0064_toy"] == 2
    assert keys_of(order)["s1n0_0064x0064_toy"] == 2  # in two buckets


@pytest.mark.parametrize(
    ("repeats", "learned", "expected"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 1, 1], 2, [1, 1, 0]),  # the rest is not used
        ([1, 1, 1], 7, [3, 2, 2]),
        ([2, 2, 1], 3, [2, 2, 0]),  # whole images only
        ([2, 1], 10, [6, 4]),
        ([1], 0, [0]),
    ],
)
def test_regularisation_images_are_as_many_as_others(repeats, learned: int, expected: list[int]) -> None:
    assert repeat_regularisation(repeats, learned) == expected


def test_regularisation_counts_in_its_own_dataset(tmp_path: Path) -> None:
    table = subset_table(tmp_path, num_repeats=3, batch_size=2)
    reg = replace(table, index=1, subset=1, num_repeats=1, is_reg=True)
    apart = replace(table, index=2, group=1, num_repeats=1)
    items = [*make_items(table, 2), *make_items(reg, 4), *make_items(apart, 9)]
    order = BatchOrder(items, 1)

    counts = keys_of(order, 3)

    assert order.num_items == 6 + 6 + 9
    assert [counts[item.key] for item in items[2:6]] == [2, 2, 1, 1]


def test_the_largest_batch_is_of_the_first_items_of_its_bucket(tmp_path: Path) -> None:
    table = subset_table(tmp_path, batch_size=3, num_repeats=2)
    other = replace(table, index=1, group=1, batch_size=9, num_repeats=1)
    items = [*make_items(table, 5), *make_items(other, 2), *make_items(other, 8, (32, 32))]

    assert largest_batch(items) == tuple(items[:3])  # 12288 pixels; nine of the small ones would be 9216
    assert largest_batch(items[4:]) == (items[4], items[4])  # as often as it is repeated
