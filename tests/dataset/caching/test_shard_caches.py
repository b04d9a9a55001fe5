"""Caching and training with `cache_format = "shards"`: the same as with single files, in few files."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_tools.report.check import check_caching, check_training
from dataset.batches.items import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.catalog import list_shards
from dataset.cache.shards import ShardStore
from dataset.cache.store import open_store
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from dataset.sources.media_source import INDEX
from modules.errors import CacheError
from tests.dataset.cache.killing import needs_fork, run_and_kill
from tests.dataset.making import make_image, make_table
from tests.dataset.test_two_passes import COMMANDS, KEYS, two
from tests.dataset.toy_family import LATENT, options

COUNT = 12
FORMS = ("files", "shards")


def make(folder: Path, form: str, **changes: object) -> DatasetConfig:
    """Pictures with captions, and a cache of this form."""
    if not (folder / "pic_00.png").exists():
        folder.mkdir(exist_ok=True)
        for number in range(COUNT):
            make_image(folder / f"pic_{number:02d}.png", colour=(10 * number, 20, 30))
            (folder / f"pic_{number:02d}.txt").write_text(f"picture {number}", encoding="utf-8")
    settings = {"resolution": (32, 32), "caption_extension": ".txt", "cache_format": form, **changes}
    table = make_table(folder, "image_directory", **settings)
    return DatasetConfig(folder / "data.toml", (table,))


def cache(config: DatasetConfig) -> tuple[int, int]:
    """Cache all; how many latents and texts were written."""
    return cache_media(two(), config, options()).written, cache_texts(two(), config, options()).written


def entries(config: DatasetConfig) -> dict[str, bytes]:
    """The bytes of each entry, in whatever form."""
    (table,) = config.datasets
    store = open_store(table)
    if isinstance(store, ShardStore):
        return {name: store.read_bytes(name) for name in store.names()}
    return {name: (store.folder / name).read_bytes() for name in store.names()}


def files(config: DatasetConfig) -> dict[str, bytes]:
    (table,) = config.datasets
    return {path.name: path.read_bytes() for path in table.cache_directory.iterdir() if path.suffix != ".tmp"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of pictures for each form, cached by nobody else."""
    first = tmp_path_factory.mktemp("forms") / "files"
    make(first, "files")
    shutil.copytree(first, first.with_name("shards"))
    for form in FORMS:
        assert cache(make(first.with_name(form), form)) == (COUNT, COUNT)
    return {form: first.with_name(form) for form in FORMS}


@pytest.fixture
def copy(undisturbed: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of these folders."""

    def copied(form: str) -> Path:
        shutil.copytree(undisturbed[form], tmp_path / form)
        return tmp_path / form

    return copied


def test_batches_are_the_same_from_both_forms(undisturbed: dict[str, Path]) -> None:
    batches = []
    for form in FORMS:
        config = make(undisturbed[form], form)
        assert check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS).exit_code == 0
        items = require_items(find_items(config, "toy", LATENT, KEYS), COMMANDS)
        batches.append(read_batch(items, LATENT, COMMANDS))
    ours, theirs = batches
    assert (ours.captions, ours.keys) == (theirs.captions, theirs.keys)
    for key, value in ours.tensors.items():
        for mine, other in zip(value, theirs.tensors[key], strict=True):
            assert torch.equal(mine, other)


# --- damage
# ------------------------------------------------------------------------------------------------------------


def shard_of(config: DatasetConfig) -> Path:
    folder = config.datasets[0].cache_directory
    (name,) = list_shards(folder)
    return folder / name


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_shard_is_noticed_and_mended_by_the_same_commands(
    copy: Callable[[str], Path], how: str, has_index: bool
) -> None:
    config = make(copy("shards"), "shards")
    right = entries(config)
    path = shard_of(config)
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[data.index(b"latents_1x") + 20] ^= 1
    path.write_bytes(data)
    if not has_index:
        (path.parent / INDEX).unlink()

    result = check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS)
    assert result.exit_code == 1
    with pytest.raises(CacheError, match=r"(?s)(cut|do not match).*cache_latents\.py --x"):
        read_batch(require_items(find_items(config, "toy", LATENT, KEYS), COMMANDS), LATENT, COMMANDS)

    if how == "cut":
        for planned in (
            check_caching(two(), config, 1, False),
            check_caching(two(), config, 1, False, parts=["texts"]),
        ):
            assert planned.exit_code == 0
            assert f"    {path} is damaged: it was cut" in "\n".join(planned.lines)
    made = sum(cache(config))
    assert made == 1 if how == "flipped" else made <= 24
    assert entries(config) == right
    assert len(files(config)) == 2
    assert check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS).exit_code == 0


# --- kills, and several at once
# ------------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_and_equals_an_undisturbed_one(
    undisturbed: dict[str, Path], tmp_path: Path, kills: int
) -> None:
    expected = entries(make(undisturbed["shards"], "shards"))
    chance, interrupted = random.Random(kills), 0
    for number in range(kills):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed["files"], folder, ignore=shutil.ignore_patterns("cache"))
        config = make(folder, "shards")
        for _ in range(3):
            _, is_over = run_and_kill(
                lambda _, config=config: cache(config) and None, chance.uniform(0.02, 0.8)
            )
            interrupted += not is_over
        there = entries(config) if config.datasets[0].cache_directory.is_dir() else {}
        media = cache_media(two(), config, options())
        assert media.kept >= sum("_te." not in name for name in there)
        cache_texts(two(), config, options())
        assert entries(config) == expected
        assert len(files(config)) == 2
    assert interrupted
