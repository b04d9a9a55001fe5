"""Reference pictures in caches of latents."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dataset.cache.records import latent_record
from dataset.cache_files import read_entry
from dataset.caching import planning
from tests.dataset.edit_sets import SIZE, cache, make_set, read_set, shapes


def test_each_reference_is_cached_at_its_own_size(tmp_path: Path) -> None:
    sizes = {"a": ((40, 32), (64, 96)), "b": (SIZE,), "c": (SIZE, (16, 16)), "d": (SIZE,), "e": (), "f": ()}
    config = make_set(tmp_path, sizes, "no_resize_control = true\nbatch_size = 4")

    report, family = cache(config)

    assert report.written == 6
    assert shapes(tmp_path, "a") == {
        "latents_1x6x8_bfloat16": (2, 1, 6, 8),
        "latents_control_0_1x4x4_bfloat16": (2, 1, 4, 4),
        "latents_control_1_1x12x8_bfloat16": (2, 1, 12, 8),
    }
    # those of equal references are encoded together
    stems = [[key[0] for key in keys] for keys in family.seen]
    assert sorted(stems) == [["a"], ["b", "d"], ["c"], ["e", "f"]]


def records(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "cache").glob("*_toy.safetensors"))
    found = {path.name[0]: latent_record(read_entry(path)) for path in files}
    return {stem: record.options for stem, record in found.items() if record is not None}


def test_exactly_what_a_key_concerns_is_made_again(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ((32, 32),), "c": ()})
    cache(read_set(tmp_path))
    plain = records(tmp_path)
    assert set(plain["a"]) == {"size", "bucket", "span"}  # as before there were such keys

    assert cache(read_set(tmp_path))[1].seen == []
    for keys in ("no_resize_control = true", "control_resolution = 64", "control_resolution = 48", ""):
        again = cache(read_set(tmp_path, keys))[1].seen
        assert sorted(key[0] for keys in again for key in keys) == ["a", "b"]
    assert records(tmp_path) == plain


def test_of_thousands_of_caches_those_with_references_are_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid one without references says nothing of one with them, whose record has the same options."""
    monkeypatch.setattr(planning, "MANY", 2)
    make_set(tmp_path, {"a": (), "b": (SIZE,), "c": (SIZE, SIZE)})
    cache(read_set(tmp_path))

    _, family = cache(read_set(tmp_path, "no_resize_control = true"))

    assert sorted(key[0] for keys in family.seen for key in keys) == ["b", "c"]


def test_caches_of_other_programs_need_their_references(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ()})
    cache(read_set(tmp_path))
    for path in (tmp_path / "cache").iterdir():
        strip(path, keeps_references=False)

    report, family = cache(read_set(tmp_path), skip_existing=True)

    assert ([key[0] for keys in family.seen for key in keys], report.num_without_record) == (["a"], 1)
    strip(next((tmp_path / "cache").glob("a_*")), keeps_references=True)
    report, family = cache(read_set(tmp_path), skip_existing=True)
    assert (family.seen, report.num_without_record) == ([], 2)


def strip(path: Path, keeps_references: bool) -> None:
    """Leave out what other programs do not write."""
    tensors = load_file(path)
    kept = {name: one.clone() for name, one in tensors.items() if keeps_references or "control" not in name}
    save_file(kept, path)
