"""Captions that are another text each time, against the outcomes of the known trainer."""

import random
from pathlib import Path
from typing import Any

import pytest

from dataset.batches.changing import changed_caption
from dataset.sources.captions import captions_in
from dataset.table import DatasetTable
from tests.dataset.making import subset_table
from tests.golden_cases import read_case

CASES = read_case("image_captions")[0]["cases"]


def draw_many(table: DatasetTable, text: str, count: int = 400, **place: int) -> set[str]:
    (caption,) = captions_in(text, table)
    where = {"epoch": 0, "step": 0, "total_steps": 100} | place
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
        changed_caption("a, b, c, d", table.changes, table, 0, 0, 1, generator).split(", ")
        for _ in range(2000)
    ]

    assert all(parts[0] == "a" for parts in texts)
    assert sum(map(len, texts)) / 2000 == pytest.approx(1 + 3 * 0.75, abs=0.06)


def test_a_prefix_is_on_every_line(tmp_path: Path) -> None:
    table = subset_table(tmp_path, enable_wildcard=True, caption_prefix="photo of", caption_suffix="{x|y}")

    assert draw_many(table, "a cat\n\na dog\n") == {
        f"photo of a {animal} {end}" for animal in ("cat", "dog") for end in "xy"
    }


def test_captions_are_dropped_at_random_and_in_every_nth_epoch(tmp_path: Path) -> None:
    table = subset_table(tmp_path, caption_dropout_rate=0.2, caption_dropout_every_n_epochs=3)
    generator = random.Random(2)

    texts = [changed_caption("a", table.changes, table, 0, 0, 1, generator) for _ in range(2000)]

    assert texts.count("") / 2000 == pytest.approx(0.2, abs=0.03)
    assert draw_many(table, "a", epoch=2) == draw_many(table, "a", epoch=5) == {""}
    assert draw_many(table, "a", epoch=3) == {"", "a"}
