"""A family with two text encoders: its text caches are whole or unfinished, never half, whenever the work is
stopped.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.report.check import check_training
from dataset.batches.finding import find_items, require_items
from dataset.batches.items import CachingCommands
from dataset.batches.reading import read_batch
from dataset.cache_files import read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from modules.errors import CacheError
from protocols.data import Conditions
from protocols.requests import Prompt
from tests.dataset.cache.killing import needs_fork, run_to_step
from tests.dataset.caching.test_loop import change, make_config, names
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options

KEYS = frozenset({"llm", "llm_mask", "clipL"})
COMMANDS = CachingCommands(lambda: ("python cache_latents.py --x", "python cache_text.py --y"))
FILES = ["clip_0_toy_te.safetensors", "clip_1_toy_te.safetensors"]
PARTS = [f"{name}.part" for name in FILES]


class Interrupted(Exception):
    """Somebody stops the run."""


@dataclasses.dataclass
class ToyLlm(ToyText):
    """An encoder of two tensors of fixed length."""

    name: str = "llm"
    variable_length: frozenset[str] = frozenset()
    identity: Any = dataclasses.field(default_factory=lambda: {"llm": "first"})

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({"llm", "llm_mask"})

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.calls += [prompt.text for prompt in prompts]
        return [
            {"llm": torch.full((3, 2), float(len(one.text))), "llm_mask": torch.ones(3, dtype=torch.int64)}
            for one in prompts
        ]


@dataclasses.dataclass
class ToyClip(ToyText):
    """An encoder of one vector. `stop_at`: the caption at which the run is stopped."""

    name: str = "clipL"
    variable_length: frozenset[str] = frozenset()
    identity: Any = dataclasses.field(default_factory=lambda: {"clipL": "first"})
    stop_at: str | None = None

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        if any(prompt.text == self.stop_at for prompt in prompts):
            raise Interrupted
        self.calls += [prompt.text for prompt in prompts]
        return [{"clipL": torch.full((2,), float(len(one.text)))} for one in prompts]


def two(llm: str = "first", clip: str = "first", stop_at: str | None = None) -> ToyFamily:
    """The family; llm, clip: which checkpoints its encoders have."""
    encoders: list[ToyText] = [
        ToyLlm(identity={"llm": llm}),
        ToyClip(identity={"clipL": clip}, stop_at=stop_at),
    ]
    return ToyFamily(text=encoders, text_keys=KEYS)


def cache(folder: Path) -> Path:
    return folder / "cache"


def calls(family: ToyFamily) -> list[list[str]]:
    return [encoder.calls for encoder in family.text]


def assert_whole(config: DatasetConfig, folder: Path) -> None:
    """All text caches are finished, and a further run finds nothing to do."""
    assert [name for name in names(folder) if "_te" in name and name[0] != "."] == FILES
    for name in FILES:
        entry = read_entry(cache(folder) / name)
        assert set(entry.tensors) == KEYS
    family = two()
    assert cache_texts(family, config, options()).reused == 2
    assert calls(family) == [[], []]
    assert [encoder.loaded for encoder in family.text] == [0, 0]


def stopped(folder: Path, stop_at: str = "clip number 1") -> DatasetConfig:
    """A run that was stopped in its second pass."""
    config = make_config(folder)
    with pytest.raises(Interrupted):
        cache_texts(two(stop_at=stop_at), config, options())
    return config


def test_the_first_pass_leaves_an_unfinished_file_that_the_next_run_finishes(tmp_path: Path) -> None:
    config = stopped(tmp_path)
    assert names(tmp_path) == [FILES[0], PARTS[1]]  # the first source was through both
    again = two()
    report = cache_texts(again, config, options())
    assert (report.written, report.reused) == (1, 1)
    assert calls(again) == [[], ["clip number 1"]]
    assert again.text[0].loaded == 0
    assert_whole(config, tmp_path)


def test_a_changed_caption_leaves_the_old_file_whole_until_the_new_one_is(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache_texts(two(), config, options())
    before = (cache(tmp_path) / FILES[1]).read_bytes()
    (tmp_path / "clip_1.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(Interrupted):
        cache_texts(two(stop_at="another text"), config, options())
    assert names(tmp_path) == [*FILES, PARTS[1]]
    assert (cache(tmp_path) / FILES[1]).read_bytes() == before
    cache_texts(two(), config, options())
    assert read_entry(cache(tmp_path) / FILES[1]).metadata["caption1"] == "another text"
    assert_whole(config, tmp_path)


# --- training


def test_training_refuses_unfinished_files_with_the_command(tmp_path: Path) -> None:
    config = stopped(tmp_path)
    cache_media(two(), config, options())
    with pytest.raises(
        CacheError,
        match=r"(?s)1 text cache is unfinished, .*clip_1_toy_te\.safetensors\.part.*cache_text\.py",
    ):
        require_items(find_items(config, "toy", LATENT, KEYS), COMMANDS)
    result = check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS)
    assert result.exit_code == 1
    assert "1 text cache is unfinished" in "\n".join(result.lines)
    cache_texts(two(), config, options())
    assert check_training(config, "toy", LATENT, COMMANDS, text_keys=KEYS).exit_code == 0
    items = require_items(find_items(config, "toy", LATENT, KEYS), COMMANDS)
    assert read_batch(items, LATENT).tensor("llm").shape == (2, 3, 2)


@needs_fork
def test_a_run_killed_at_any_write_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    """Of two sources each writes and renames its unfinished file, then the joined one."""
    config = make_config(tmp_path)
    undisturbed = change(config, cache_directory=tmp_path / "undisturbed")
    cache_texts(two(), undisturbed, options())
    step, is_done = 0, False
    while not is_done:
        step += 1
        shutil.rmtree(cache(tmp_path), ignore_errors=True)
        is_done = run_to_step(lambda: cache_texts(two(), config, options()) and None, step)
        for path in cache(tmp_path).iterdir():
            if path.name.startswith("."):
                continue
            there = set(read_entry(path).tensors)
            assert there == KEYS if path.suffix == ".safetensors" else there >= {"llm", "llm_mask"}
        cache_texts(two(), config, options())
        assert_whole(config, tmp_path)
        for name in FILES:
            assert (cache(tmp_path) / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert step > 4
