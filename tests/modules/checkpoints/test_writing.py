"""Files written tensor by tensor, and models cut into files, which are never taken for one another."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from blissful_tuner.model_utility import main
from modules.checkpoints.changing import existing_shards, gather, write_shards
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import CheckpointError

TENSORS = {
    "b": torch.randn(3, 4).to(torch.bfloat16),
    "a": torch.randn(2, 2),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    "turned": torch.randn(4, 3).T,
    "ümlaut": torch.ones(2, dtype=torch.bool),
}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    stream_tensors(path, INFOS, TENSORS.__getitem__, {"key": "välue"})

    stored = load_file(path)
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(tensor.float(), TENSORS[name].float()) for name, tensor in stored.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "välue"}


def test_data_lie_in_the_order_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    stream_tensors(path, INFOS, TENSORS.__getitem__)

    ours, theirs = path.read_bytes(), save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
    size_bytes = sum(info.size_bytes for info in INFOS.values())
    assert ours[-size_bytes:] == theirs[-size_bytes:]


def test_nothing_is_left_where_a_tensor_is_not_as_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scalar was announced"):
        stream_tensors(tmp_path / "x.safetensors", INFOS, lambda name: TENSORS[name].float())

    assert list(tmp_path.iterdir()) == []


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
