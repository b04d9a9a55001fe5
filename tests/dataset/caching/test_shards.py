"""Shards: several runs that each cache a share of one dataset, and the last one that checks it all."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dataset.cache.files import write_tensors
from dataset.cache.shards import ShardStore
from dataset.cache.store import open_store
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from dataset.options import ShardOptions
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.errors import OptionError
from tests.dataset.caching.test_loop import change, make_config
from tests.dataset.toy_family import ToyFamily, ToyText, options

CLIPS = (9, 5, 9, 13, 9)


@dataclasses.dataclass
class Neighbourly(ToyText):
    """An encoder whose embeddings depend on the whole batch, as the last bits of real ones do."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.calls += [prompt.text for prompt in prompts]
        value = float(sum((number + 1) * len(prompt.text) for number, prompt in enumerate(prompts)))
        return [{self.name: [torch.full((2, 4), value)]} for _ in prompts]


def shard(index: int, count: int) -> ShardOptions:
    return ShardOptions(num_shards=count, shard_index=index)


def into(config: DatasetConfig, folder: Path) -> DatasetConfig:
    """The same dataset with another cache folder."""
    return change(config, cache_directory=folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def entries(config: DatasetConfig) -> dict[str, bytes]:
    """The bytes of all entries, in whatever form they are kept."""
    (table,) = config.datasets
    store = open_store(table)
    if isinstance(store, ShardStore):
        return {name: store.read_bytes(name) for name in store.names()}
    return contents(table.cache_directory)


def make_dataset(folder: Path) -> DatasetConfig:
    """Make it, or find it as it was made."""
    is_new = not (folder / "clip_0.mp4").exists()
    config = make_config(folder, clips=CLIPS, target_frames=(5, 9))
    for index in range(len(CLIPS) if is_new else 0):  # of different lengths
        (folder / f"clip_{index}.txt").write_text("word " * (index + 1), encoding="utf-8")
    return change(config, caption_dropout_rate=0.1, batch_size=2)


def family() -> ToyFamily:
    return ToyFamily(text=[Neighbourly()])


@pytest.mark.parametrize(
    ("count", "form"), [(1, "files"), (2, "files"), (3, "files"), (7, "files"), (1, "shards"), (3, "shards")]
)
def test_the_shards_together_give_the_bytes_of_a_single_run(tmp_path: Path, count: int, form: str) -> None:
    config = change(make_dataset(tmp_path), cache_format=form)
    whole, shared = into(config, tmp_path / "whole"), into(config, tmp_path / "shared")
    cache_media(family(), whole, options())
    cache_texts(family(), whole, options())

    media = [cache_media(family(), shared, options(shard=shard(i, count))) for i in reversed(range(count))]
    texts = [cache_texts(family(), shared, options(shard=shard(i, count))) for i in range(count)]

    assert entries(shared) == entries(whole)
    assert sum(one.share for one in media) == len(CLIPS)
    assert sum(one.share for one in texts) == len(CLIPS) + 1  # and the empty prompt
    assert all(one.whole == len(CLIPS) for one in media)
    for report in (cache_media(family(), shared, options()), cache_texts(family(), shared, options())):
        assert report.written == report.removed == 0
        assert report.kept
    if form == "shards":  # the last runs have put the files in order too
        assert len(contents(tmp_path / "shared")) == len(contents(tmp_path / "whole")) == 2


def test_a_shard_removes_nothing_and_the_last_run_what_is_stale(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(9, 9, 9))
    stale = [tmp_path / "cache" / name for name in ("gone_00000-005_0032x0032_toy.safetensors",)]
    stale.append(tmp_path / "cache" / "gone_toy_te.safetensors")
    stale[0].parent.mkdir()
    write_tensors(stale[0], {"latents_2x4x4_bfloat16": torch.zeros(2, 2, 4, 4)}, {"architecture": "toy"})
    write_tensors(stale[1], {"t5_float32": torch.zeros(2, 4)}, {"architecture": "toy"})
    left = tmp_path / "cache" / ".clip_0_toy_te.safetensors.ab12cd34.tmp"
    left.touch()

    for index in range(2):
        for cache in (cache_media, cache_texts):
            assert cache(ToyFamily(), config, options(shard=shard(index, 2))).removed == 0
        assert all(path.exists() for path in (*stale, left))

    assert cache_media(ToyFamily(), config, options()).removed == 1
    assert cache_texts(ToyFamily(), config, options()).removed == 1
    assert not any(path.exists() for path in stale)


def test_a_shard_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="--shard_index 4: .*, so with --num_shards 4 give 0 to 3"):
        ShardOptions(num_shards=4, shard_index=4)
