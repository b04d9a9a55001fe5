"""Reference pictures: of several numbers and sizes, in tables, caches and batches."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batches.items import find_items, require_items, with_reference_sizes
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.cache.files import EMPTY, read_entry
from dataset.cache.records import latent_record
from dataset.cache.store import Stores
from dataset.caching import planning
from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.prefetch import CacheReport
from dataset.config import DatasetConfig, load_dataset_config, with_references
from dataset.sources import tables
from dataset.sources.decoding import check_resolution, decode_source
from dataset.sources.listing import find_sources
from modules.contract.data import CacheEntry, Conditions, LatentSpec, MediaBatch, MediaEncoders
from modules.contract.requests import Prompt
from modules.contract.rules import ReferenceRules
from modules.errors import CacheError, DatasetError
from modules.media.reading import read_image
from tests.dataset.making import make_image
from tests.dataset.sources.test_addresses import write_tar
from tests.dataset.toy_family import ToyFamily, ToyText, options
from training.planning.memory import largest_batch

RULES = ReferenceRules(most=2, step=16)
SIZE = (64, 48)


@dataclass
class EditFamily(ToyFamily):
    """Pictures made of reference pictures, each encoded at its own size."""

    latent: LatentSpec = LatentSpec(channels=2, stride=(1, 8, 8), pixel_step=16, frame_step=1)
    references: ReferenceRules | None = RULES

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        self.seen.append(media.keys)
        self.media.append(media)
        pictures = {"latents": media.frames}
        pictures |= {f"latents_control_{number}": one for number, one in enumerate(media.control)}
        return [
            [CacheEntry({name: self._encode(one[index]) for name, one in pictures.items()})]
            for index in range(len(media.keys))
        ]

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        _, height, width, _ = frames.shape
        shape = self.latent.shape(1, height, width)[1:]
        return torch.full(shape, frames.float().mean().item(), dtype=torch.bfloat16)


def make_set(
    folder: Path, references: Mapping[str, tuple[tuple[int, int], ...]], keys: str = ""
) -> DatasetConfig:
    """Images of SIZE with captions and references of these sizes, `a_0.png`, `a_1.png` for `a`."""
    for name in ("pics", "refs"):
        (folder / name).mkdir(exist_ok=True)
    for place, (stem, sizes) in enumerate(references.items()):
        make_image(folder / "pics" / f"{stem}.png", SIZE, (10 * place, 0, 0))
        (folder / "pics" / f"{stem}.txt").write_text("make it blue", encoding="utf-8")
        for number, size in enumerate(sizes):
            if not (folder / "refs" / f"{stem}_{number}.png").exists():
                make_image(folder / "refs" / f"{stem}_{number}.png", size, (0, 20 * number + 5, 0))
    return read_set(folder, keys)


def read_set(folder: Path, keys: str = "") -> DatasetConfig:
    text = (
        f"[[datasets]]\nimage_directory = {str(folder / 'pics')!r}\ncaption_extension = '.txt'\n"
        f"control_directory = {str(folder / 'refs')!r}\ncache_directory = {str(folder / 'cache')!r}\n"
        f"resolution = {[*SIZE]}\n{keys}\n"
    )
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return with_references(load_dataset_config(folder / "data.toml"), RULES)


def cache(config: DatasetConfig, **changes: Any) -> tuple[CacheReport, EditFamily]:
    family = EditFamily()
    return cache_media(family, config, options(**changes)), family


def shapes(folder: Path, stem: str) -> dict[str, tuple[int, ...]]:
    entry = read_entry(next((folder / "cache").glob(f"{stem}_0*_toy.safetensors")))
    return {name: tuple(tensor.shape) for name, tensor in entry.named.items()}


# --- keys
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ("no_resize_control = true", (True, None)),
        ("flux_kontext_no_resize_control = true", (True, None)),
        ("qwen_image_edit_no_resize_control = true", (True, None)),
        ("control_resolution = [1024, 512]", (False, (1024, 512))),
        ("qwen_image_edit_control_resolution = 1024", (False, (1024, 1024))),
        ("multiple_target = false", (False, None)),
    ],
)
def test_keys_have_the_names_of_several_tuners(tmp_path: Path, keys: str, found: tuple[Any, ...]) -> None:
    (table,) = make_set(tmp_path, {"a": (SIZE,)}, keys).datasets

    assert (table.no_resize_control, table.control_resolution) == found


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            "no_resize_control = true\nflux_kontext_no_resize_control = true",
            "flux_kontext_no_resize_control and no_resize_control are the same key; leave out one",
        ),
        (
            "flux_kontext_no_resize_control = true\nqwen_image_edit_no_resize_control = true",
            "flux_kontext_no_resize_control and qwen_image_edit_no_resize_control are the same key",
        ),
        ("multiple_target = true", "multiple_target = true .* Qwen-Image-Layered are not supported"),
        ("control_resolution = 0", "control_resolution = 0 .*allowed: a whole number or"),
        ("no_resize_control = 1", "no_resize_control = 1 .*allowed: true or false"),
    ],
)
def test_wrong_keys_are_told(tmp_path: Path, keys: str, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        make_set(tmp_path, {"a": (SIZE,)}, keys)


def test_the_keys_are_for_tables_of_images(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_text("[[datasets]]\nvideo_directory = 'x'\nqwen_image_edit_control_resolution = 64\n")

    with pytest.raises(DatasetError, match="qwen_image_edit_control_resolution = 64 is for image tables"):
        load_dataset_config(path)


def test_a_resolution_too_small_for_the_model_is_told_before_encoding(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (SIZE,)}, "control_resolution = 8")

    with pytest.raises(DatasetError, match="control_resolution: 8x8 is smaller than one 16x16 bucket"):
        check_resolution(config.datasets[0], 16)


# --- which pictures
# ------------------------------------------------------------------------------------------------------------


def test_images_may_have_other_numbers_of_references(tmp_path: Path, caplog) -> None:
    config = make_set(tmp_path, {"a": (SIZE,), "a_1": (SIZE,), "b": (SIZE,) * 3, "c": ()})
    caplog.set_level(logging.WARNING)

    found = {one.stem: [path.name for path in one.control] for one in find_sources(config.datasets[0])}

    # a_1.png would be the second of `a`, if there were no image of that name
    assert found == {"a": ["a_0.png"], "a_1": ["a_1_0.png"], "b": ["b_0.png", "b_1.png"], "c": []}
    over, none = (record.getMessage() for record in caplog.records)
    assert "1 of 4 images have more reference pictures than the 2" in over
    assert "b.png has 3" in over
    assert "1 of 4 images have no reference picture" in none
    assert "c.png" in none


def test_a_folder_without_any_reference_is_a_mistake(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (), "b": ()})

    with pytest.raises(DatasetError, match=r"refs has no reference picture for any image, such as a\.png"):
        find_sources(config.datasets[0])


def test_lists_and_tars_give_other_numbers_too(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE, SIZE), "b": (SIZE,), "c": (SIZE,)})
    pics, refs = tmp_path / "pics", tmp_path / "refs"
    rows: list[dict[str, str]] = [
        {"image_path": str(pics / "a.png"), "caption": "x", "control_path_1": str(refs / "a_1.png")},
        {"image_path": str(pics / "b.png"), "caption": "x", "control_path": str(refs / "b_0.png")},
        {"image_path": str(pics / "c.png"), "caption": "x"},
    ]
    rows[0]["control_path"] = str(refs / "a_0.png")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    png = (pics / "a.png").read_bytes()
    files = {f"a.{end}": png for end in ("png", "control_0.png", "control_1.png", "control_2.png")}
    write_tar(tmp_path / "set.tar", {**files, "b.png": png, "b.control.png": png, "c.png": png})
    for source in (f"image_jsonl_file = '{tmp_path}/list.jsonl'", f"image_tars = '{tmp_path}/set.tar'"):
        path = tmp_path / "other.toml"
        path.write_text(f"[[datasets]]\n{source}\ncache_directory = '{tmp_path}/other'\n", encoding="utf-8")
        (table,) = with_references(load_dataset_config(path), RULES).datasets

        sources = find_sources(table)

        assert [len(one.control) for one in sources] == [2, 1, 0]
        assert [len(one.parts) for one in sources] == [3, 2, 1]
        assert len(decode_source(sources[0], 1.0).control) == 2


# --- sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ("", SIZE),  # that of its image
        ("no_resize_control = true", (96, 32)),  # of 100 x 40
        ("control_resolution = 64", (80, 48)),  # of the buckets of 4096 pixels, the nearest to 2.5
        ("control_resolution = [128, 128]", (192, 80)),
        # both: only what is larger is resized
        ("no_resize_control = true\ncontrol_resolution = 64", (96, 32)),
        ("no_resize_control = true\ncontrol_resolution = 48", (64, 32)),
    ],
)
def test_sizes_follow_the_keys(tmp_path: Path, keys: str, size: tuple[int, int]) -> None:
    config = make_set(tmp_path, {"a": ((100, 40),)}, keys)

    (control,) = decode_source(find_sources(config.datasets[0])[0], 1.0).control

    assert control.shape == (1, size[1], size[0], 3)


def test_a_reference_that_keeps_its_size_loses_right_and_bottom(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": ((40, 50),)}, "no_resize_control = true")
    pixels = np.arange(40 * 50 * 3).astype(np.uint8).reshape(50, 40, 3)
    Image.fromarray(pixels).save(tmp_path / "refs/a_0.png")

    (control,) = decode_source(find_sources(config.datasets[0])[0], 1.0).control

    assert np.array_equal(control[0], pixels[:48, :32])


# --- caches
# ------------------------------------------------------------------------------------------------------------


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


# --- batches
# ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, keys: str) -> tuple[DatasetConfig, list[tuple[str, ...]]]:
    config, family = read_set(folder, keys), EditFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())
    items = require_items(find_items(config, "toy", family.latent))
    batches = BatchOrder(items, 3).epoch(0)
    for batch in batches:
        tensors = read_batch(batch, family.latent).tensors
        assert len(tensors["latents"]) == len(batch)
    return config, sorted(tuple(sorted(item.source_stem for item in batch)) for batch in batches)


def test_a_batch_has_equal_references(tmp_path: Path) -> None:
    sizes = {"a": (SIZE,), "b": ((32, 32),), "c": (SIZE, (16, 16)), "d": (SIZE,), "e": (), "f": ()}
    make_set(tmp_path, sizes)

    assert trained(tmp_path, "batch_size = 4\nno_resize_control = true")[1] == [
        ("a", "d"),
        ("b",),
        ("c",),
        ("e", "f"),
    ]
    assert trained(tmp_path, "batch_size = 4")[1] == [("a", "b", "d"), ("c",), ("e", "f")]
    assert trained(tmp_path, "")[1] == [(stem,) for stem in "abcdef"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_largest_batch_is_that_of_the_largest_references(tmp_path: Path, batch_size: int) -> None:
    make_set(tmp_path, {"a": (), "b": ((16, 16),), "c": ((320, 320),), "d": (SIZE,)})
    config = read_set(tmp_path, f"no_resize_control = true\nbatch_size = {batch_size}")
    cache(config)
    cache_texts(EditFamily(), config, options())
    items = find_items(config, "toy", EditFamily().latent).items

    found = largest_batch(with_reference_sizes(items, Stores()), EditFamily().latent.stride[1])

    assert [item.source_stem for item in found] == ["c"]


def test_training_refuses_caches_of_other_keys(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": ((32, 32),), "b": ()})
    trained(tmp_path, "no_resize_control = true")
    config, latent = read_set(tmp_path), EditFamily().latent
    one, other = find_items(config, "toy", latent).items

    with pytest.raises(CacheError, match="no_resize_control was True, is now False in .*data.toml"):
        read_batch([one], latent)
    read_batch([other], latent)


def test_training_refuses_caches_of_other_references_than_a_list_names(tmp_path: Path) -> None:
    """More or fewer than its line had; of a line, or a list, that is gone nothing is known."""
    make_set(tmp_path, {"a": (SIZE, SIZE), "b": (SIZE,), "c": ()})
    lists, latent = tmp_path / "list.jsonl", EditFamily().latent

    def read(**numbers: int) -> dict[str, str]:
        """Write a list whose lines have so many references; why training refuses each item."""
        rows = []
        for stem, number in numbers.items():
            controls = {
                f"control_path_{one}": str(tmp_path / f"refs/{stem}_{one}.png") for one in range(number)
            }
            rows.append({"image_path": str(tmp_path / f"pics/{stem}.png"), "caption": "x", **controls})
        lists.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        path = tmp_path / "listed.toml"
        keys = f"cache_directory = '{tmp_path}/listed'\nresolution = {[*SIZE]}\n"
        path.write_text(f"[[datasets]]\nimage_jsonl_file = '{lists}'\n{keys}", encoding="utf-8")
        config = with_references(load_dataset_config(path), RULES)
        if not (tmp_path / "listed").exists():
            cache(config)
            cache_texts(EditFamily(), config, options())
        tables._named_references.cache_clear()  # another process
        found = {}
        for item in find_items(config, "toy", latent).items:
            try:
                read_batch([item], latent)
            except CacheError as error:
                found[item.source_stem] = str(error)
        return found

    assert read(a=2, b=1, c=0) == {}
    changed = read(a=1, b=2, c=0)
    assert changed.keys() == {"a", "b"}
    assert f"made with 2 reference pictures, now {lists} names 1" in changed["a"]
    assert f"made with 1 reference picture, now {lists} names 2" in changed["b"]
    assert read(a=3, b=1) == {}  # no more than two are taken


def test_mirrored_references_are_cached_and_chosen_too(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": ((32, 32),)}, "no_resize_control = true\nbatch_size = 2")
    (table,) = config.datasets
    table = dataclasses.replace(table, augmentation=dataclasses.replace(table.augmentation, flip=True))
    config = dataclasses.replace(config, datasets=(table,))
    family = EditFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())

    (item,) = find_items(config, "toy", family.latent).items

    assert item.references == (4, 4)  # once, though both sides are there
    assert read_batch([item], family.latent, flips=[True]).tensors["latents_control_0"].shape[-2:] == (4, 4)
    assert torch.equal(family.media[1].control[0], family.media[0].control[0].flip(3))


# --- texts
# ------------------------------------------------------------------------------------------------------------

SEEN = dataclasses.replace(RULES, seen_by_text=True)


class SeeingText(ToyText):
    """A prompt becomes as many rows as it has words, of the mean of its pictures."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.calls += [f"{prompt.text}|{len(prompt.pictures)}" for prompt in prompts]
        means = [
            sum(float(read_image(path).mean()) for path in prompt.pictures) if prompt.pictures else -1.0
            for prompt in prompts
        ]
        return [
            {self.name: [torch.full((max(1, len(prompt.text.split())), 4), mean)]}
            for prompt, mean in zip(prompts, means, strict=True)
        ]


