import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.cache.catalog import list_shards
from dataset.cache.converting import files_to_shards, shards_to_files
from dataset.cache.form import list_format_errors
from dataset.cache.shards import ShardStore
from dataset.cache_files import (
    LatentName,
    checksum,
    grid_in_name,
    is_latent_cache,
    is_text_cache,
    parse_latent_name,
    read_entry,
    tensor_key,
    tensor_name,
    write_tensors,
)
from dataset.sources.media_source import SHARD_FILE_NAME
from modules.errors import CacheError
from tests.dataset.cache.killing import needs_fork, run_and_kill, run_to_step
from tests.dataset.making import make_table
from tests.faults.messages import succeed_here
from tools import convert_cache


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("image", LatentName("pic_0", (120, 90)), "pic_0_0120x0090"),
        ("video", LatentName("clip", (640, 608), (0, 145), 2), "clip_00000-145-0002_0640x0608"),
        ("video", LatentName("a b.c_1", (12800, 80), (123456, 1001)), "a b.c_1_123456-1001_12800x0080"),
    ],
)
def test_latent_names_are_those_of_the_known_tuners_and_read_back(
    kind: str, name: LatentName, file: str
) -> None:
    assert name.file_name("wan") == f"{file}_wan.safetensors"
    assert parse_latent_name(f"{file}_wan.safetensors", "wan", kind) == name


@pytest.mark.parametrize(
    "file",
    [
        "clip_wan_te.safetensors",
        "clip_0112x0080_wan.safetensors",  # no frames: an image's
        "_0112x0080_wan.safetensors",
        "clip_00000-017_0112x0080_hv.safetensors",
        "clip_00000-017_0112x0080_wan.safetensors.bak",
    ],
)
def test_other_files_are_no_video_caches(file: str) -> None:
    assert parse_latent_name(file, "wan", "video") is None


@pytest.mark.parametrize(
    ("key", "tensor", "options", "name", "grid"),
    [
        ("latents", torch.zeros(16, 5, 10, 14).bfloat16(), {}, "latents_5x10x14_bfloat16", (5, 10, 14)),
        ("latents_clean_2x", torch.zeros(4, 2, 6, 8), {}, "latents_clean_2x_2x6x8_float32", (2, 6, 8)),
        # the grid can be that of another tensor
        ("latents_4x", torch.zeros(4, 9, 8, 8), {"grid": (3, 2, 1)}, "latents_4x_3x2x1_float32", (3, 2, 1)),
        ("latent_indices", torch.zeros(9, dtype=torch.int64), {}, "latent_indices_int64", None),
        ("t5", torch.zeros(7, 8).half(), {"variable": True}, "varlen_t5_float16", None),
        ("llama_attention_mask", torch.zeros(7).bool(), {}, "llama_attention_mask", None),
    ],
)
def test_tensor_names_carry_sizes_and_dtype_and_batches_know_them_by_the_rest(
    key: str, tensor: torch.Tensor, options: dict[str, Any], name: str, grid: tuple[int, ...] | None
) -> None:
    assert tensor_name(key, tensor, **options) == name
    assert tensor_key(name) == key
    assert grid_in_name(name) == grid


@pytest.mark.parametrize("key", ["latents", "latents_control_0", "latents_control_12_flipped"])
def test_names_of_pictures_may_leave_the_frames_out(key: str) -> None:
    """As those of FLUX.2's caches."""
    name = tensor_name(key, torch.zeros(128, 1, 6, 10), has_frames=False)

    assert name == f"{key}_6x10_float32"
    assert tensor_key(name) == key
    assert grid_in_name(name) == (1, 6, 10)


def test_caches_are_told_by_tensor_names_and_family(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"latents_1x4x4_float32": torch.zeros(2, 1, 4, 4)}, {"architecture": "wan"})
    write_tensors(tmp_path / "b", {"varlen_t5_float32": torch.zeros(2, 4)}, {"architecture": "wan"})
    latents, text = read_entry(tmp_path / "a", is_full=False), read_entry(tmp_path / "b", is_full=False)
    assert is_latent_cache(latents, "wan")
    assert is_text_cache(text, "wan")
    assert not is_latent_cache(latents, "framepack")
    assert not is_text_cache(latents, "wan")
    assert not is_latent_cache(text, "wan")
    # nor is a LoRA, whatever it says of itself
    lora = {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 8)}
    for metadata in ({}, {"architecture": "wan"}):
        write_tensors(tmp_path / "c", lora, metadata)
        assert not is_latent_cache(read_entry(tmp_path / "c", is_full=False), "wan")
        assert not is_text_cache(read_entry(tmp_path / "c", is_full=False), "wan")


def test_a_checksum_sees_name_shape_and_every_bit() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    changed = tensor.clone()
    changed[2, 3] = 1
    assert checksum("a", tensor) == checksum("a", tensor.clone())
    others = [("b", tensor), ("a", tensor.T), ("a", changed), ("a", torch.tensor(1.0))]
    assert len({checksum(*one) for one in [("a", tensor), *others]}) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"}}", b"}"), (b"[2,1,4,4]", b'["?",44]'.ljust(9))],
    ids=["cut", "a shape that is no numbers"],
)
def test_a_damaged_file_and_one_that_is_missing_are_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "clip_wan.safetensors"
    write_tensors(path, {"latents_1x4x4_float32": torch.zeros(2, 1, 4, 4)}, {})
    for is_full in (False, True):
        with pytest.raises(CacheError, match=r"other_wan\.safetensors: no such"):
            read_entry(path.with_name("other_wan.safetensors"), is_full)
    path.write_bytes(path.read_bytes().replace(old, new))

    for is_full in (False, True):
        with pytest.raises(CacheError, match=r"clip_wan\.safetensors: damaged"):
            read_entry(path, is_full)


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    """So a run that was interrupted ends with the files of one that was not."""
    tensors = {"llm_float16": torch.ones(3, 4).half(), "llm_mask": torch.ones(3, dtype=torch.int64)}
    metadata = {f"key {number}": "é" * number for number in range(8)}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"

    write_tensors(one, tensors, metadata)
    write_tensors(two, dict(reversed(tensors.items())), dict(reversed(metadata.items())))

    assert one.read_bytes() == two.read_bytes()
    entry = read_entry(two)
    assert entry.metadata == metadata
    assert all(torch.equal(entry.named[name], tensor) for name, tensor in tensors.items())


