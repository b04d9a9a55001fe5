"""Reference pictures in caches of latents."""

from pathlib import Path
from typing import Any

import pytest

from dataset.cache.files import read_entry
from dataset.cache.records import latent_record
from dataset.caching import planning
from tests.dataset.edit_sets import SIZE, cache, make_set, read_set, shapes
from tests.dataset.making import make_image


def test_each_reference_is_cached_at_its_own_size(tmp_path: Path) -> None:
    config = make_set(
        tmp_path, {"a": ((40, 32), (64, 96)), "b": (), "c": (SIZE,)}, "no_resize_control = true"
    )

    report, family = cache(config, batch_size=8)

    assert report.written == 3
    assert shapes(tmp_path, "a") == {
        "latents_1x6x8_bfloat16": (2, 1, 6, 8),
        "latents_control_0_1x4x4_bfloat16": (2, 1, 4, 4),
        "latents_control_1_1x12x8_bfloat16": (2, 1, 12, 8),
    }
    assert sorted(map(len, family.seen)) == [1, 1, 1]  # none can be stacked with another


def test_items_of_equal_references_are_encoded_together(tmp_path: Path) -> None:
    sizes = {"a": (SIZE,), "b": ((32, 32),), "c": (SIZE, (16, 16)), "d": (SIZE,), "e": (), "f": ()}
    config = make_set(tmp_path, sizes, "no_resize_control = true\nbatch_size = 4")

    _, family = cache(config)

    stems = [[key[0] for key in keys] for keys in family.seen]
    assert sorted(stems) == [["a", "d"], ["b"], ["c"], ["e", "f"]]


def records(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "cache").glob("*_toy.safetensors"))
    found = {path.name[0]: latent_record(read_entry(path).header) for path in files}
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


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_a_changed_reference_makes_its_item_stale(tmp_path: Path, change: str) -> None:
    make_set(tmp_path, {"a": (SIZE, SIZE), "b": (SIZE,), "c": (SIZE,)})
    cache(read_set(tmp_path))
    if change == "edited":
        make_image(tmp_path / "refs/a_1.png", SIZE, (9, 9, 9))
    elif change == "removed":
        (tmp_path / "refs/a_1.png").unlink()
    else:
        make_image(tmp_path / "refs/a.png", SIZE, (9, 9, 9))

    _, family = cache(read_set(tmp_path))

    assert [key[0] for keys in family.seen for key in keys] == ["a"]


def test_caches_of_other_programs_need_their_references(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ()})
    cache(read_set(tmp_path))
    for path in (tmp_path / "cache").iterdir():
        strip(path, keeps_references=False)

    report, family = cache(read_set(tmp_path), skip_existing=True)

    assert ([key[0] for keys in family.seen for key in keys], report.foreign) == (["a"], 1)
    strip(next((tmp_path / "cache").glob("a_*")), keeps_references=True)
    report, family = cache(read_set(tmp_path), skip_existing=True)
    assert (family.seen, report.foreign) == ([], 2)


def strip(path: Path, keeps_references: bool) -> None:
    """Leave out what other programs do not write."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    kept = {name: one.clone() for name, one in tensors.items() if keeps_references or "control" not in name}
    save_file(kept, path)
