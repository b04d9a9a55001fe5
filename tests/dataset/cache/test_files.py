from pathlib import Path

import pytest
import torch

from dataset.cache.files import (
    LatentName,
    checksum,
    grid_in_name,
    is_latent_cache,
    is_text_cache,
    parse_latent_name,
    parse_text_name,
    read_entry,
    read_header,
    tensor_key,
    tensor_name,
    text_file_name,
    write_tensors,
)
from modules.errors import CacheError

NAMES = [
    ("image", LatentName("pic_0", (120, 90)), "wan", "pic_0_0120x0090_wan.safetensors"),
    ("video", LatentName("clip_0", (112, 80), (0, 17)), "wan", "clip_0_00000-017_0112x0080_wan.safetensors"),
    (
        "video",
        LatentName("clip", (640, 608), (0, 145), 2),
        "fp",
        "clip_00000-145-0002_0640x0608_fp.safetensors",
    ),
    (
        "video",
        LatentName("a b.c_1", (12800, 80), (123456, 1001)),
        "hv",
        "a b.c_1_123456-1001_12800x0080_hv.safetensors",
    ),
]


@pytest.mark.parametrize(("kind", "name", "tag", "file"), NAMES)
def test_latent_names_are_those_of_the_known_tuners_and_read_back(
    kind: str, name: LatentName, tag: str, file: str
) -> None:
    assert name.file_name(tag) == file
    assert parse_latent_name(file, tag, kind) == name


@pytest.mark.parametrize(
    "file",
    [
        "style_wan.safetensors",
        "clip_wan_te.safetensors",
        "clip_0112x0080_wan.safetensors",  # no frames: an image's
        "_0112x0080_wan.safetensors",
        ".clip_00000-017_0112x0080_wan.safetensors.ab12.tmp",
        "clip_00000-017_0112x0080_hv.safetensors",
        "clip_00000-017_0112x0080_wan.safetensors.bak",
    ],
)
def test_other_files_are_no_video_caches(file: str) -> None:
    assert parse_latent_name(file, "wan", "video") is None


def test_text_files_are_named_by_stem_and_family() -> None:
    assert text_file_name("clip_0", "wan") == "clip_0_wan_te.safetensors"
    assert parse_text_name("clip_0_wan_te.safetensors", "wan") == "clip_0"
    assert parse_text_name("clip_0_0112x0080_wan.safetensors", "wan") is None


@pytest.mark.parametrize(
    ("key", "tensor", "variable", "name"),
    [
        ("latents", torch.zeros(16, 5, 10, 14, dtype=torch.bfloat16), False, "latents_5x10x14_bfloat16"),
        ("latents_image", torch.zeros(20, 5, 10, 14), False, "latents_image_5x10x14_float32"),
        ("latents_clean_2x", torch.zeros(16, 2, 10, 14), False, "latents_clean_2x_2x10x14_float32"),
        ("latent_indices", torch.zeros(9, dtype=torch.int64), False, "latent_indices_int64"),
        ("clip", torch.zeros(257, 8, dtype=torch.float16), False, "clip_float16"),
        ("t5", torch.zeros(7, 8, dtype=torch.bfloat16), True, "varlen_t5_bfloat16"),
        ("llm_mask", torch.zeros(7, dtype=torch.int64), False, "llm_mask"),
        ("llama_attention_mask", torch.zeros(7, dtype=torch.bool), False, "llama_attention_mask"),
    ],
)
def test_tensor_names_carry_sizes_and_dtype_and_batches_know_them_by_the_rest(
    key: str, tensor: torch.Tensor, variable: bool, name: str
) -> None:
    assert tensor_name(key, tensor, variable) == name
    assert tensor_key(name) == key


def test_the_grid_in_a_name_can_be_that_of_another_tensor() -> None:
    name = tensor_name("latents_clean_4x", torch.zeros(16, 16, 8, 8), grid=(9, 8, 8))
    assert name == "latents_clean_4x_9x8x8_float32"
    assert grid_in_name(name) == (9, 8, 8)
    assert grid_in_name("clip_float16") is None


def test_a_lora_of_a_like_name_is_no_cache(tmp_path: Path) -> None:
    lora = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 8)}
    write_tensors(tmp_path / "style_wan.safetensors", lora, {})
    header = read_header(tmp_path / "style_wan.safetensors")
    assert not is_latent_cache(header, "wan")
    assert not is_text_cache(header, "wan")


def test_caches_are_told_by_tensor_names_and_family(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"latents_1x4x4_float32": torch.zeros(2, 1, 4, 4)}, {"architecture": "wan"})
    write_tensors(tmp_path / "b", {"varlen_t5_float32": torch.zeros(2, 4)}, {"architecture": "wan"})
    latents, text = read_header(tmp_path / "a"), read_header(tmp_path / "b")
    assert is_latent_cache(latents, "wan")
    assert is_text_cache(text, "wan")
    assert not is_latent_cache(latents, "framepack")
    assert not is_text_cache(latents, "wan")
    assert not is_latent_cache(text, "wan")


def test_a_checksum_sees_name_shape_and_every_bit() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    changed = tensor.clone()
    changed[2, 3] = 1
    assert checksum("a", tensor) == checksum("a", tensor.clone())
    assert (
        len({checksum("a", tensor), checksum("b", tensor), checksum("a", tensor.T), checksum("a", changed)})
        == 4
    )
    assert checksum("scalar", torch.tensor(1.0)) != checksum("scalar", torch.tensor(2.0))


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip_wan.safetensors"
    with pytest.raises(CacheError, match=r"clip_wan\.safetensors: no such"):
        read_entry(path)
    write_tensors(path, {"latents_1x4x4_float32": torch.zeros(2, 1, 4, 4)}, {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CacheError, match=r"clip_wan\.safetensors: damaged"):
        read_entry(path)


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    """So a run that was interrupted ends with the files of one that was not."""
    tensors = {
        "llm_float16": torch.ones(3, 4, dtype=torch.float16),
        "llm_mask": torch.ones(3, dtype=torch.int64),
    }
    metadata = {f"key {number}": "é" * number for number in range(8)}

    write_tensors(tmp_path / "one.safetensors", tensors, metadata)
    write_tensors(
        tmp_path / "two.safetensors", dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    )

    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    entry = read_entry(tmp_path / "two.safetensors")
    assert entry.header.metadata == metadata
    assert all(torch.equal(entry.named[name], tensor) for name, tensor in tensors.items())
