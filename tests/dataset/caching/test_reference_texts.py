"""Captions that an encoder sees with the reference pictures of their image."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.batches.finding import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache_files import EMPTY, read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.prefetch import CacheReport
from dataset.config import DatasetConfig, load_dataset_config, with_references
from modules.errors import CacheError, DatasetError
from modules.media.reading import read_image
from protocols.data import Conditions
from protocols.requests import Prompt
from tests.dataset.edit_sets import RULES, SIZE, EditFamily, cache, make_set, read_set
from tests.dataset.making import make_image
from tests.dataset.sources.test_addresses import write_tar
from tests.dataset.toy_family import ToyText, options

SEEN = dataclasses.replace(RULES, seen_by_text=True)


class SeeingText(ToyText):
    """A prompt becomes as many rows as it has words, of the mean of its pictures."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.calls += [f"{prompt.text}|{len(prompt.images)}" for prompt in prompts]
        means = [
            sum(float(read_image(path).mean()) for path in prompt.images) if prompt.images else -1.0
            for prompt in prompts
        ]
        return [
            {self.name: [torch.full((max(1, len(prompt.text.split())), 4), mean)]}
            for prompt, mean in zip(prompts, means, strict=True)
        ]


def cache_seen(
    folder: Path, keys: str = "", encoders: Sequence[str] = ("t5",), **changes: Any
) -> tuple[CacheReport, list[SeeingText], DatasetConfig]:
    config = with_references(read_set(folder, keys), SEEN)
    texts = [
        SeeingText(name, variable_length=frozenset({name}), identity={name: "first"}) for name in encoders
    ]
    family = EditFamily(text=list(texts), references=SEEN)
    return cache_texts(family, config, options(**changes)), texts, config


def values(folder: Path) -> dict[str, float]:
    found = sorted((folder / "cache").glob("*_toy_te*"))
    return {path.name: float(read_entry(path).tensors["t5"][0, 0]) for path in found}


def test_a_text_is_encoded_with_the_references_of_its_image(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (SIZE, SIZE), "c": ()})

    report, (text,), _ = cache_seen(tmp_path, batch_size=3)

    assert text.calls == ["make it blue|1", "make it blue|2", "make it blue|0"]
    assert report.written == 3
    assert len(set(values(tmp_path).values())) == 3  # of one caption
    assert cache_seen(tmp_path)[1][0].calls == []


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_a_changed_reference_makes_its_latents_and_its_text_stale(tmp_path: Path, change: str) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (SIZE,), "c": ()})
    cache_seen(tmp_path)
    cache(read_set(tmp_path))
    if change == "edited":
        make_image(tmp_path / "refs/a_0.png", SIZE, (9, 9, 9))
    elif change == "removed":
        (tmp_path / "refs/a_0.png").unlink()
    else:
        make_image(tmp_path / "refs/a_1.png", SIZE, (9, 9, 9))

    _, (text,), _ = cache_seen(tmp_path)

    assert text.calls == [f"make it blue|{ {'edited': 1, 'removed': 0, 'added': 2}[change] }"]
    assert [key[0] for keys in cache(read_set(tmp_path))[1].seen for key in keys] == ["a"]
    # sizes are of the latents alone
    assert cache_seen(tmp_path, "no_resize_control = true")[1][0].calls == []


def test_texts_of_a_model_that_sees_no_references_name_none(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,)})
    family = EditFamily()
    cache_texts(family, read_set(tmp_path), options())
    before = read_entry(tmp_path / "cache/a_toy_te.safetensors").metadata["reelsmith_record"]

    assert "references" not in before
    assert family.text[0].calls == ["make it blue"]


def test_the_empty_prompt_is_encoded_with_each_ones_references(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ((16, 16), SIZE)})
    keys = "caption_dropout_rate = 0.5"

    _, (text,), config = cache_seen(tmp_path, keys)
    cache_media(EditFamily(), config, options())

    assert text.calls == ["make it blue|1", "make it blue|2", "|1", "|2"]
    assert [name for name in values(tmp_path) if "empty" in name] == [
        "a_toy_te.empty.safetensors",
        "b_toy_te.empty.safetensors",
    ]
    latent = EditFamily().latent
    items = require_items(find_items(config, "toy", latent))
    empty = read_batch(items[:1], latent, captions=[EMPTY]).tensors["t5"]
    assert float(empty[0][0, 0]) == values(tmp_path)["a_toy_te.empty.safetensors"]
    assert cache_seen(tmp_path, keys)[1][0].calls == []
    (tmp_path / "cache/b_toy_te.empty.safetensors").unlink()
    with pytest.raises(CacheError, match=r"the cache of the empty prompt is missing, .*b_toy_te\.empty"):
        require_items(find_items(config, "toy", latent))
    cache_seen(tmp_path)  # without dropout
    assert not [name for name in values(tmp_path) if "empty" in name]


