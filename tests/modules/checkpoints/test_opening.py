"""Model files as users name them: shards, folders, prefixes; weights that are stored with scales."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.checkpoints.opening import (
    checkpoint_paths,
    fingerprint,
    open_checkpoint,
    plain_sources,
)
from modules.errors import CheckpointError
from tests.modules.making import tensors, write


def write_shards(folder: Path, suffix: str = ".safetensors", count: int = 3) -> list[Path]:
    names = list(tensors())
    parts = [{name: tensors()[name] for name in names[number::count]} for number in range(count)]
    return [
        write(folder / f"model-{number + 1:05d}-of-{count:05d}{suffix}", part)
        for number, part in enumerate(parts)
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("given", ["first", "last", "index", "folder"])
def test_shards_open_as_one_whatever_of_them_is_named(tmp_path: Path, given: str, suffix: str) -> None:
    shards = write_shards(tmp_path, suffix)
    if given in {"index", "folder"}:
        index = {"weight_map": {name: shards[number % 3].name for number, name in enumerate(tensors())}}
        (tmp_path / f"model{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    path = {
        "first": shards[0],
        "last": shards[-1],
        "index": tmp_path / f"model{suffix}.index.json",
        "folder": tmp_path,
    }[given]

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    shards[1].unlink()

    with pytest.raises(
        CheckpointError, match=r"1 of its 3 files are not beside it: model-00002-of-00003\.safetensors"
    ):
        open_checkpoint(shards[0])


def test_a_folder_without_a_single_model_asks_for_the_file(tmp_path: Path) -> None:
    write(tmp_path / "vae.pth", tensors())
    write(tmp_path / "text.pth", tensors())

    with pytest.raises(CheckpointError, match=r"model files: text\.pth, vae\.pth\)\. Give the path"):
        checkpoint_paths(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ""}}', "[" * 100_000]
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.index.json").write_text(content)

    with pytest.raises(CheckpointError, match="not an index of model files|not beside it"):
        open_checkpoint(tmp_path / "m.index.json")


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_prefix_is_cut_only_where_every_name_has_it(tmp_path: Path) -> None:
    content = {"module.model.a": torch.ones(1), "module.model.b": torch.ones(1), "module.c": torch.ones(1)}

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        assert checkpoint.without_prefix("module.", "model.").tensors.keys() == {"model.a", "model.b", "c"}


def test_other_networks_of_an_all_in_one_file_are_left_out(tmp_path: Path) -> None:
    content = {"dit.a": torch.ones(1), "vae.a": torch.zeros(1)}

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        own = checkpoint.without_prefix("dit.", others=("vae.",))
        assert own.tensors.keys() == {"a"}
        assert torch.equal(own.read("a"), torch.ones(1))


def test_fingerprint_follows_the_content_not_the_name(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", tensors())
    copy = write(tmp_path / "b.safetensors", tensors())
    other = write(tmp_path / "c.safetensors", tensors() | {"scalar": torch.tensor(4.0)})

    assert fingerprint(first) == fingerprint(copy) != fingerprint(other)


def _comfy_quant(kind: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("extra", "metadata", "message"),
    [
        ({"0.weight.absmax": torch.ones(1)}, {}, "it has 0.weight.absmax"),
        ({"0.weight_scale_2": torch.ones(1)}, {}, "it has 0.weight_scale_2"),
        ({"0.comfy_quant": _comfy_quant("nvfp4")}, {}, "nvfp4"),
        (
            {},
            {"_quantization_metadata": json.dumps({"layers": {"0": {"format": "int8_tensorwise"}}})},
            "int8_tensorwise",
        ),
    ],
)
def test_other_quantisations_are_refused(
    tmp_path: Path, extra: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "a.safetensors", tensors() | extra, metadata=metadata)

    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=f"not supported.*{message}"),
    ):
        plain_sources(checkpoint)
