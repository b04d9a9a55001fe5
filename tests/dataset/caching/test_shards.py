"""Shards: several runs that each cache a share of one dataset, by hand or on a Ray cluster, and the last one
that checks it all; and caches with `cache_format = "shards"`.
"""

import dataclasses
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cache_on_ray
from data_tools.report.check import check_caching, check_training
from dataset.batches.finding import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.catalog import list_shards
from dataset.cache.shards import ShardStore
from dataset.cache.store import open_store
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.on_ray import CachingActor, conclude_shards
from dataset.config import DatasetConfig
from dataset.options import CachingOptions, ShardOptions, caching_scripts, read_ray_options
from modules.errors import CacheError, DatasetError, OptionError
from protocols.data import Conditions
from protocols.requests import Prompt
from tests.commands import ROOT
from tests.dataset.cache.killing import needs_fork, run_and_kill, run_to_step
from tests.dataset.caching.test_loop import change, make_config, write_foreign
from tests.dataset.making import make_image, make_table
from tests.dataset.test_two_passes import COMMANDS, KEYS, two
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options
from tests.faults.runs import WAN, write_project

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


@pytest.mark.parametrize(("count", "form"), [(1, "files"), (7, "files"), (3, "shards")])
def test_the_shards_together_give_the_bytes_of_a_single_run(tmp_path: Path, count: int, form: str) -> None:
    config = change(make_dataset(tmp_path), cache_format=form)
    full, shared = into(config, tmp_path / "whole"), into(config, tmp_path / "shared")
    cache_media(family(), full, options())
    cache_texts(family(), full, options())

    media = [cache_media(family(), shared, options(shard=shard(i, count))) for i in reversed(range(count))]
    texts = [cache_texts(family(), shared, options(shard=shard(i, count))) for i in range(count)]

    assert entries(shared) == entries(full)
    assert sum(one.num_assigned for one in media) == len(CLIPS)
    assert sum(one.num_assigned for one in texts) == len(CLIPS) + 1  # and the empty prompt
    assert all(one.num_total == len(CLIPS) for one in media)
    for report in (cache_media(family(), shared, options()), cache_texts(family(), shared, options())):
        assert report.written == report.removed == 0
        assert report.reused
    if form == "shards":  # the last runs have put the files in order too
        assert len(contents(tmp_path / "shared")) == len(contents(tmp_path / "whole")) == 1


def test_a_shard_removes_nothing_and_the_last_run_what_is_stale(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(9, 9, 9))
    stale = [
        write_foreign(tmp_path, "gone_00000-005_0032x0032_toy", {"latents_2x4x4_float32": torch.zeros(1)}),
        write_foreign(tmp_path, "gone_toy_te", {"t5_float32": torch.zeros(2, 4)}),
    ]
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
    with pytest.raises(OptionError, match="--shard_index 4: .*, so with --num_shards 4 pass 0 to 3"):
        CachingOptions.from_defaults(
            dataset_config=Path("d.toml"), shard=ShardOptions(num_shards=4, shard_index=4)
        )


COUNT = 12


def of_images(folder: Path) -> DatasetConfig:
    """A table of pictures with captions, whose caches are in shards."""
    settings = {"resolution": (32, 32), "caption_extension": ".txt", "cache_format": "shards"}
    return DatasetConfig(folder / "data.toml", (make_table(folder, "image_directory", **settings),))


def cache(config: DatasetConfig) -> tuple[int, int]:
    """Cache all; how many latents and texts were written."""
    return cache_media(two(), config, options()).written, cache_texts(two(), config, options()).written


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, cached by nobody else."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        make_image(folder / f"pic_{number:02d}.png", colour=(10 * number, 20, 30))
        (folder / f"pic_{number:02d}.txt").write_text(f"picture {number}", encoding="utf-8")
    assert cache(of_images(folder)) == (COUNT, COUNT)
    return folder


# --- damage


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_shard_is_noticed_and_mended_by_the_same_commands(
    undisturbed: Path, tmp_path: Path, how: str
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    config = of_images(tmp_path)
    right = entries(config)
    (path,) = (tmp_path / "cache" / name for name in list_shards(tmp_path / "cache"))
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[data.index(b"latents_1x") + 20] ^= 1
    path.write_bytes(data)

    result = check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS)
    assert result.exit_code == 1
    with pytest.raises(CacheError, match=r"(?s)(cut|do not match).*cache_latents\.py --x"):
        read_batch(require_items(find_items(config, "toy", LATENT, KEYS), COMMANDS), LATENT, COMMANDS)

    if how == "cut":
        for parts in (["media", "latents"], ["texts"]):
            planned = check_caching(two(), config, 1, False, parts=parts)
            assert planned.exit_code == 0
            assert f"    {path} is damaged: it was cut" in "\n".join(planned.lines)
    made = sum(cache(config))
    assert made == 1 if how == "flipped" else made <= 24
    assert entries(config) == right
    assert len(contents(config.datasets[0].cache_directory)) == 1
    assert check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS).exit_code == 0


