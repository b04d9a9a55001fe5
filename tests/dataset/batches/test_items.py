"""The batch that needs the most memory."""

import dataclasses
import math
import random
from pathlib import Path

import pytest

from dataset.batches.items import ItemKind, TrainingItem
from tests.dataset.making import make_table
from training.planning.memory import largest_batch

KIND = ItemKind("toy")


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


def test_the_largest_batch_is_of_the_first_items_of_its_bucket(made_up: list[TrainingItem]) -> None:
    buckets: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in made_up:
        buckets.setdefault((item.table.index, *item.bucket), []).append(item)
    batches = [
        (found * found[0].table.num_repeats)[: found[0].table.batch_size] for found in buckets.values()
    ]
    expected = max(batches, key=lambda batch: math.prod(batch[0].bucket) * len(batch))
    assert largest_batch(made_up) == tuple(expected)
