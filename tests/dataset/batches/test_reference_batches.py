"""Reference pictures in batches, and what training refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dataset import listing
from dataset.batches.finding import find_items, require_items, with_reference_sizes
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.cache.store import Stores
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, load_dataset_config, with_references
from modules.errors import CacheError
from tests.dataset.edit_sets import RULES, SIZE, EditFamily, cache, make_set, read_set
from tests.dataset.toy_family import options
from training.planning.memory import largest_batch


def trained(folder: Path, keys: str) -> tuple[DatasetConfig, list[tuple[str, ...]]]:
    config, family = read_set(folder, keys), EditFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())
    items = require_items(find_items(config, "toy", family.latent))
    batches = BatchOrder(items, 3).epoch(0)
    for batch in batches:
        tensors = read_batch(batch, family.latent).tensors
        assert len(tensors["latents"]) == len(batch)
    return config, sorted(tuple(sorted(item.source_stem for item in batch)) for batch in batches)


def test_a_batch_has_equal_references(tmp_path: Path) -> None:
    sizes = {"a": (SIZE,), "b": ((32, 32),), "c": (SIZE, (16, 16)), "d": (SIZE,), "e": (), "f": ()}
    make_set(tmp_path, sizes)

    batches = trained(tmp_path, "batch_size = 4\nno_resize_control = true")[1]
    assert batches == [("a", "d"), ("b",), ("c",), ("e", "f")]
    assert trained(tmp_path, "batch_size = 4")[1] == [("a", "b", "d"), ("c",), ("e", "f")]
    assert trained(tmp_path, "")[1] == [(stem,) for stem in "abcdef"]


def test_the_largest_batch_is_that_of_the_largest_references(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (), "b": ((16, 16),), "c": ((320, 320),), "d": (SIZE,)})
    config = trained(tmp_path, "no_resize_control = true\nbatch_size = 2")[0]
    items = find_items(config, "toy", EditFamily().latent).items

    found = largest_batch(with_reference_sizes(items, Stores()), EditFamily().latent.stride[1])

    assert [item.source_stem for item in found] == ["c"]


def test_training_refuses_caches_of_other_keys(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": ((32, 32),), "b": ()})
    trained(tmp_path, "no_resize_control = true")
    config, latent = read_set(tmp_path), EditFamily().latent
    one, other = find_items(config, "toy", latent).items

    with pytest.raises(CacheError, match="no_resize_control was True, is now False in .*data.toml"):
        read_batch([one], latent)
    read_batch([other], latent)


def test_training_refuses_caches_of_other_references_than_a_list_names(tmp_path: Path) -> None:
    """More or fewer than its line had; of a line, or a list, that is gone nothing is known."""
    make_set(tmp_path, {"a": (SIZE, SIZE), "b": (SIZE,), "c": ()})
    lists, latent = tmp_path / "list.jsonl", EditFamily().latent

    def read(**numbers: int) -> dict[str, str]:
        """Write a list whose lines have so many references; why training refuses each item."""
        rows = []
        for stem, number in numbers.items():
            controls = {
                f"control_path_{one}": str(tmp_path / f"refs/{stem}_{one}.png") for one in range(number)
            }
            rows.append({"image_path": str(tmp_path / f"pics/{stem}.png"), "caption": "x", **controls})
        lists.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        path = tmp_path / "listed.toml"
        keys = f"cache_directory = '{tmp_path}/listed'\nresolution = {[*SIZE]}\n"
        path.write_text(f"[[datasets]]\nimage_jsonl_file = '{lists}'\n{keys}", encoding="utf-8")
        config = with_references(load_dataset_config(path), RULES)
        if not (tmp_path / "listed").exists():
            cache(config)
            cache_texts(EditFamily(), config, options())
        listing.companions_now.cache_clear()  # another process
        found = {}
        for item in find_items(config, "toy", latent).items:
            try:
                read_batch([item], latent)
            except CacheError as error:
                found[item.source_stem] = str(error)
        return found

    assert read(a=2, b=1, c=0) == {}
    changed = read(a=1, b=2, c=0)
    assert changed.keys() == {"a", "b"}
    assert f"made with 2 reference images, but {lists} now names 1" in changed["a"]
    assert f"made with 1 reference image, but {lists} now names 2" in changed["b"]
    assert read(a=3, b=1) == {}  # no more than two are taken


def test_mirrored_references_are_cached_and_chosen_too(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": ((32, 32),)}, "no_resize_control = true\nbatch_size = 2")
    (table,) = config.datasets
    table = table.with_values(augmentation=dataclasses.replace(table.buckets.augmentation, flip=True))
    config = dataclasses.replace(config, datasets=(table,))
    family = EditFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())

    (item,) = find_items(config, "toy", family.latent).items

    assert item.reference_latent_sizes == (4, 4)  # once, though both sides are there
    assert read_batch([item], family.latent, flips=[True]).tensors["latents_control_0"].shape[-2:] == (4, 4)
    assert torch.equal(family.media[1].control[0], family.media[0].control[0].flip(3))