def test_training_refuses_a_text_of_another_reference(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,)})
    config = cache_seen(tmp_path)[2]
    make_image(tmp_path / "refs/a_0.png", SIZE, (9, 9, 9))
    cache_media(EditFamily(), config, options())  # latents alone are made again
    (item,) = find_items(config, "toy", EditFamily().latent).items

    with pytest.raises(CacheError, match=r"a_0\.png has changed since its encoder saw it"):
        read_batch([item], EditFamily().latent)


def test_texts_with_references_of_a_tar_are_trained_on_until_its_buckets_change(tmp_path: Path) -> None:
    """How large an encoder sees the references depends on buckets, which are unknown before unpacking."""
    rules = dataclasses.replace(SEEN, text_sees_vae_input=True)
    png = make_image(tmp_path / "a.png", SIZE).read_bytes()
    write_tar(tmp_path / "set.tar", {"a.png": png, "a.control.png": png, "a.txt": b"make it blue"})

    def read(resolution: int) -> DatasetConfig:
        text = f"[[datasets]]\nimage_tars = '{tmp_path}/set.tar'\ncache_directory = '{tmp_path}/cache'\n"
        text += f"caption_extension = '.txt'\nresolution = {resolution}\n"
        (tmp_path / "data.toml").write_text(text, encoding="utf-8")
        return with_references(load_dataset_config(tmp_path / "data.toml"), rules)

    family = EditFamily(text=[SeeingText("t5", variable_length=frozenset({"t5"}))], references=rules)
    cache_media(family, read(64), options())
    assert cache_texts(family, read(64), options()).written == 1
    items = find_items(read(64), "toy", family.latent).items

    assert read_batch(items, family.latent).captions == ("make it blue",)

    cache_media(family, read(32), options())  # latents alone are made again
    with pytest.raises(CacheError, match="resolution was"):
        read_batch(find_items(read(32), "toy", family.latent).items, family.latent)
    assert cache_texts(family, read(32), options()).written == 1
    read_batch(find_items(read(32), "toy", family.latent).items, family.latent)


def test_a_bad_reference_costs_its_text_only(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (), "c": (SIZE,)})
    path = make_image(tmp_path / "refs/b_0.png", SIZE, (1, 2, 3))
    path.write_bytes(path.read_bytes()[:80])  # its header is right

    report, texts, _ = cache_seen(tmp_path, encoders=("t5", "t6"), batch_size=3)

    assert sorted(values(tmp_path)) == ["a_toy_te.safetensors", "c_toy_te.safetensors"]
    assert (report.written, report.reused) == (2, 0)
    (failure,) = report.failures
    assert str(path) in failure.reason
    assert "a reference image of b.png cannot be used" in failure.reason
    make_image(path, SIZE)
    report, _, _ = cache_seen(tmp_path, encoders=("t5", "t6"), batch_size=3)
    assert (report.written, report.reused, report.failures) == (1, 2, ())


def test_a_bad_reference_costs_no_text_of_the_same_name_in_another_table(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        make_set(folder, {"a": (SIZE,)})
    path = folders[0] / "refs/a_0.png"
    path.write_bytes(path.read_bytes()[:80])
    tables = [with_references(read_set(folder), SEEN).datasets[0] for folder in folders]
    config = DatasetConfig(tmp_path / "data.toml", (tables[0], dataclasses.replace(tables[1], index=1)))
    texts = [SeeingText(name, variable_length=frozenset({name})) for name in ("t5", "t6")]

    report = cache_texts(EditFamily(text=list(texts), references=SEEN), config, options())

    assert (report.written, len(report.failures), len(report.valid)) == (1, 1, 1)
    assert [len(values(folder)) for folder in folders] == [0, 1]


def test_mirroring_is_refused_if_texts_see_references(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (SIZE,)})
    (table,) = config.datasets
    table = table.with_values(augmentation=dataclasses.replace(table.buckets.augmentation, flip=True))

    with pytest.raises(DatasetError, match="flip_aug mirrors reference images, but"):
        with_references(dataclasses.replace(config, datasets=(table,)), SEEN)
