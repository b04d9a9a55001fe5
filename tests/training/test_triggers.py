"""Files in the output folder that ask a run for samples or a save."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from training.run import train_network
from training.saving.files import Names
from training.training_run import EVERY_SECONDS, LARGEST, SAMPLE, SAVE, TriggerFiles, trigger_paths


def files_in(folder: Path, can_sample: bool = True) -> tuple[TriggerFiles, Callable[[], None]]:
    """What watches the folder of a run x, and what lets a second pass."""
    clock = [0.0]

    def later() -> None:
        clock[0] += EVERY_SECONDS

    return TriggerFiles(trigger_paths(Names(folder, "x")), can_sample, lambda: clock[0]), later


@pytest.mark.parametrize(
    ("name", "kind"), [("x.sample", SAMPLE), ("sample", SAMPLE), ("x.save", SAVE), ("save", SAVE)]
)
def test_a_file_asks_until_it_is_done_and_is_removed_then(tmp_path: Path, name: str, kind: str) -> None:
    triggers, later = files_in(tmp_path)
    other = SAVE if kind == SAMPLE else SAMPLE
    assert not triggers.asks_for(kind)
    (tmp_path / name).touch()
    assert not triggers.asks_for(kind)  # within the same second
    later()
    assert triggers.asks_for(kind)
    assert not triggers.asks_for(other)
    triggers.finish(other)
    assert (tmp_path / name).exists()
    assert triggers.asks_for(kind)
    triggers.finish(kind)
    assert not (tmp_path / name).exists()
    later()
    assert not triggers.asks_for(kind)


def test_a_folder_a_link_and_a_file_with_content_ask_for_nothing_and_stay(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "save").write_bytes(b"x" * (LARGEST + 1))
    if sys.platform != "win32":
        (tmp_path / "x.save").symlink_to(tmp_path / "nothing")
    triggers, _ = files_in(tmp_path)

    assert not triggers.asks_for(SAMPLE)
    assert not triggers.asks_for(SAVE)
    triggers.finish(SAVE)
    assert (tmp_path / "save").exists()


def test_samples_without_prompts_are_refused_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    triggers, later = files_in(tmp_path, can_sample=False)
    (tmp_path / "x.sample").touch()

    assert not triggers.asks_for(SAMPLE)
    later()
    assert not triggers.asks_for(SAMPLE)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--sample_prompts" in caplog.text
    assert not (tmp_path / "x.sample").exists()


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="nobody may remove it there")
def test_a_file_that_cannot_be_removed_is_ignored_until_it_changes(tmp_path: Path) -> None:
    triggers, later = files_in(tmp_path)
    (tmp_path / "save").touch()
    assert triggers.asks_for(SAVE)
    tmp_path.chmod(0o500)
    try:
        triggers.finish(SAVE)
    finally:
        tmp_path.chmod(0o700)
    later()
    assert not triggers.asks_for(SAVE)


def test_a_run_samples_and_saves_at_the_next_step_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    write_caches(tmp_path)
    expected = train_toy(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --s 1 --d 1\n", encoding="utf-8")
    folder = tmp_path / "asked"

    def touch(passes: int) -> None:
        if passes == 0:
            (folder / "x.sample").touch()
            (folder / "x.save").touch()

    options = ["--output_dir", folder, "--sample_prompts", tmp_path / "prompts.txt", "--sample_now"]
    train_network(ToyFamily(watch=touch), toy_options(tmp_path, *options, "--save_state"))

    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "sample",
        "x-state",
        "x-step00000001-state",
        "x-step00000001.safetensors",
        "x.safetensors",
    ]
    assert [path.name[:8] for path in (folder / "sample").iterdir()] == ["x_000001"]
    assert same(expected, load_file(folder / "x.safetensors"))
