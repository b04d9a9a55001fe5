"""Captions that are another text each time, against the outcomes of the known trainer."""

import random
from pathlib import Path
from typing import Any

import pytest

from dataset.batches.items import ItemKind, TrainingItem
from dataset.batches.order import RunPlace, change_captions, changed_caption, choose_captions
from dataset.cache.files import EMPTY
from dataset.sources.captions import captions_in
from dataset.table import DatasetTable
from tests.dataset.making import subset_table
from tests.golden_cases import read_case

CASES = read_case("image_captions")[0]["cases"]


def draw_many(table: DatasetTable, text: str, count: int = 400, **place: int) -> set[str]:
    (caption,) = captions_in(text, table)
    where = {"step": 0, "total_steps": 100} | place
    return {
        changed_caption(caption, table.changes, table, generator=random.Random(seed), **where)
        for seed in range(count)
    }


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_caption_becomes_what_the_known_trainer_makes_of_it(tmp_path: Path, case: dict[str, Any]) -> None:
    table = subset_table(tmp_path, **case["options"])

    assert draw_many(table, case["caption"]) == set(case["outcomes"])


def test_a_warm_up_brings_the_parts_one_by_one(tmp_path: Path) -> None:
    table = subset_table(tmp_path, keep_tokens=1, token_warmup_min=1, token_warmup_step=0.5)

    texts = [draw_many(table, "a, b, c, d, e", 3, step=step) for step in (0, 16, 17, 34, 49, 50)]

    assert texts == [{"a, b"}, {"a, b"}, {"a, b, c"}, {"a, b, c, d"}, {"a, b, c, d"}, {"a, b, c, d, e"}]


def test_left_out_parts_are_as_many_as_the_rate_says_and_never_the_kept_one(tmp_path: Path) -> None:
    table = subset_table(tmp_path, keep_tokens=1, caption_tag_dropout_rate=0.25)
    generator = random.Random(1)

    texts = [
        changed_caption("a, b, c, d", table.changes, table, 0, 1, generator).split(", ") for _ in range(2000)
    ]

    assert all(parts[0] == "a" for parts in texts)
    assert sum(map(len, texts)) / 2000 == pytest.approx(1 + 3 * 0.75, abs=0.06)


def test_captions_are_dropped_at_random_and_in_every_nth_epoch(tmp_path: Path) -> None:
    table = subset_table(tmp_path, caption_dropout_rate=0.2, caption_dropout_every_n_epochs=3)
    item = TrainingItem("a_0064x0064_toy", 1, table, (64, 64), ItemKind("toy"))

    chosen = [choose_captions([item], 3, number, epoch=0)[0] for number in range(2000)]

    assert chosen.count(EMPTY) / 2000 == pytest.approx(0.2, abs=0.03)
    assert {choose_captions([item], 3, number, epoch=5)[0] for number in range(20)} == {EMPTY}


def test_a_dropped_caption_stays_empty_and_another_is_a_function_of_its_place(tmp_path: Path) -> None:
    table = subset_table(tmp_path, shuffle_caption=True, caption_prefix="photo")
    items = [TrainingItem(f"{stem}_0064x0064_toy", 1, table, (64, 64), ItemKind("toy")) for stem in "abc"]
    texts = ["a, b, c, d, e, f"] * 3

    first = change_captions(items, texts, (0, EMPTY, 0), RunPlace(7, 1, 0, 10))

    assert first[1] == ""
    assert first[0] != first[2]
    assert first == change_captions(items, texts, (0, EMPTY, 0), RunPlace(7, 1, 5, 10))
    assert first != change_captions(items, texts, (0, EMPTY, 0), RunPlace(7, 2, 0, 10))
