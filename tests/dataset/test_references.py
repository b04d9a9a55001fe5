"""Reference pictures in tables: their keys, which of them, at which sizes, and what cannot be used."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.config import load_dataset_config, with_references
from dataset.listing import find_sources
from dataset.sources.decoding import check_resolution, decode_source
from modules.errors import DatasetError
from tests.dataset.edit_sets import RULES, SIZE, cache, make_set
from tests.dataset.sources.test_addresses import write_tar

# --- keys
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ("flux_kontext_no_resize_control = true", (True, None)),
        ("qwen_image_edit_no_resize_control = true", (True, None)),
        ("control_resolution = [1024, 512]", (False, (1024, 512))),
        ("qwen_image_edit_control_resolution = 1024", (False, (1024, 1024))),
        ("multiple_target = false", (False, None)),
    ],
)
def test_keys_have_the_names_of_several_tuners(tmp_path: Path, keys: str, found: tuple[Any, ...]) -> None:
    (table,) = make_set(tmp_path, {"a": (SIZE,)}, keys).datasets

    assert (table.references.no_resize_control, table.references.control_resolution) == found


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            "no_resize_control = true\nflux_kontext_no_resize_control = true",
            "flux_kontext_no_resize_control and no_resize_control are the same key; omit one",
        ),
        ("multiple_target = 2", "multiple_target = 2 .*allowed: true or false"),
        ("control_resolution = 0", "control_resolution = 0 .*allowed: a whole number or"),
    ],
)
def test_wrong_keys_are_told(tmp_path: Path, keys: str, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        make_set(tmp_path, {"a": (SIZE,)}, keys)


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
    assert "1 of 4 images have more reference images than the 2" in over
    assert "b.png has 3" in over
    assert "1 of 4 images have no reference image" in none
    assert "c.png" in none


def test_a_folder_without_any_reference_is_a_mistake(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (), "b": ()})

    with pytest.raises(DatasetError, match=r"refs has no reference image for any image, such as a\.png"):
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
        assert [len(one.latent_inputs) for one in sources] == [3, 2, 1]
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
    table = table.with_values(directory=None, jsonl_file=tmp_path / "list.jsonl")

    report, family = cache(dataclasses.replace(config, datasets=(table,)))

    assert [key[:4] for keys in family.seen for key in keys] == ["good"]
    (failure,) = report.failures
    assert failure.reason == (
        f"a reference image of gone.png cannot be used: {refs / 'gone_0.png'} does not exist. Replace it, "
        "or remove it"
    )
