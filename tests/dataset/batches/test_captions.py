"""Captions that are another text each time, against the outcomes of the known trainer."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.report.check import check_training
from dataset.batches.finding import find_items
from dataset.batches.items import CachingCommands, TableCacheInfo, TrainingItem
from dataset.batches.order import RunPosition, change_captions, changed_caption, select_captions
from dataset.batches.reading import read_batch
from dataset.cache_files import EMPTY, read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, load_dataset_config
from dataset.listing import find_sources
from dataset.sources.captions import captions_in
from dataset.table import DatasetTable
from modules.errors import CacheError
from tests.dataset.making import make_image, make_table, subset_table
from tests.dataset.toy_family import LATENT, ToyFamily, options
from tests.golden_cases import read_case

CASES = read_case("image_captions")[0]["cases"]


def draw_many(table: DatasetTable, text: str, count: int = 400, **place: int) -> set[str]:
    (caption,) = captions_in(text, table)
    where = {"step": 0, "total_steps": 100} | place
    return {changed_caption(caption, table, generator=random.Random(seed), **where) for seed in range(count)}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_caption_becomes_what_the_known_trainer_makes_of_it(tmp_path: Path, case: dict[str, Any]) -> None:
    table = subset_table(tmp_path, **case["options"])

    assert draw_many(table, case["caption"]) == set(case["outcomes"])


@pytest.mark.parametrize(
    ("separator", "caption", "outcomes"),
    [
        (";", "ohwx cat; a, b; c", {"ohwx cat; a, b; c", "ohwx cat; c; a, b"}),
        ("; ", "ohwx cat; a; b", {"ohwx cat; a; b", "ohwx cat; b; a"}),
        (".", "ohwx cat. One, two. Three", {"ohwx cat. One, two. Three", "ohwx cat. Three. One, two"}),
    ],
)
def test_shuffled_parts_keep_their_separator(
    tmp_path: Path, separator: str, caption: str, outcomes: set[str]
) -> None:
    # sd-scripts since its pull request 2390; before it wrote commas
    table = subset_table(tmp_path, caption_separator=separator, shuffle_caption=True, keep_tokens=1)

    assert draw_many(table, caption) == outcomes


def test_a_warm_up_brings_the_parts_one_by_one(tmp_path: Path) -> None:
    table = subset_table(tmp_path, keep_tokens=1, token_warmup_min=1, token_warmup_step=0.5)

    texts = [draw_many(table, "a, b, c, d, e", 3, step=step) for step in (0, 16, 17, 34, 49, 50)]

    assert texts == [{"a, b"}, {"a, b"}, {"a, b, c"}, {"a, b, c, d"}, {"a, b, c, d"}, {"a, b, c, d, e"}]


def test_left_out_parts_are_as_many_as_the_rate_says_and_never_the_kept_one(tmp_path: Path) -> None:
    table = subset_table(tmp_path, keep_tokens=1, caption_tag_dropout_rate=0.25)
    generator = random.Random(1)

    texts = [
        changed_caption("a, b, c, d", table, step=0, total_steps=1, generator=generator).split(", ")
        for _ in range(2000)
    ]

    assert all(parts[0] == "a" for parts in texts)
    assert sum(map(len, texts)) / 2000 == pytest.approx(1 + 3 * 0.75, abs=0.06)


def test_captions_are_dropped_in_every_nth_epoch(tmp_path: Path) -> None:
    table = subset_table(tmp_path, caption_dropout_every_n_epochs=3)
    item = TrainingItem("a_0064x0064_toy", 1, table, (64, 64), TableCacheInfo("toy"))

    chosen = [select_captions([item], 3, 0, epoch=epoch)[0] for epoch in range(1, 6)]

    assert chosen == [0, EMPTY, 0, 0, EMPTY]


def test_a_dropped_caption_stays_empty_and_another_is_a_function_of_its_place(tmp_path: Path) -> None:
    table = subset_table(tmp_path, shuffle_caption=True, caption_prefix="photo")
    items = [
        TrainingItem(f"{stem}_0064x0064_toy", 1, table, (64, 64), TableCacheInfo("toy")) for stem in "abc"
    ]
    texts = ["a, b, c, d, e, f"] * 3

    first = change_captions(items, texts, (0, EMPTY, 0), RunPosition(7, 1, 0, 10))

    assert first[1] == ""
    assert first[0] != first[2]
    assert first == change_captions(items, texts, (0, EMPTY, 0), RunPosition(7, 1, 5, 10))
    assert first != change_captions(items, texts, (0, EMPTY, 0), RunPosition(7, 2, 0, 10))


COMMANDS = CachingCommands(lambda: ("latents again", "texts again"))


def make_dataset(folder: Path, keys: str, captions: dict[str, str]) -> DatasetConfig:
    for stem, caption in captions.items():
        make_image(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(caption, encoding="utf-8")
    path = folder / "data.toml"
    table = f'[[datasets]]\nimage_directory = "{folder.as_posix()}"\nresolution = 32\n'
    table += 'caption_extension = ".txt"\n'
    path.write_text(f'{table}cache_directory = "{(folder / "cache").as_posix()}"\n{keys}\n', encoding="utf-8")
    return load_dataset_config(path)


OBJECT = """{
  "short_description": "a cat, {red|blue}, by day",
  "objects": [{"description": "a cat"}]
}"""


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"shuffle_caption": True},
        {"enable_wildcard": True},
        {"caption_tag_dropout_rate": 0.9, "enable_wildcard": True, "secondary_separator": "cat"},
    ],
)
def test_a_json_object_is_one_caption_that_no_key_takes_apart(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert draw_many(subset_table(tmp_path, **keys), OBJECT) == {OBJECT}

    (worded,) = draw_many(subset_table(tmp_path, trigger_word="ohwx", **keys), OBJECT)
    expected = json.loads(OBJECT)
    expected["short_description"] = f"ohwx, {expected['short_description']}"
    assert json.loads(worded) == expected


def test_lines_may_each_be_an_object(tmp_path: Path) -> None:
    lines = ['{"short_description": "a"}', '{"short_description": "b"}']
    text = "\n".join(lines)

    assert captions_in(text, make_table(tmp_path, multi_caption=True)) == tuple(lines)
    assert captions_in(OBJECT, make_table(tmp_path, multi_caption=True)) == (OBJECT,)
    assert draw_many(subset_table(tmp_path, enable_wildcard=True), text) == set(lines)


def cache(config: DatasetConfig, keep_cache: bool = False) -> list[str]:
    """Cache all; returns the texts that were encoded."""
    family = ToyFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options(keep_cache=keep_cache))
    return family.text[0].calls


def text_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir() if "_te" in path.name)


@pytest.mark.parametrize(
    ("keys", "caption", "expected"),
    [
        ({"trigger_word": "ohwx"}, "a cat", "ohwx, a cat"),
        ({"trigger_word": "ohwx"}, "an ohwx cat", "an ohwx cat"),
        ({"trigger_word": "ohwx"}, "ohwxes", "ohwx, ohwxes"),
        ({"trigger_word": "a (b"}, "x", "a (b, x"),
        ({"caption_suffix": "in fog", "trigger_word": "ohwx"}, "", "ohwx in fog"),
        ({"caption_prefix": "film of", "trigger_word": "ohwx"}, "a\ncat", "film of ohwx, a\ncat"),
    ],
)
def test_a_table_adds_words_to_captions(tmp_path: Path, keys: dict, caption: str, expected: str) -> None:
    assert captions_in(caption, make_table(tmp_path, **keys)) == (expected,)


def test_a_list_may_give_several_captions_in_a_line(tmp_path: Path) -> None:
    lines = ['{"image_path": "a.png", "caption": "one", "captions": ["two", "three"]}']
    lines += ['{"image_path": "b.png", "captions": ["two"]}', '{"image_path": "c.png", "captions": []}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")

    several = find_sources(make_table(tmp_path, "image_jsonl_file", multi_caption=True))
    single = find_sources(make_table(tmp_path, "image_jsonl_file"))

    assert [(one.caption, one.more_captions) for one in several] == [
        ("one", ("two", "three")),
        ("two", ()),
        (None, ()),
    ]
    assert [one.caption for one in single] == ["one", None, None]  # as other keys, it is ignored


def test_further_captions_and_the_empty_prompt_have_files_that_others_ignore(tmp_path: Path) -> None:
    keys = "multi_caption = true\ncaption_dropout_rate = 0.1\nbatch_size = 2"
    config = make_dataset(tmp_path, keys, {"a": "one two\nthree", "b": "x"})

    assert cache(config) == ["one two", "x", "three", ""]
    assert text_files(tmp_path) == [
        "a_toy_te.caption2.safetensors",
        "a_toy_te.safetensors",
        "b_toy_te.safetensors",
        "toy_te.empty.safetensors",
    ]
    known = list((tmp_path / "cache").glob("*_toy.safetensors")) + list(
        (tmp_path / "cache").glob("*_toy_te.safetensors")
    )
    assert len(known) == 4  # the patterns of other tuners: two latents, two texts
    assert read_entry(tmp_path / "cache" / "a_toy_te.safetensors").metadata["caption1"] == "one two"
    batch = read_batch(find_items(config, "toy", LATENT).items, LATENT, captions=(1, EMPTY))
    assert batch.captions == ("three", "")
    assert [tuple(one.shape) for one in batch.tensors["t5"]] == [(1, 4), (0, 4)]
    assert check_training(config, "toy", LATENT).exit_code == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('multi_caption = true\ntrigger_word = "T"', "trigger_word was , is now T in"),
        ("multi_caption = false", "captions was 2, is now 1, multi_caption was True, is now False in"),
    ],
)
def test_training_refuses_texts_made_with_other_keys(tmp_path: Path, keys: str, message: str) -> None:
    captions = {"a": "one\ntwo"}
    cache(make_dataset(tmp_path, "multi_caption = true", captions))
    config = make_dataset(tmp_path, keys, captions)
    for stem in captions:  # training needs no sources
        (tmp_path / f"{stem}.txt").unlink()
    (item,) = find_items(config, "toy", LATENT).items

    with pytest.raises(CacheError, match=f"{message}.*\n.*texts again"):
        read_batch([item], LATENT, COMMANDS)


def test_the_choice_follows_the_rate_and_depends_on_seed_number_and_place_alone(tmp_path: Path) -> None:
    keys = "multi_caption = true\ncaption_dropout_rate = 0.25"
    config = make_dataset(tmp_path, keys, {"a": "one\ntwo", "b": "x"})
    cache(config)
    items = find_items(config, "toy", LATENT).items

    chosen = [select_captions(items, 3, number) for number in range(2000)]

    firsts, seconds = (Counter(one[place] for one in chosen) for place in (0, 1))
    assert firsts[EMPTY] / 2000 == pytest.approx(0.25, abs=0.04)
    assert firsts[0] / 2000 == pytest.approx(0.375, abs=0.04)
    assert seconds.keys() == {0, EMPTY}
    assert (
        chosen[700] == select_captions(items, 3, 700) == select_captions(items[:1], 3, 700) + chosen[700][1:]
    )
    assert chosen != [select_captions(items, 4, number) for number in range(2000)]


def test_a_dropped_caption_is_known_to_a_teacher(tmp_path: Path) -> None:
    """It is the one that would have been drawn; captions that stay are the same."""
    keys = "multi_caption = true\ncaption_dropout_rate = 0.5\nbatch_size = 2"
    config = make_dataset(tmp_path, keys, {"a": "one two\nthree", "b": "x"})
    cache(config)
    items = find_items(config, "toy", LATENT, frozenset({"t5"})).items
    dropped = set()
    for number in range(300):
        without = select_captions(items, 3, number, drops=False)
        for chosen, other in zip(select_captions(items, 3, number), without, strict=True):
            assert chosen in (EMPTY, other)
            dropped |= {other} if chosen == EMPTY else set()
    assert dropped == {0, 1}

    batch = read_batch(items, LATENT, captions=(EMPTY, 0), undropped=(0, 0))

    plain = read_batch(items, LATENT, captions=(EMPTY, 0))
    assert batch.captions == plain.captions == ("", "x")
    assert not plain.undropped
    assert [tuple(one.shape) for one in batch.tensors["t5"]] == [(0, 4), (1, 4)]
    full = read_batch(items, LATENT, captions=(0, 0))
    for found, wanted in zip(batch.undropped["t5"], full.tensors["t5"], strict=True):
        assert torch.equal(found, wanted)
    assert not read_batch(items, LATENT, captions=(0, 0), undropped=(0, 0)).undropped
    path = tmp_path / "cache" / "a_toy_te.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CacheError, match="a_toy_te.safetensors"):
        read_batch(items, LATENT, COMMANDS, captions=(EMPTY, 0), undropped=(0, 0))
