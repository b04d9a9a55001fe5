"""blissful_tuner/model_utility.py on files that are odd, damaged, or made to mislead."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blissful_tuner.model_utility import main
from modules.checkpoints.containers import MAX_HEADER_BYTES
from modules.errors import CheckpointError, OptionError, OutputError


def run(path: Path, *words: object) -> None:
    main(["--input", str(path), *map(str, words)])


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_index(folder: Path, name: str) -> Path:
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": name}}), encoding="utf-8")
    return index


@pytest.mark.parametrize("name", ["../b.safetensors", "{}/b.safetensors"])
def test_an_index_leads_to_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, name.format(tmp_path))

    with pytest.raises(CheckpointError, match=r"b\.safetensors is not in its folder"):
        run(folder)


def test_an_index_may_lead_to_links_and_to_folders_below(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    save_file({"b": torch.full((1,), 3.0)}, blob)
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "b.safetensors").symlink_to(blob)
    index = write_index(folder, "below/b.safetensors")

    run(index, "--convert", tmp_path / "all.safetensors")

    assert load_file(tmp_path / "all.safetensors")["b"] == 3.0


def test_an_index_with_an_endless_name_is_refused_in_few_words(tmp_path: Path) -> None:
    write_index(tmp_path, "b" * 1_000_000)

    with pytest.raises(CheckpointError, match="not beside it") as failure:
        run(tmp_path)
    assert len(str(failure.value)) < 1000


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "C64"])
def test_a_dtype_that_no_model_here_has_is_named_and_not_called_damage(tmp_path: Path, kind: str) -> None:
    path = write_raw(
        tmp_path / "a.safetensors", {"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}, b"0000"
    )

    with pytest.raises(CheckpointError, match=f"w is of type {kind}, which is not supported"):
        run(path)


def test_whole_numbers_with_a_scale_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {
        "l.weight": torch.tensor([[1, 2]], dtype=torch.int8),
        "l.weight_scale": torch.tensor(0.5),
        "m.weight": torch.ones(2),
    }
    save_file(state, path)

    run(path, "--convert", tmp_path / "b.safetensors", "--dtype", "bf16")

    made = load_file(tmp_path / "b.safetensors")
    assert torch.equal(made["l.weight"], state["l.weight"])
    assert torch.equal(made["l.weight_scale"], state["l.weight_scale"])
    assert made["m.weight"].dtype == torch.bfloat16


def test_a_scale_that_does_not_fit_its_weight_is_named(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    save_file({"l.weight": weight, "l.scale_weight": torch.ones(3, 1)}, path)

    with pytest.raises(CheckpointError, match=r"the scale of l\.weight has the shape \[3, 1\]"):
        run(path, "--convert", out, "--dtype", "bf16")
    assert not out.exists()


def test_a_lora_of_single_numbers_is_described_without_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    parts = {"lora_down.weight": torch.tensor(1.0), "lora_up.weight": torch.ones(4, 8)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{part}": each for part, each in parts.items()}, path)

    run(path)

    assert "a LoRA" in capsys.readouterr().out


def test_names_that_no_safetensors_file_can_hold_are_refused(tmp_path: Path) -> None:
    half, taken = tmp_path / "half.pt", tmp_path / "taken.pt"
    torch.save({"a\ud800": torch.ones(1)}, half)
    torch.save({"__metadata__": torch.ones(2), "b": torch.zeros(1)}, taken)
    out = tmp_path / "out.safetensors"

    with pytest.raises(CheckpointError, match="a tensor's name is no text"):
        run(half)
    with pytest.raises(OptionError, match="would be called __metadata__"):
        run(taken, "--convert", out)
    assert not out.exists()
    run(taken, "--convert", out, "--add_prefix", "x.")
    assert set(load_file(out)) == {"x.__metadata__", "x.b"}


def test_a_tensor_without_a_name_can_be_written(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path / "a.safetensors", {"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000"
    )

    run(path, "--convert", tmp_path / "b.safetensors", "--add_prefix", "w")

    assert set(load_file(tmp_path / "b.safetensors")) == {"w"}


def test_a_header_that_nothing_could_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path)

    with pytest.raises(OutputError, match="cannot be read. Give shorter names"):
        run(path, "--convert", tmp_path / "b.safetensors", "--add_prefix", "x" * MAX_HEADER_BYTES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_name_of_several_lines_is_shown_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a\ntensors: 1000": torch.ones(1)}, path)

    run(path, "--inspect")

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("tensors:")] == ["tensors: 1, with 1 number"]
    assert lines[-1] == "a\\ntensors: 1000: [1] (float32)"


def test_the_index_of_the_model_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1000)}, tmp_path / "b.safetensors")
    index = write_index(tmp_path, "b.safetensors")
    before = index.read_bytes()

    with pytest.raises(OptionError, match="would be lost"):
        run(tmp_path, "--convert", tmp_path / "model.safetensors", "--shard_size", "1kB", "-y")
    assert index.read_bytes() == before
