"""Transparency and color profiles in datasets: what is learned, remarks, and caches of earlier versions."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_tools.report.check import check_caching
from data_tools.report.page import ReportOptions
from data_tools.report.run import run_report
from dataset.cache.records import latent_record, record_metadata, text_records
from dataset.cache_files import read_entry, write_tensors
from dataset.caching import planning
from dataset.caching.loop import cache_media
from dataset.caching.prefetch import SIZE_CHANGES, conclude
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.sources.colors import MOVING, REORDERED, find_colors, find_reordered, reading_difference
from dataset.sources.decoding import decode_source
from dataset.table import DatasetTable
from tests.dataset.caching.test_loop import make_config
from tests.dataset.caching.test_reference_texts import cache_seen, values
from tests.dataset.edit_sets import SIZE, EditFamily, make_set
from tests.dataset.making import make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options
from tests.modules.media.test_colors import XYZ_OF_P3, converted, encode_clip, matrix_profile, srgb_curve

BLUE, CLEAR = (10, 20, 200, 255), (10, 20, 200, 51)
WHITE = [206, 208, 244]  # a fifth of the color over white


def pictures(folder: Path, **keys: Any) -> DatasetConfig:
    make_image(folder / "clear.png", colour=CLEAR)
    make_image(folder / "opaque.png", colour=BLUE)
    make_image(folder / "plain.png", colour=BLUE[:3])
    p3 = matrix_profile(XYZ_OF_P3, srgb_curve())
    Image.new("RGB", (32, 32), (200, 120, 90)).save(folder / "wide.png", icc_profile=p3)
    return DatasetConfig(
        folder / "data.toml", (make_table(folder, "image_directory", resolution=(32, 32), **keys),)
    )


def cached(config: DatasetConfig, masks_latents: bool = False) -> dict[str, list[int]]:
    """Cache; returns a pixel of what was encoded, by the stem of its picture."""
    family = ToyFamily(latent=dataclasses.replace(LATENT, masks_latents=masks_latents))
    cache_media(family, config, options())
    return {
        key.split("_")[0]: frames[0, 0, 0].tolist()
        for media in family.media
        for key, frames in zip(media.keys, media.frames, strict=True)
    }


def age(folder: Path, as_shown: int = False) -> None:
    """Make caches look like those of versions that did not look at colors, or (True) not at codes."""
    for path in (folder / "cache").glob("*.safetensors"):
        entry = read_entry(path)
        if path.stem.endswith("_te"):
            texts = text_records(entry).items()
            changed = record_metadata(
                {name: dataclasses.replace(one, decoding_version=as_shown) for name, one in texts}
            )
        else:
            latents = latent_record(entry)
            assert latents is not None
            changed = record_metadata(dataclasses.replace(latents, decoding_version=as_shown))
        write_tensors(path, entry.named, {**entry.metadata, **changed})


@pytest.mark.parametrize("many", [8192, 2])
@pytest.mark.parametrize("masks_latents", [False, True])
def test_what_a_viewer_shows_is_learned_and_old_caches_of_other_colours_are_made_again(
    tmp_path: Path, masks_latents: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MANY", many)
    config = pictures(tmp_path)
    wide = np.rint(converted(np.array([200, 120, 90]), XYZ_OF_P3, None)).tolist()

    found = cached(config, masks_latents)

    np.testing.assert_allclose(found.pop("wide"), wide, atol=1)
    shown = [*CLEAR[:3]] if masks_latents else WHITE
    assert found == {"clear": shown, "opaque": [*BLUE[:3]], "plain": [*BLUE[:3]]}
    assert cached(config, masks_latents) == {}
    age(tmp_path, True)
    assert cached(config, masks_latents) == {}
    age(tmp_path)
    assert set(cached(config, masks_latents)) == ({"wide"} if masks_latents else {"wide", "clear"})
    assert cached(config, masks_latents) == {}


def test_pictures_that_move_are_named_where_their_folder_does_not_do_so(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    for name in ("moves.png", "turns.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
    first.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[second])  # as phones do
    first.save(tmp_path / "plain.png")

    def remarks(table: DatasetTable) -> list[str]:
        return [one.text for one in find_colors(find_sources(table)) if one.kind == MOVING]

    in_folder = make_table(tmp_path, "image_directory")
    assert remarks(in_folder) == [str(tmp_path / "moves.png")]  # a warning of the folder names WebP and GIF
    lines = [json.dumps({"image_path": str(path)}) for path in sorted(tmp_path.glob("*.*"))]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    in_list = make_table(tmp_path, "image_directory", directory=None, jsonl_file=tmp_path / "list.jsonl")
    assert remarks(in_list) == [str(tmp_path / "moves.png"), str(tmp_path / "turns.webp")]


@pytest.mark.parametrize("many", [8192, 1])
def test_clips_that_name_their_colours_or_are_not_square_are_made_again(
    tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planning, "MANY", many)
    gray = np.full((32, 64, 3), 99, np.uint8)
    encode_clip(tmp_path / "plain.mkv", "ffv1", "yuv420p", gray)
    encode_clip(tmp_path / "wide.mkv", "ffv1", "yuv420p", gray, color_primaries=12, color_trc=1)
    encode_clip(tmp_path / "dv.mp4", "libx264", "yuv420p", gray, sample_aspect_ratio=Fraction(1, 2))
    table = make_table(tmp_path, target_frames=(1,), resolution=(32, 32))
    config = DatasetConfig(tmp_path / "data.toml", (table,))
    assert set(cached(config)) == {"plain", "wide", "dv"}
    (path,) = (tmp_path / "cache").glob("dv_*")
    entry = read_entry(path)
    latents = latent_record(entry)
    assert latents is not None
    assert latents.clip is not None
    assert latents.clip.size == (32, 32)
    clip, then = dataclasses.replace(latents.clip, size=(64, 32)), {**latents.options, "size": [64, 32]}
    old = dataclasses.replace(latents, clip=clip, options=then)
    write_tensors(path, entry.named, {**entry.metadata, **record_metadata(old)})
    age(tmp_path, True)

    with caplog.at_level("INFO"):
        assert set(cached(config)) == {"wide", "dv"}

    assert "size was [64, 32], is now [32, 32]" in caplog.text
    said = [str(reading_difference(source, False, 1)).partition(" (")[0] for source in find_sources(table)]
    shape = "dv.mp4 was read without the shape of its pixels, which are not square, but now with it"
    assert said == [shape, "None", "wide.mkv was read without the color space that its header states"]
    assert [one.name for one in (tmp_path / "cache").glob("dv_*")] == [path.name]
    assert cached(config) == {}


def test_alpha_masks_keep_the_colours_below_them(tmp_path: Path) -> None:
    config = pictures(tmp_path, alpha_mask=True)
    assert cached(config)["clear"] == [*CLEAR[:3]]
    age(tmp_path)
    assert set(cached(config)) == {"wide"}


def test_alpha_that_is_cropped_away_is_no_mask(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (256, 64), CLEAR[:3])
    wide.putalpha(Image.fromarray(np.where(np.arange(256) < 8, 0, 255).astype(np.uint8)[None].repeat(64, 0)))
    wide.save(tmp_path / "wide.png")
    (source,) = find_sources(make_table(tmp_path, "image_directory", resolution=(64, 64), alpha_mask=True))
    assert decode_source(source, 16.0, 16).mask is None


def test_check_and_caching_count_transparent_pictures_and_profiles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = pictures(tmp_path, caption_extension=".txt")
    for path in tmp_path.glob("*.png"):
        path.with_suffix(".txt").write_text("a cat", encoding="utf-8")

    lines = check_caching(ToyFamily(), config, 1, False).lines
    cached(config)
    page = tmp_path / "x.html"
    run_report(config, ReportOptions.from_defaults(dataset_config=config.path, output=page, no_decode=True))
    assert "are transparent and filled with white" in page.read_text(encoding="utf-8")

    for text in ("\n".join(lines), caplog.text):
        assert "1 is transparent and filled with white:\n" in text
        assert "clear.png" in text
        assert "1 has a color profile, or colors other than sRGB" in text
        assert "opaque.png" not in text


def test_references_and_the_texts_that_see_them_are_on_white(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (SIZE,), "b": (SIZE,)})
    make_image(tmp_path / "refs" / "a_0.png", SIZE, CLEAR)
    family = EditFamily()
    cache_media(family, config, options())
    cache_seen(tmp_path)
    controls = {key[0]: media.control[0][0, 0, 0, 0] for media in family.media for key in media.keys}
    assert controls["a"].tolist() == WHITE
    assert values(tmp_path)["a_toy_te.safetensors"] == pytest.approx(sum(WHITE) / 3, abs=0.5)

    age(tmp_path)
    again = EditFamily()
    cache_media(again, config, options())
    assert [key[0] for keys in again.seen for key in keys] == ["a"]
    assert cache_seen(tmp_path)[0].written == 1
    assert cache_seen(tmp_path)[0].written == 0


def test_a_mask_clip_drawn_by_transparency_may_have_empty_frames(tmp_path: Path) -> None:
    make_config(tmp_path, clips=(5,))
    (tmp_path / "masks" / "clip_0").mkdir(parents=True)
    for number in range(5):
        drawn = np.zeros((32, 32, 4), np.uint8)
        drawn[:, : 8 * number] = 255
        Image.fromarray(drawn).save(tmp_path / "masks" / "clip_0" / f"{number:03d}.png")
    table = make_table(tmp_path, target_frames=(5,), resolution=(32, 32), mask_directory=tmp_path / "masks")

    mask = decode_source(find_sources(table)[0], 16.0).mask

    assert mask is not None
    assert mask.mean(axis=(1, 2)).tolist() == [0, 255 / 4, 255 / 2, 3 * 255 / 4, 255]


def numbered_frames(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        make_image(folder / name, colour=(10 * number + 10,) * 3)
    return folder


def grays(frames: NDArray[np.uint8]) -> list[int]:
    found: list[int] = frames[:, 0, 0, 0].tolist()
    return found


PADDED = [f"{number:03d}.png" for number in range(5)]
BY_NUMBER = ["1.png", "2.JPG.png", "9.png", "10.png", "11.png"]


def test_frames_in_folders_have_the_order_of_their_numbers(tmp_path: Path) -> None:
    make_config(tmp_path, clips=(5,))
    for place in ("controls", "masks", "references"):
        numbered_frames(tmp_path / place / "clip_0", BY_NUMBER)
    table = make_table(
        tmp_path,
        target_frames=(5,),
        resolution=(32, 32),
        control_directory=tmp_path / "controls",
        mask_directory=tmp_path / "masks",
        reference_directory=tmp_path / "references",
    )
    (source,) = find_sources(table)

    media = decode_source(source, 16.0)

    order = [10, 20, 30, 40, 50]
    assert grays(media.control[0]) == grays(media.references[0]) == order
    assert media.mask is not None
    assert media.mask[:, 0, 0].tolist() == order
    remarks = [error.text for error in find_reordered([source])]
    assert remarks == [
        f"{tmp_path / place / 'clip_0'}: 9.png comes before 10.png"
        for place in ("controls", "masks", "references")
    ]


@pytest.mark.parametrize("many", [8192, 1])
@pytest.mark.parametrize(("names", "is_stale"), [(BY_NUMBER, True), (PADDED, False)])
def test_caches_of_folders_in_the_order_of_texts_are_made_again(
    tmp_path: Path,
    names: list[str],
    is_stale: bool,
    many: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(planning, "MANY", many)
    config = make_config(tmp_path, clips=(5,))
    numbered_frames(tmp_path / "controls" / "clip_0", names)
    table = config.datasets[0].with_values(control_directory=tmp_path / "controls", target_frames=(5,))
    config = DatasetConfig(config.path, (table,))
    assert set(cached(config)) == {"clip"}
    assert caplog.text.count("9.png comes before 10.png") == is_stale
    age(tmp_path, 2)

    found = check_caching(ToyFamily(), config, 1, False)

    assert [error.kind for table in found.tables for error in table.warnings].count(REORDERED) == is_stale
    assert set(cached(config)) == ({"clip"} if is_stale else set())
    assert cached(config) == {}


def test_caches_of_mirrored_clips_are_made_again(tmp_path: Path) -> None:
    gray = np.full((32, 32, 3), 99, np.uint8)
    for name, flip in (("plain", False), ("selfie", True)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            stream.set_display_rotation(180, hflip=flip)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
            container.mux(stream.encode())
    config = DatasetConfig(
        tmp_path / "data.toml", (make_table(tmp_path, target_frames=(1,), resolution=(32, 32)),)
    )
    assert set(cached(config)) == {"plain", "selfie"}
    age(tmp_path, 2)

    assert set(cached(config)) == {"selfie"}
    assert cached(config) == {}


def test_clips_and_controls_that_change_their_size_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, clips=(5,))
    folder = tmp_path / "controls" / "clip_0"
    folder.mkdir(parents=True)
    for number, size in enumerate([(64, 32)] * 3 + [(32, 64)] * 2):
        make_image(folder / f"{number}.png", size)
    table = config.datasets[0].with_values(control_directory=tmp_path / "controls")
    config = DatasetConfig(config.path, (table,))
    change = "clip_0: 64x32, from frame 4 on 32x64"
    kind = "1 clip has frames of several sizes: those of a different shape than the first are cropped"

    for _ in range(2):
        before = check_caching(ToyFamily(), config, 1, False)
        report = cache_media(ToyFamily(), config, options())

        assert [one.reason for one in report.resized] == [change]
        remarks = [error for found in before.tables for error in found.warnings]
        assert [(one.kind, one.text) for one in remarks] == [
            (SIZE_CHANGES, f"{tmp_path / 'clip_0.mp4'}: {change}")
        ]
    with caplog.at_level("WARNING"):
        conclude(report)
    assert kind in caplog.text