def cache_seen(
    folder: Path, keys: str = "", encoders: Sequence[str] = ("t5",), **changes: Any
) -> tuple[CacheReport, list[SeeingText], DatasetConfig]:
    config = with_references(read_set(folder, keys), SEEN)
    texts = [SeeingText(name, frozenset({name}), {name: "first"}) for name in encoders]
    family = EditFamily(text=list(texts), references=SEEN)
    return cache_texts(family, config, options(**changes)), texts, config


def values(folder: Path) -> dict[str, float]:
    found = sorted((folder / "cache").glob("*_toy_te*"))
    return {path.name: float(read_entry(path).tensors["t5"][0, 0]) for path in found}


def test_a_text_is_encoded_with_the_references_of_its_image(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (SIZE, SIZE), "c": ()})

    report, (text,), _ = cache_seen(tmp_path, batch_size=3)

    assert text.calls == ["make it blue|1", "make it blue|2", "make it blue|0"]
    assert report.written == 3
    assert len(set(values(tmp_path).values())) == 3  # of one caption
    assert cache_seen(tmp_path)[1][0].calls == []


@pytest.mark.parametrize("change", ["edited", "removed", "added"])
def test_a_changed_reference_makes_its_text_stale(tmp_path: Path, change: str) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (SIZE,), "c": ()})
    cache_seen(tmp_path)
    if change == "edited":
        make_image(tmp_path / "refs/a_0.png", SIZE, (9, 9, 9))
    elif change == "removed":
        (tmp_path / "refs/a_0.png").unlink()
    else:
        make_image(tmp_path / "refs/a_1.png", SIZE, (9, 9, 9))

    _, (text,), _ = cache_seen(tmp_path)

    assert text.calls == [f"make it blue|{ {'edited': 1, 'removed': 0, 'added': 2}[change] }"]
    # sizes are of the latents alone
    assert cache_seen(tmp_path, "no_resize_control = true")[1][0].calls == []


