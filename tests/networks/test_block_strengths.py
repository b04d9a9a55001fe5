"""Strengths of a LoRA by block, when it is used and in a file that is written with them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks.block_strengths import resolve_strengths, scale_blocks, split_block_name
from networks.delta import read_deltas
from networks.loading import read_lora, read_weighted_loras
from networks.metadata import save_network
from networks.module_factors import group_by_module
from networks.rewriting_blocks import HISTORY, BlockOptions, rewrite_blocks
from networks.typed_strengths import read_block_strengths
from networks.use_options import LoraPatternOptions
from tests.diagnosis.test_diagnose import write_lora
from tests.networks.making import randomize, tiny_dit
from tests.tiny.loras import make_lora

CPU = torch.device("cpu")
HERE = Path("x.safetensors")
NAMES = [f"lora_unet_{kind}_blocks_{n}_attn_qkv" for kind in ("double", "single") for n in range(3)]


def write_kind(kind: str, folder: Path) -> Path:
    """Write a network of a kind on a tiny Wan, with random factors."""
    network = make_lora("lora_wan" if kind == "lora" else kind, 4, 2.0, tiny_dit(folder))
    randomize(network)
    path = folder / f"{kind}.safetensors"
    save_network(network, path, torch.float32, {"ss_base_model_version": "wan2.1"})
    return path


def changes_of(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: delta.compute_change(CPU) for name, delta in read_deltas(group_by_module(tensors)).items()}


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("lora_unet_blocks_0_self_attn_q", ("blocks", 0)),
        ("lora_unet_double_blocks_12_img_attn_qkv", ("double_blocks", 12)),
        ("lora_unet_input_blocks_4_1_proj_in", ("input_blocks", 4)),
        ("lora_unet_final_layer_linear", None),
    ],
)
def test_blocks_are_named_by_their_list_and_number(module: str, block: tuple[str, int] | None) -> None:
    assert split_block_name(module) == block


def test_texts_are_parsed_and_the_last_item_counts(tmp_path: Path) -> None:
    names = [f"lora_unet_blocks_{n}_ffn_0" for n in range(6)] + ["lora_unet_head_head"]
    resolved = resolve_strengths(names, "0-3=0.5, 2=.25, 5-=-1, other=0", HERE)
    assert list(resolved.values()) == [0.5, 0.5, 0.25, 0.5, -1, 0]
    preset = tmp_path / "a preset ü.txt"
    preset.write_text("# faces\n0-3=0.5  # early\n2=.25,5-=-1\nother=0\n", encoding="utf-8")
    assert resolve_strengths(names, f"@{preset}", HERE) == resolved
    assert resolve_strengths(NAMES, "double_blocks:1-=2", HERE) == dict.fromkeys(NAMES[1:3], 2.0)
    preset.write_bytes("0-3=0.5 # früh".encode("utf-16"))
    with pytest.raises(OptionError, match="is not text in UTF-8"):
        resolve_strengths(names, f"@{preset}", HERE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-9", "write blocks and their strength"),
        ("0-9=1.2.3", "write blocks and their strength"),
        ("x:other=1", "write blocks and their strength"),
        ("@none.txt", "cannot be read"),
        ("0=0.5", "has blocks of double_blocks and single_blocks. Write double_blocks:0=0.5"),
        ("double_blocks:40-=0", "names no block of x.safetensors, which has blocks 0 to 2"),
        ("other=0.5", "names no block"),
    ],
)
def test_texts_that_do_not_fit_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=r"^--lora_blocks ") as caught:
        resolve_strengths(NAMES, text, HERE)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_told"), [("double_blocks:0-9=2", True), ("double_blocks:1-2=2", False), ("other=1", False)]
)
def test_a_text_for_a_deeper_model_is_told(
    text: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_strengths([*NAMES, "lora_unet_img_in"], text, HERE)

    told = f"--lora_blocks '{text}': the last of these blocks in x.safetensors is 2"
    assert caplog.messages == ([told] if is_told else [])


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_the_change_of_a_block_is_scaled_in_each_kind_of_network(kind: str, tmp_path: Path) -> None:
    path = write_kind(kind, tmp_path)
    tensors = dict(read_lora(path).tensors)
    before = changes_of(tensors)
    after = changes_of(scale_blocks(tensors, "0=0.5, 1=0", path))
    assert any(split_block_name(name) == ("blocks", 0) for name in before)
    for name, change in before.items():
        block = split_block_name(name)
        if block == ("blocks", 1):
            assert name not in after
            continue
        assert change is not None
        expected = 0.5 * change if block == ("blocks", 0) else change
        # 0.5 is a power of two: exact
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["oft"])
def test_a_rotation_has_no_strength(kind: str, tmp_path: Path) -> None:
    path = write_kind(kind, tmp_path)
    tensors = read_lora(path).tensors
    with pytest.raises(OptionError, match="can only have the strength 0 or 1"):
        scale_blocks(tensors, "0=0.5", path)
    assert not any(split_block_name(name) == ("blocks", 0) for name in scale_blocks(tensors, "0=0", path))


def test_a_written_file_equals_the_strengths_to_the_bit(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a ü.safetensors")
    text = "0-1=0.3, 4-=0"
    rewrite_blocks(BlockOptions(model=path, lora_blocks=text, output=tmp_path / "b.safetensors"))
    (used,) = read_weighted_loras([(path, 1.0)], LoraPatternOptions(lora_blocks=(text,)))
    written = read_lora(tmp_path / "b.safetensors")
    assert written.tensors.keys() == used.lora.tensors.keys()
    for name, tensor in used.lora.tensors.items():
        assert torch.equal(tensor, written.tensors[name]), name
    assert changes_of(dict(written.tensors)) != changes_of(dict(read_lora(path).tensors))
    rewrite_blocks(
        BlockOptions(model=tmp_path / "b.safetensors", lora_blocks="2=2", output=tmp_path / "c.safetensors")
    )
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert json.loads(file.metadata()[HISTORY]) == [
            {"model": "a ü.safetensors", "lora_blocks": text},
            {"model": "b.safetensors", "lora_blocks": "2=2"},
        ]


@pytest.mark.parametrize("history", ["{", '"a"', "[" * 100_000])
def test_a_history_that_is_no_list_begins_anew(history: str, tmp_path: Path) -> None:
    tensors = read_lora(write_lora(tmp_path / "a.safetensors")).tensors
    save_file(tensors, tmp_path / "b.safetensors", {HISTORY: history})
    output = tmp_path / "c.safetensors"
    rewrite_blocks(BlockOptions(model=tmp_path / "b.safetensors", lora_blocks="2=2", output=output))
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()[HISTORY]) == [{"model": "b.safetensors", "lora_blocks": "2=2"}]


def test_blocks_of_a_donor_replace_those_of_the_file(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    donor = write_lora(tmp_path / "d.safetensors", seed=5)
    output = tmp_path / "new.safetensors"
    rewrite_blocks(BlockOptions(model=path, donor=donor, donor_blocks="2-3=1", output=output))
    result, own, other = (read_lora(file).tensors for file in (output, path, donor))
    for name, tensor in result.items():
        block = split_block_name(name.partition(".")[0])
        expected = other if block in {("blocks", 2), ("blocks", 3)} else own
        assert torch.equal(tensor, expected[name]), name
    foreign = write_kind("lora", tmp_path)
    with pytest.raises(CheckpointError, match="for different models"):
        rewrite_blocks(BlockOptions(model=foreign, donor=donor, donor_blocks="5=1", output=output))


@pytest.mark.parametrize("text", ["x", "9=1", "@none.txt"])
def test_messages_name_the_option_that_was_typed(text: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    with pytest.raises(OptionError, match=r"^--donor_blocks "):
        rewrite_blocks(BlockOptions(model=path, donor=path, donor_blocks=text, output=output))
    rotation = write_kind("oft", tmp_path)
    with pytest.raises(OptionError, match="with --donor_blocks its block"):
        rewrite_blocks(BlockOptions(model=path, donor=rotation, donor_blocks="0=0.5", output=output))


def test_more_texts_than_files_and_nothing_to_do_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write_lora(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="--lora_blocks has 2 texts for 1 LoRA file:"):
        read_weighted_loras([(path, 1.0)], LoraPatternOptions(lora_blocks=("0=1", "1=1")))
    with pytest.raises(OptionError, match="--lora_blocks is about LoRA files, and none is given"):
        read_weighted_loras([], LoraPatternOptions(lora_blocks=("0=1",)))
    read_weighted_loras([(path, 1.0), (path, 0.5)], LoraPatternOptions(lora_blocks=("0=1",)))
    assert "used whole: a.safetensors" in caplog.text
    with pytest.raises(OptionError, match="nothing would change"):
        BlockOptions(model=path, output=tmp_path / "b.safetensors")
    with pytest.raises(OptionError, match="every block has the strength 0"):
        rewrite_blocks(BlockOptions(model=path, lora_blocks="0-=0", output=tmp_path / "b.safetensors"))
    assert read_block_strengths("0=1,,") == read_block_strengths("0=1")
