"""Models cut into files: whatever interrupts the writing, files of two models are never taken for one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from blissful_tuner.model_utility import main
from modules.checkpoints.changing import existing_shards, gather, write_shards
from modules.checkpoints.opening import open_checkpoint
from modules.contract.loading import TensorInfo
from modules.errors import CheckpointError

NAMES = ("a", "b", "c")
SIZE = 400  # bytes of a tensor


class Killed(BaseException):
    """The machine stops here."""


def write_model(path: Path, value: float, shard_bytes: int) -> None:
    tensors = {name: TensorInfo(torch.float32, (100,)) for name in NAMES}
    write_shards(path, tensors, lambda _: torch.full((100,), value), {}, shard_bytes)


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, folder: Path, changes: int) -> Iterator[list[Path]]:
    """Raise Killed at the next change of the folder's names after that many; yields the names changed."""
    changed: list[Path] = []

    def counted(change: Callable[..., Any], place: int) -> Callable[..., Any]:
        def run(*words: Any, **options: Any) -> Any:
            target = Path(words[place])
            if target.parent == folder and (place == 1 or target.exists()):
                if len(changed) == changes:
                    raise Killed
                changed.append(target)
            return change(*words, **options)

        return run

    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", counted(os.replace, 1))
        patches.setattr(Path, "unlink", counted(Path.unlink, 0))
        yield changed


def values(path: Path, opened: Callable[[Path], Any]) -> set[float]:
    with opened(path) as checkpoint:
        assert set(checkpoint.tensors) == set(NAMES)
        return {float(number) for name in NAMES for number in checkpoint.read(name)}


@pytest.mark.parametrize("before", [3 * SIZE, 2 * SIZE, SIZE])  # one file, two, as many as the new model
def test_a_kill_between_two_names_leaves_one_model_or_none(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = steps = 0
    for steps in range(20):
        folder = tmp_path / str(steps)
        path = folder / "model.safetensors"
        write_model(path, 1.0, before)
        try:
            with killed_after(monkeypatch, folder, steps):
                write_model(path, 2.0, SIZE)
            break
        except Killed:
            pass
        files = [*folder.glob("*.safetensors"), *existing_shards(path), folder]
        for file in files:
            for opened in (gather, open_checkpoint):
                try:
                    assert values(file, opened) in ({1.0}, {2.0}), (steps, file)
                except CheckpointError:
                    refused += 1
    assert steps >= 4
    assert refused
    assert values(folder, gather) == {2.0}


def test_a_folder_with_some_of_the_shards_is_refused_with_the_names_of_others(tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", 1.0, SIZE)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert values(tmp_path, gather) == {1.0}
    (tmp_path / "model-00002-of-00003.safetensors").unlink()

    for opened in (gather, open_checkpoint):
        with pytest.raises(CheckpointError, match="model-00002-of-00003"):
            opened(tmp_path)


def test_older_shards_go_after_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.safetensors"
    write_model(source, 1.0, SIZE)
    target = tmp_path / "out" / "model.safetensors"
    write_model(target, 2.0, SIZE)

    with killed_after(monkeypatch, target.parent, 99) as changed:
        main(
            ["--input", str(tmp_path / "in.safetensors.index.json"), "--convert", str(target), "-y"]
            + ["--shard_size", "1MB"]
        )

    assert [path.name for path in changed] == [
        "model.safetensors",
        "model.safetensors.index.json",
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    ]
    assert [path.name for path in target.parent.iterdir()] == ["model.safetensors"]
