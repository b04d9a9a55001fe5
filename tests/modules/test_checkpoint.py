"""Model files as users name them: shards, folders, prefixes; filling a network from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.checkpoint import (
    Source,
    checkpoint_paths,
    compress_names,
    dequantise,
    fingerprint,
    load_module,
    open_checkpoint,
    plain_sources,
)
from modules.errors import CheckpointError
from tests.modules.making import tensors, write

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))  # parameters and buffers


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()


def same(name: str, stored: torch.dtype) -> torch.dtype:
    return stored


def write_shards(folder: Path, suffix: str = ".safetensors", count: int = 3) -> list[Path]:
    names = list(tensors())
    parts = [{name: tensors()[name] for name in names[number::count]} for number in range(count)]
    return [write(folder / f"model-{number + 1:05d}-of-{count:05d}{suffix}", part) for number, part in enumerate(parts)]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("given", ["first", "last", "index", "folder"])
def test_shards_open_as_one_whatever_of_them_is_named(tmp_path: Path, given: str, suffix: str) -> None:
    shards = write_shards(tmp_path, suffix)
    if given in {"index", "folder"}:
        index = {"weight_map": {name: shards[number % 3].name for number, name in enumerate(tensors())}}
        (tmp_path / f"model{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    path = {"first": shards[0], "last": shards[-1], "index": tmp_path / f"model{suffix}.index.json", "folder": tmp_path}[given]

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    shards[1].unlink()

    with pytest.raises(CheckpointError, match=r"1 of its 3 files are not beside it: model-00002-of-00003\.safetensors"):
        open_checkpoint(shards[0])


def test_a_folder_without_a_single_model_asks_for_the_file(tmp_path: Path) -> None:
    write(tmp_path / "vae.pth", tensors())
    write(tmp_path / "text.pth", tensors())

    with pytest.raises(CheckpointError, match=r"model files: text\.pth, vae\.pth\)\. Name the file"):
        checkpoint_paths(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ""}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.index.json").write_text(content)

    with pytest.raises(CheckpointError, match="no index of model files|not beside it"):
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


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_in_the_dtype_asked_for(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, content = network(), state()

    with open_checkpoint(write(tmp_path / name, content)) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: dtype if stored.is_floating_point else stored,
        )

    for key, tensor in module.state_dict().items():
        assert tensor.dtype == (dtype if content[key].is_floating_point() else content[key].dtype)
        assert torch.equal(tensor, content[key].to(tensor.dtype))
    assert not any(weight.requires_grad for weight in module.parameters())


def test_sources_rename_split_and_transpose(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"k": nn.Linear(4, 8, bias=False), "v": nn.Linear(4, 8, bias=False)})
    stacked = torch.arange(64.0).reshape(4, 16)
    both = Source(("kv",)).then(torch.t)
    sources = {"k.weight": both.then(lambda rows: rows[:8]), "v.weight": both.then(lambda rows: rows[8:])}

    with open_checkpoint(write(tmp_path / "a.safetensors", {"kv": stacked})) as checkpoint:
        load_module(module, checkpoint, sources, device=CPU, dtype=same)

    assert torch.equal(module["v"].weight, stacked[:, 8:].t())
    assert module["v"].weight.untyped_storage().nbytes() == 8 * 4 * 4  # not the whole of what it was cut from


def test_every_mismatch_is_reported_at_once(tmp_path: Path) -> None:
    content = state()
    del content["0.bias"]
    content |= {"0.weight": torch.zeros(3, 4), "2.weight": torch.zeros(1), "3.weight": torch.zeros(1)}

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint, pytest.raises(CheckpointError) as caught:
        load_module(network(), checkpoint, plain_sources(checkpoint), device=CPU, dtype=same, what="--vae")

    assert str(caught.value).splitlines()[:-1] == [
        f"{tmp_path / 'a.safetensors'} does not fit --vae:",
        "  missing: 0.bias",
        "  unexpected: 2.weight",
        "  unexpected: 3.weight",
        "  0.weight: the file has 3 x 4, 8 x 4 is needed",
    ]


def test_tensors_to_ignore_may_stand_in_the_file(tmp_path: Path) -> None:
    content = state() | {"text.0.weight": torch.zeros(1)}

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        load_module(network(), checkpoint, plain_sources(checkpoint), device=CPU, dtype=same, ignore=("text.*",))


def test_on_the_meta_device_nothing_is_read(tmp_path: Path) -> None:
    module = network()
    with open_checkpoint(write(tmp_path / "a.safetensors", state())) as checkpoint:
        checkpoint.close()  # reading would fail now
        load_module(module, checkpoint, plain_sources(checkpoint), device=torch.device("meta"), dtype=same)

    assert module[0].weight.is_meta


def test_a_patch_is_added_before_rounding(tmp_path: Path) -> None:
    content = state()
    delta = torch.full((8, 4), 2.0**-12)  # lost where it is added to a rounded weight of about one half

    def patch(name: str, weight: Tensor) -> Tensor:
        return weight + delta if name == "0.weight" else weight

    module = network()
    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: torch.bfloat16 if name == "0.weight" else stored,
            patch=patch,
        )

    assert torch.equal(module[0].weight, (content["0.weight"] + delta).to(torch.bfloat16))


def test_a_patch_meets_fp8_weights_in_the_target_dtype(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 8, bias=False)
    weight = torch.ones(8, 4).to(torch.float8_e4m3fn)

    with open_checkpoint(write(tmp_path / "a.safetensors", {"weight": weight})) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: torch.bfloat16,
            patch=lambda name, weight: weight + 2.0**-7,
        )

    assert torch.equal(module.weight, torch.full((8, 4), 1 + 2.0**-7, dtype=torch.bfloat16))


@pytest.mark.parametrize(("shape", "expected"), [((), 0.5), ((1,), 0.5), ((2, 1), [0.5, 0.25]), ((2,), [0.5, 0.25])])
def test_scales_of_a_tensor_or_of_its_rows_multiply_the_stored_numbers(shape: tuple[int, ...], expected: Any) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.5, 0.25])[: torch.Size(shape).numel()].reshape(shape)

    assert torch.equal(dequantise(weight, scale), weight.float() * torch.tensor(expected).reshape(-1, 1))


def test_scales_of_blocks_multiply_their_part_of_a_row() -> None:
    weight = torch.ones(2, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).unsqueeze(-1)  # rows x blocks x 1

    assert dequantise(weight, scale).tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]


def _comfy_quant(kind: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("extra", "metadata", "message"),
    [
        ({"0.weight.absmax": torch.ones(1)}, {}, "it has 0.weight.absmax"),
        ({"0.weight_scale_2": torch.ones(1)}, {}, "it has 0.weight_scale_2"),
        ({"0.comfy_quant": _comfy_quant("nvfp4")}, {}, "nvfp4"),
        ({}, {"_quantization_metadata": json.dumps({"layers": {"0": {"format": "int8_tensorwise"}}})}, "int8_tensorwise"),
    ],
)
def test_other_quantisations_are_refused(tmp_path: Path, extra: dict[str, Tensor], metadata: dict[str, str], message: str) -> None:
    path = write(tmp_path / "a.safetensors", state() | extra, metadata=metadata)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=f"not supported.*{message}"):
        plain_sources(checkpoint)


def test_newer_fp8_files_with_their_own_record_are_read(tmp_path: Path) -> None:
    content = {
        "0.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "0.weight_scale": torch.tensor(0.5),
        "0.input_scale": torch.tensor(1.0),
        "0.comfy_quant": _comfy_quant("float8_e4m3fn"),
    }
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2, bias=False))

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        load_module(module, checkpoint, plain_sources(checkpoint), device=CPU, dtype=lambda name, stored: torch.bfloat16)

    assert torch.equal(module[0].weight, torch.full((2, 2), 0.5, dtype=torch.bfloat16))


def test_names_that_differ_in_their_number_are_listed_together() -> None:
    names = [f"blocks.{index}.norm.weight" for index in (0, 1, 2, 5)] + ["head.bias", "blocks.1.ffn.0.bias"]

    assert compress_names(names) == ["blocks.1.ffn.0.bias", "blocks.{0..2}.norm.weight", "blocks.5.norm.weight", "head.bias"]
