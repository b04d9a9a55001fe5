"""References of clips and masks of control clips: found by name, read in step with their clip."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.caching.latents import batch_media
from dataset.config import DatasetConfig, load_dataset_config, with_references
from dataset.listing import find_sources
from dataset.sources.companions import reject_companions
from dataset.sources.decoding import decode_source
from modules.errors import DatasetError
from protocols.rules import ReferenceRules
from tests.dataset.making import GRAY_STEP, make_clip, make_frames, make_image, make_table

RULES = ReferenceRules(2, clips=True, size_factor=2, control_masks=True)


def test_companions_are_paired_by_name_read_and_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "a_9"):
        make_clip(tmp_path / f"{name}.mp4", 9, (64, 64))
    folders = {name: tmp_path / name for name in ("references", "masks", "control")}
    for folder in folders.values():
        folder.mkdir()
    make_frames(folders["references"] / "a_1", 6, (64, 64))
    make_image(folders["references"] / "a_0.png", (64, 64), (200, 200, 200))
    make_clip(folders["references"] / "a_9.mp4", 9, (64, 64))
    make_image(folders["references"] / "stray.png")
    make_image(folders["masks"] / "a.png", (64, 64), (255, 255, 255))
    for name in ("a", "b", "a_9"):
        make_clip(folders["control"] / f"{name}.mp4", 9, (64, 64))
    table = make_table(
        tmp_path,
        resolution=(64, 64),
        target_frames=(5,),
        frame_extraction="chunk",
        control_directory=folders["control"],
        reference_directory=folders["references"],
        control_mask_directory=folders["masks"],
        clip_rules=RULES,
    )

    found = {source.stem: source for source in find_sources(table)}

    assert [path.name for path in found["a"].references] == ["a_0.png", "a_1"]
    assert [path.name for path in found["a_9"].references] == ["a_9.mp4"]
    assert found["b"].references == ()
    assert found["b"].control_mask is None
    assert "1 of 3 videos have no reference" in caplog.text
    assert "1 in reference_directory match no video" in caplog.text
    assert "stray.png" in caplog.text

    media = decode_source(found["a"], 24.0, 32)
    item = media.cut((4, 5))
    batch = batch_media([item], ["a"])
    image, clip = batch.references
    assert (image.shape, clip.shape) == ((1, 1, 32, 32, 3), (1, 5, 32, 32, 3))
    grays = clip[0, :, 0, 0, 0].tolist()
    assert grays == [GRAY_STEP * number for number in (5, 6, 6, 6, 6)]  # its last frame is repeated
    assert int(image.float().mean()) == 200
    assert batch.control_mask is not None
    assert batch.control_mask.shape == (1, 5, 64, 64)
    assert bool((batch.control_mask == 255).all())
    assert len(batch.control) == 1
    assert [path.name for path, _ in found["a"].latent_inputs] == [
        "a.mp4",
        "a.mp4",
        "a.png",
        "a_0.png",
        "a_1",
    ]


def test_lists_name_companions(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 5)
    row = {"video_path": str(clip), "caption": "x", "control_mask_path": "m.png"}
    row |= {"reference_path_1": "r1.png", "reference_path": "r0.mp4"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row), encoding="utf-8")
    table = make_table(tmp_path, "video_jsonl_file", clip_rules=RULES)

    (source,) = find_sources(table)

    assert (source.references, source.control_mask) == ((Path("r0.mp4"), Path("r1.png")), Path("m.png"))
    with pytest.raises(DatasetError, match="no control clip.*control_path in a list"):
        reject_companions(table, [source])
    reject_companions(table, [replace(source, control=(Path("c.mp4"),))])
    for rules, words in ((None, "takes none"), (ReferenceRules(1, clips=True), "takes at most 1")):
        other = make_table(tmp_path, "video_jsonl_file", clip_rules=rules)
        with pytest.raises(DatasetError, match=words):
            reject_companions(other, find_sources(other))


@pytest.mark.parametrize(
    ("key", "rules", "words"),
    [
        ("reference_directory", None, "this model takes none"),
        ("reference_directory", ReferenceRules(2), "takes them from control_directory"),
        ("control_mask_directory", ReferenceRules(2, clips=True), "takes no masks of control clips"),
    ],
)
def test_models_that_take_none_refuse_the_keys(
    tmp_path: Path, key: str, rules: ReferenceRules | None, words: str
) -> None:
    table = make_table(tmp_path, **{key: tmp_path})
    with pytest.raises(DatasetError, match=f"{key}.*{words}"):
        with_references(DatasetConfig(tmp_path, (table,)), rules)


def test_a_folder_without_any_partner_and_equal_names_are_faults(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", 5)
    folder = tmp_path / "references"
    folder.mkdir()
    table = make_table(tmp_path, reference_directory=folder)
    with pytest.raises(DatasetError, match="has nothing for any video"):
        find_sources(table)
    make_image(folder / "a.png")
    make_image(folder / "a.jpg")
    with pytest.raises(DatasetError, match="the same name except for the suffix"):
        find_sources(make_table(tmp_path, reference_directory=folder))


def test_target_fps_is_the_rate_that_clips_are_cut_to(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", 24)  # 24 frames a second
    path = tmp_path / "data.toml"
    make_table(tmp_path)
    path.write_text(path.read_text() + "target_fps = 12\ntarget_frames = [5]\nresolution = 32\n")
    table = load_dataset_config(path).datasets[0]
    assert (table.buckets.target_fps, table.buckets.source_fps) == (12.0, "auto")
    media = decode_source(find_sources(table)[0], 16.0)
    grays = media.frames[:5, 0, 0, 0].astype(int)
    assert np.diff(grays).tolist() == pytest.approx([2 * GRAY_STEP] * 4, abs=2)  # of a lossy codec