CACHES = [
    *(f"clip_{number}_00000-005_0032x0032_wan.safetensors" for number in range(4)),
    *("clip_0_wan_te.safetensors", "clip_1_wan_te.safetensors.part", "wan_te.empty.safetensors"),
    *("clip_0_hv_te.caption2.safetensors", "Bär 1_0120x0080_hv.safetensors"),
]
LORA = "style_00000-005_0032x0032_wan.safetensors"  # the name of a cache, but it is none
OTHERS = ["notes.txt", "style.safetensors", "broken_0032x0032_wan.safetensors", LORA]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Single files as several programs write them: with records or without, in an order of their own."""
    made = tmp_path / "cache"
    made.mkdir()
    for number, name in enumerate(CACHES):
        is_text = "_te" in name
        key = "varlen_t5_bfloat16" if is_text else "latents_2x4x4_float32"
        values = torch.full((2, 2, 4, 4), float(number))
        metadata = {"architecture": "hv" if "_hv" in name else "wan", "caption1": "x"}
        write_tensors(made / name, {key: values.bfloat16() if is_text else values}, metadata)
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    (made / "broken_0032x0032_wan.safetensors").write_bytes(b"half a file")
    for name in (LORA, "style.safetensors"):
        write_tensors(made / name, {"lora_up.weight": torch.ones(2)}, {})
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not SHARD_FILE_NAME.fullmatch(name)}


def test_there_and_back_keeps_every_byte_and_leaves_other_files_alone(folder: Path) -> None:
    before, toml = contents(folder), folder.parent / "data.toml"
    (folder.parent / "clips").mkdir()
    toml.write_text('[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\n', encoding="utf-8")

    said = succeed_here(
        "tools/convert_cache.py", "--dataset_config", toml, "--to", "shards", folder=folder.parent
    )
    assert 'Set cache_format = "shards" in' in said
    (shard,) = list_shards(folder)
    assert set(contents(folder)) == {*OTHERS, shard}
    store = ShardStore(folder)
    assert {name: store.read_bytes(name) for name in store.names()} == {name: before[name] for name in CACHES}
    convert_cache.main(["--cache_directory", str(folder), "--to", "files"])
    assert contents(folder) == before


def test_damaged_entries_keep_the_shards(folder: Path) -> None:
    files_to_shards(folder)
    (name,) = list_shards(folder)
    data = bytearray((folder / name).read_bytes())
    data[data.index(b"latents_2x4x4") + 150] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CacheError, match=r"(?s)1 errors in the shards, which are kept; 8 entries are intact"):
        shards_to_files(folder)
    assert name in contents(folder)
    assert sum(name in CACHES for name in contents(folder)) == 8


def test_a_file_replaces_another_entry_of_its_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files_to_shards(folder, keep=True)
    write_tensors(folder / CACHES[0], {"latents_1x1x1_float32": torch.ones(1, 1, 1, 1)}, {})
    data = (folder / CACHES[0]).read_bytes()
    files_to_shards(folder)
    assert "the file replaces it" in caplog.text
    assert ShardStore(folder).read_bytes(CACHES[0]) == data


STEPS = 14  # names that a conversion of the folder gives or takes away


@needs_fork
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_conversion_loses_nothing_and_goes_on(folder: Path, kills: int) -> None:
    before, chance = contents(folder), random.Random(kills)
    others = {name: before[name] for name in OTHERS}
    for number in range(kills):
        for convert, expected in ((files_to_shards, others), (shards_to_files, before)):
            if number % 2:
                run_and_kill(lambda _, convert=convert: convert(folder) and None, chance.uniform(0.01, 0.3))
            else:  # a fast machine is done before any second that one could name
                run_to_step(lambda convert=convert: convert(folder) and None, chance.randint(1, STEPS))
            store = ShardStore(folder)
            for name in CACHES:
                copy = folder / name
                assert (copy.read_bytes() if copy.exists() else store.read_bytes(name)) == before[name]
            convert(folder)
            assert files(folder) == expected, number
            assert convert is shards_to_files or set(ShardStore(folder).names()) == set(CACHES)


def test_a_folder_with_both_forms_serves_either_while_they_agree(folder: Path) -> None:
    before = contents(folder)
    assert files_to_shards(folder, keep=True)[0] == len(CACHES)
    assert before.items() <= contents(folder).items()
    assert shards_to_files(folder, keep=True)[:2] == (0, len(CACHES))
    both = [make_table(folder.parent, cache_format=form) for form in ("files", "shards")]
    assert [list(list_format_errors(one, "wan")) for one in both] == [[], []]

    (folder / CACHES[0]).unlink()
    assert [len(list(list_format_errors(one, "wan"))) for one in both] == [1, 0]
    store = ShardStore(folder)
    store.remove(CACHES[1])
    store.close()
    assert [len(list(list_format_errors(one, "wan"))) for one in both] == [1, 1]
