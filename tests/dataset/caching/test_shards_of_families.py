"""The caching scripts of real families, in shards: the same bytes as without."""

import importlib
from pathlib import Path

import pytest

from tests.dataset.caching.test_shards import contents
from tests.faults.runs import FAMILIES, Scripts, write_project

QUICK = next(scripts for scripts in FAMILIES if scripts.name == "hunyuan_video")  # with two text encoders
OTHERS = [scripts for scripts in FAMILIES if scripts is not QUICK]


def run(folder: Path, command: tuple[str, ...], dataset: str, *more: str) -> None:
    script, *words = command
    arguments = [dataset if word == "dataset.toml" else word for word in words]
    importlib.import_module(script.removesuffix(".py")).main([*arguments, *more])


@pytest.mark.parametrize(
    "scripts",
    [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=lambda one: one.name,
)
def test_shards_give_the_bytes_of_a_single_run(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, scripts)
    text = (tmp_path / "dataset.toml").read_text(encoding="utf-8")
    (tmp_path / "shared.toml").write_text(text.replace("/cache", "/shared"), encoding="utf-8")
    for command in (scripts.cache_latents, scripts.cache_texts):
        run(tmp_path, command, "dataset.toml")
        for index in (1, 0):
            run(tmp_path, command, "shared.toml", "--num_shards", "2", "--shard_index", str(index))

    assert len(contents(tmp_path / "cache")) > 3
    assert contents(tmp_path / "shared") == contents(tmp_path / "cache")
