"""Caching on a Ray cluster: the actor by itself, and a cluster of two workers with a real script."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import cache_on_ray
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.on_ray import CachingActor, conclude_shards
from dataset.options import SCRIPTS, read_ray_options
from modules.errors import DatasetError
from tests.commands import ROOT
from tests.dataset.caching.test_shards import contents, family, into, make_dataset
from tests.dataset.toy_family import ToyFamily, options
from tests.faults.runs import FAMILIES, write_project


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
    assert scripts == set(SCRIPTS)
    read = read_ray_options(None, ["--num_actors", "2", "some/wan_cache_latents.py", "--vae", "V"])
    assert (read.script, read.is_latents, read.command[1:]) == ("wan_cache_latents", True, ("--vae", "V"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["latents", "texts"])
def test_a_cluster_of_two_workers_gives_the_bytes_of_a_plain_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pytest.importorskip("ray.data")
    scripts = next(one for one in FAMILIES if one.name == "wan")
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, scripts)
    text = (tmp_path / "dataset.toml").read_text(encoding="utf-8")
    (tmp_path / "shared.toml").write_text(text.replace("/cache", "/shared"), encoding="utf-8")
    script, *words = scripts.cache_latents if part == "latents" else scripts.cache_texts
    shared = [word.replace("dataset.toml", "shared.toml") for word in words]
    module = __import__(script.removesuffix(".py"))
    module.main(words)
    sockets = tmp_path_factory.getbasetemp().parent / f"ray{part[0]}"  # a short path

    arguments = ["--num_actors", "2", "--gpus_per_actor", "0", "--temp_dir", str(sockets)]
    cache_on_ray.main([*arguments, script, *shared])

    assert len(contents(tmp_path / "cache")) == 6
    assert contents(tmp_path / "shared") == contents(tmp_path / "cache")
