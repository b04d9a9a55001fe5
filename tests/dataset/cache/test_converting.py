import random
from pathlib import Path

import pytest
import torch

from dataset.cache.catalog import list_shards
from dataset.cache.converting import files_to_shards, other_form, shards_to_files
from dataset.cache.files import write_tensors
from dataset.cache.shards import ShardStore
from dataset.sources.media_source import INDEX, is_of_shards
from modules.errors import CacheError
from tests.dataset.cache.killing import needs_fork, run_and_kill
from tests.dataset.making import make_table
from tests.faults.messages import run_here
from tools import convert_cache

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
    return {name: data for name, data in contents(folder).items() if not is_of_shards(name)}


def test_there_and_back_keeps_every_byte_and_leaves_other_files_alone(folder: Path) -> None:
    before = contents(folder)
    convert_cache.main(["--cache_directory", str(folder), "--to", "shards"])
    assert set(contents(folder)) == {*OTHERS, *list_shards(folder), INDEX}
    assert len(list_shards(folder)) == 1
    store = ShardStore(folder)
    assert {name: store.read_bytes(name) for name in store.names()} == {name: before[name] for name in CACHES}
    convert_cache.main(["--cache_directory", str(folder), "--to", "files"])
    assert contents(folder) == before


def test_what_was_converted_is_kept_if_asked(folder: Path) -> None:
    before = contents(folder)
    assert files_to_shards(folder, keep=True)[0] == 9
    assert before.items() <= contents(folder).items()
    assert shards_to_files(folder, keep=True)[:2] == (0, 9)
    assert len(list_shards(folder)) == 1


def test_the_tables_of_a_dataset_file_are_converted(folder: Path) -> None:
    (folder.parent / "clips").mkdir()
    toml = folder.parent / "data.toml"
    toml.write_text('[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\n', encoding="utf-8")
    code, said = run_here(
        "tools/convert_cache.py", "--dataset_config", toml, "--to", "shards", folder=folder.parent
    )
    assert code == 0
    assert 'Set cache_format = "shards" in' in said
    assert set(ShardStore(folder).names()) == set(CACHES)


def test_damaged_entries_keep_the_shards(folder: Path) -> None:
    files_to_shards(folder)
    (name,) = list_shards(folder)
    data = bytearray((folder / name).read_bytes())
    data[data.index(b"latents_2x4x4") + 150] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CacheError, match=r"(?s)1 faults in the shards, which are kept; 8 entries are whole"):
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


@needs_fork
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_conversion_loses_nothing_and_goes_on(folder: Path, kills: int) -> None:
    before, chance = contents(folder), random.Random(kills)
    others = {name: before[name] for name in OTHERS}
    for number in range(kills):
        for convert, expected in ((files_to_shards, others), (shards_to_files, before)):
            run_and_kill(lambda _, convert=convert: convert(folder) and None, chance.uniform(0.01, 0.3))
            store = ShardStore(folder)
            for name in CACHES:
                copy = folder / name
                assert (copy.read_bytes() if copy.exists() else store.read_bytes(name)) == before[name]
            convert(folder)
            assert files(folder) == expected, number
            assert convert is shards_to_files or set(ShardStore(folder).names()) == set(CACHES)


def test_a_folder_with_both_forms_serves_either_while_they_agree(folder: Path) -> None:
    files_to_shards(folder, keep=True)
    both = [make_table(folder.parent, cache_format=form) for form in ("files", "shards")]
    assert [list(other_form(one, "wan")) for one in both] == [[], []]

    (folder / CACHES[0]).unlink()
    assert [len(list(other_form(one, "wan"))) for one in both] == [1, 0]
    store = ShardStore(folder)
    store.remove(CACHES[1])
    store.close()
    assert [len(list(other_form(one, "wan"))) for one in both] == [1, 1]