def test_texts_of_a_model_that_sees_no_references_name_none(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,)})
    family = EditFamily()
    cache_texts(family, read_set(tmp_path), options())
    before = read_entry(tmp_path / "cache/a_toy_te.safetensors").header.metadata["reelsmith_record"]

    assert "references" not in before
    assert family.text[0].calls == ["make it blue"]


def test_the_empty_prompt_is_encoded_with_each_ones_references(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ((16, 16), SIZE)})
    keys = "caption_dropout_rate = 0.5"

    _, (text,), config = cache_seen(tmp_path, keys)
    cache_media(EditFamily(), config, options())

    assert text.calls == ["make it blue|1", "make it blue|2", "|1", "|2"]
    assert [name for name in values(tmp_path) if "empty" in name] == [
        "a_toy_te.empty.safetensors",
        "b_toy_te.empty.safetensors",
    ]
    latent = EditFamily().latent
    items = require_items(find_items(config, "toy", latent))
    empty = read_batch(items[:1], latent, captions=[EMPTY]).tensors["t5"]
    assert float(empty[0][0, 0]) == values(tmp_path)["a_toy_te.empty.safetensors"]
    assert cache_seen(tmp_path, keys)[1][0].calls == []
    (tmp_path / "cache/b_toy_te.empty.safetensors").unlink()
    with pytest.raises(CacheError, match=r"needs the empty prompt's cache, .*b_toy_te\.empty"):
        require_items(find_items(config, "toy", latent))
    cache_seen(tmp_path)  # without dropout
    assert not [name for name in values(tmp_path) if "empty" in name]