# --- kills, and several at once


@needs_fork
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_and_equals_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, kills: int
) -> None:
    expected = entries(of_images(undisturbed))
    chance = random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("cache"))
        config = of_images(folder)
        # A fast machine is done before any second that one could name; it gives names to files all the same.
        is_over = run_to_step(lambda config=config: cache(config) and None, chance.randint(1, 3))
        assert not is_over
        for _ in range(2):
            run_and_kill(lambda _, config=config: cache(config) and None, chance.uniform(0.02, 0.8))
        there = entries(config) if config.datasets[0].cache_directory.is_dir() else {}
        media = cache_media(two(), config, options())
        assert media.reused >= sum("_te." not in name for name in there)
        cache_texts(two(), config, options())
        assert entries(config) == expected
        assert len(contents(config.datasets[0].cache_directory)) == 1


def main_of(used: ToyFamily, config: Any, **changes: Any) -> Callable[..., None]:
    """What `main` of a caching script does."""

    def main(words: Sequence[str], run: Callable[..., None]) -> None:
        assert words == ("--words",)
        run(used, config, options(**changes), "following")

    return main


OPTIONS = read_ray_options(None, ["wan_cache_latents.py", "--vae", "V"])


def run_actor(used: ToyFamily, config: Any) -> dict[str, Any]:
    """The row of an actor that does the only shard."""
    row = CachingActor(main_of(used, config), ("--words",), True, 1, 1)({"shard_index": [0]})
    return {column: value for column, (value,) in row.items()}


@pytest.mark.parametrize("is_latents", [True, False], ids=["latents", "texts"])
def test_an_actor_loads_the_encoders_once_and_gives_the_bytes_of_a_plain_run(
    tmp_path: Path, is_latents: bool
) -> None:
    config = make_dataset(tmp_path)
    cache = cache_media if is_latents else cache_texts
    cache(family(), into(config, tmp_path / "plain"), options())
    used = family()
    actor = CachingActor(main_of(used, into(config, tmp_path / "shared")), ("--words",), is_latents, 3, 1)

    rows = [actor({"shard_index": indices}) for indices in ([2], [0, 1])]

    assert contents(tmp_path / "shared") == contents(tmp_path / "plain")
    assert (used.loaded if is_latents else used.text[0].loaded) == 1
    assert [row["shard_index"] for row in rows] == [[2], [0, 1]]
    assert sum(number for row in rows for number in row["sources"]) == (5 if is_latents else 6)
    assert sum(number for row in rows for number in row["written"]) == len(contents(tmp_path / "plain"))
    assert not any(text for row in rows for text in row["error"])
    report = cache(family(), into(config, tmp_path / "shared"), options())
    assert (report.written, report.removed) == (0, 0)


def test_what_an_actor_cannot_do_is_told_in_its_row(tmp_path: Path) -> None:
    config = make_dataset(tmp_path)
    refused = ToyFamily(refuses="no such thing")
    row = run_actor(refused, config)
    assert "no such thing" in row["error"]
    with pytest.raises(DatasetError, match=r"1 of 1 shards could not be done(.|\n)*shard 0: .*no such thing"):
        conclude_shards([row], OPTIONS)

    (tmp_path / "clip_1.mp4").write_bytes(b"no clip")
    with pytest.raises(DatasetError, match=r"1 of the sources(.|\n)*clip_1"):
        conclude_shards([run_actor(family(), config)], OPTIONS)


def test_all_caching_scripts_run_on_a_cluster_and_no_others() -> None:
    scripts = {path.stem for path in ROOT.glob("*cache_*.py")} - {"cache_on_ray"}
    assert scripts == set(caching_scripts())
    read = read_ray_options(None, ["--num_actors", "2", "some/wan_cache_latents.py", "--vae", "V"])
    assert (read.script, read.is_latents, read.command[1:]) == ("wan_cache_latents", True, ("--vae", "V"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["latents", "texts"])
def test_a_cluster_of_two_workers_gives_the_bytes_of_a_plain_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pytest.importorskip("ray.data")
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, WAN)
    text = (tmp_path / "dataset.toml").read_text(encoding="utf-8")
    (tmp_path / "shared.toml").write_text(text.replace("/cache", "/shared"), encoding="utf-8")
    script, *words = WAN.cache_latents if part == "latents" else WAN.cache_texts
    shared = [word.replace("dataset.toml", "shared.toml") for word in words]
    module = __import__(script.removesuffix(".py"))
    module.main(words)
    sockets = tmp_path_factory.getbasetemp().parent / f"ray{part[0]}"  # a short path

    arguments = ["--num_actors", "2", "--gpus_per_actor", "0", "--temp_dir", str(sockets)]
    cache_on_ray.main([*arguments, script, *shared])

    assert len(contents(tmp_path / "cache")) == 6
    assert contents(tmp_path / "shared") == contents(tmp_path / "cache")