def test_training_refuses_a_text_of_another_reference(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,)})
    config = cache_seen(tmp_path)[2]
    make_image(tmp_path / "refs/a_0.png", SIZE, (9, 9, 9))
    cache_media(EditFamily(), config, options())  # latents alone are made again
    (item,) = find_items(config, "toy", EditFamily().latent).items

    with pytest.raises(CacheError, match=r"a_0\.png has changed since its encoder saw it"):
        read_batch([item], EditFamily().latent)


def test_a_bad_reference_costs_its_text_only(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": (), "c": (SIZE,)})
    path = make_image(tmp_path / "refs/b_0.png", SIZE, (1, 2, 3))
    path.write_bytes(path.read_bytes()[:80])  # its header is right

    report, texts, _ = cache_seen(tmp_path, encoders=("t5", "t6"), batch_size=3)

    assert sorted(values(tmp_path)) == ["a_toy_te.safetensors", "c_toy_te.safetensors"]
    assert (report.written, report.kept) == (2, 0)
    (failure,) = report.failures
    assert str(path) in failure.reason
    assert "a reference picture of b.png cannot be used" in failure.reason
    make_image(path, SIZE)
    report, _, _ = cache_seen(tmp_path, encoders=("t5", "t6"), batch_size=3)
    assert (report.written, report.kept, report.failures) == (1, 2, ())


def test_mirroring_is_refused_if_texts_see_references(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (SIZE,)})
    (table,) = config.datasets
    table = dataclasses.replace(table, augmentation=dataclasses.replace(table.augmentation, flip=True))

    with pytest.raises(DatasetError, match="flip_aug mirrors reference pictures, but not"):
        with_references(dataclasses.replace(config, datasets=(table,)), SEEN)


# --- what cannot be used
# ------------------------------------------------------------------------------------------------------------


def test_a_reference_that_a_list_names_and_is_gone_costs_its_item_only(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"good": (SIZE,), "gone": (SIZE,)})
    refs = tmp_path / "refs"
    rows = [
        {"image_path": str(path), "caption": "x", "control_path": str(refs / f"{path.stem}_0.png")}
        for path in sorted((tmp_path / "pics").glob("*.png"))
    ]
    (refs / "gone_0.png").unlink()
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (table,) = config.datasets
    table = dataclasses.replace(table, directory=None, jsonl_file=tmp_path / "list.jsonl")

    report, family = cache(dataclasses.replace(config, datasets=(table,)))

    assert [key[:4] for keys in family.seen for key in keys] == ["good"]
    (failure,) = report.failures
    assert failure.reason == (
        f"a reference picture of gone.png cannot be used: {refs / 'gone_0.png'} does not exist. Replace it, "
        "or remove it"
    )
