"""Frames and sizes of prepared clips, compared with plain computations."""

import itertools
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import wan_cache_latents
from data_tools.cogvideox.clips import (
    SIDES,
    ShapeOptions,
    read_clip,
    select_frames,
    select_size,
    shape_frame,
)
from dataset.cache.records import latent_record
from dataset.cache_files import read_entry
from dataset.caching.prefetch import fill_batches
from modules.errors import DatasetError, MediaError, UserError
from modules.media import reading
from modules.media.reading import video_info
from tests.data_tools.cogvideox.making import NAMES, save, write_config, write_data
from tests.dataset.making import frame_numbers, make_clip, make_frames
from tests.tiny.wan_encoders import vae22_tensors, vae_tensors


def shape(**changes: object) -> ShapeOptions:
    buckets = {"height_buckets": (32, 64), "width_buckets": (32, 48), "frame_buckets": (4, 8)}
    return ShapeOptions.from_defaults(**{**buckets, **changes})


@pytest.mark.parametrize(
    ("available", "buckets", "maximum", "expected"),
    [
        (100, (16, 24, 32, 48, 64, 80), 49, 48),
        (20, (16, 24), 49, 16),  # as near as 24
        (23, (16, 24), 49, 16),  # 24 is nearer, but there are not so many
        (10, (16,), 49, None),
        (300, (49,), 49, 49),
    ],
)
def test_a_clip_takes_the_nearest_number_of_frames_that_it_has(
    available: int, buckets: tuple[int, ...], maximum: int, expected: int | None
) -> None:
    assert select_frames(available, buckets, maximum) == expected


@pytest.mark.parametrize("size", [(1920, 1080), (448, 352), (5000, 10)])
def test_the_size_is_the_nearest_of_all_pairs(size: tuple[int, int]) -> None:
    pairs = list(itertools.product(SIDES, SIDES))
    height, width = min(pairs, key=lambda pair: abs(pair[0] - size[1]) + abs(pair[1] - size[0]))
    assert select_size(size, SIDES, SIDES) == (width, height)


@pytest.mark.parametrize(
    ("mode", "place", "left"), [("center", (0.9, 0.9), 10), ("random", (0.99, 0), 21), ("none", (0.0, 0), 0)]
)
def test_with_a_mode_it_is_resized_to_cover_and_cut(mode: str, place: tuple[float, float], left: int) -> None:
    # half of it covers 32 x 32, and 21 columns are too many
    frame = np.random.default_rng(3).integers(0, 256, (64, 106, 3), np.uint8)
    plain = cv2.resize(frame, (53, 32), interpolation=cv2.INTER_AREA)[:, left : left + 32]

    shaped = shape_frame(
        frame, (32, 32), shape(video_reshape_mode=mode), crop_position=place, is_flipped=False
    )
    flipped = shape_frame(
        frame, (32, 32), shape(video_reshape_mode=mode), crop_position=place, is_flipped=True
    )

    assert np.array_equal(shaped, plain)
    assert np.array_equal(flipped, plain[:, ::-1])


def test_without_a_mode_a_frame_is_resized_whatever_its_proportions() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (30, 50, 3), np.uint8)
    plain = np.array(Image.fromarray(frame).resize((32, 64), Image.Resampling.BICUBIC))

    assert np.array_equal(
        shape_frame(frame, (32, 64), shape(), crop_position=(0.5, 0.5), is_flipped=False), plain
    )


def test_a_clip_is_read_as_its_chosen_frames_at_its_chosen_size(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a clip.mp4", 17, (40, 72))

    clip = read_clip(path, shape(), "name", threads=1)

    assert clip.shape == (8, 64, 32, 3)
    assert frame_numbers(clip) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert np.array_equal(clip, read_clip(path, shape(), "name", threads=3))
    folder = make_frames(tmp_path / "frames", 5)
    assert frame_numbers(read_clip(folder, shape(), "name", threads=0)) == [0, 1, 2, 3]
    with pytest.raises(MediaError, match=r"has 5 frames, the smallest of --frame_buckets is 6"):
        read_clip(folder, shape(frame_buckets=(6, 8)), "name", threads=0)


@pytest.mark.parametrize(("declared", "step"), [(24, 3), (40, 2)])
def test_a_wrong_header_counts_as_long_as_its_frames_are_there(
    declared: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "clip.mp4", 23, (40, 72))
    info = replace(video_info(path), frames=declared)
    monkeypatch.setattr(reading, "video_info", lambda _: info)

    clip = read_clip(path, shape(), "name", threads=1)

    assert frame_numbers(clip) == list(range(0, 8 * step, step))


def test_batches_are_of_one_shape_full_ones_first_and_the_rest_at_the_end() -> None:
    # shape (its bytes) and number
    items = [(4, 1), (8, 2), (4, 3), (4, 4), (8, 5), (4, 6), (8, 7)]

    def numbers(maximum: int, max_bytes: int = 100) -> list[list[int]]:
        shape = itemgetter(0)
        return [
            [one for _, one in some]
            for some in fill_batches(items, shape, lambda _: maximum, shape, max_bytes)
        ]

    assert numbers(3) == [[1, 3, 4], [2, 5, 7], [6]]
    # of two small ones, or one large one, and no more
    assert numbers(3, 8) == [[2], [1, 3, 4], [5], [7], [6]]
    assert numbers(1) == [[number] for _, number in items]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(vae_tensors(), tmp_path_factory.mktemp("moments") / "wan.pth")


def cache(vae: Path, config: Path) -> None:
    words = ["--dataset_config", str(config), "--vae", str(vae), "--vae_dtype", "float32"]
    wan_cache_latents.main(words)


def test_another_run_keeps_what_is_right_and_makes_anew_what_has_changed(vae: Path, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", count=2)
    for name in NAMES[:2]:
        save(torch.zeros(32, 2, 4, 4), root / "video_latents" / f"{name}.pt")
    config = write_config(tmp_path, root, "load_tensors = true")
    cache(vae, config)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    cache(vae, config)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert again == first

    save(torch.ones(32, 3, 4, 4), root / "video_latents" / f"{NAMES[1]}.pt")
    cache(vae, config)

    kept, changed = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert kept.stat().st_mtime_ns == first[kept.name]
    assert changed.name == f"{NAMES[1]}_00000-009_0032x0032_wan.safetensors"

    cache(vae, write_config(tmp_path, root, "target_frames = [5]"))  # the same name, but from the clip
    record = latent_record(read_entry(kept, is_full=False))
    assert record is not None
    assert [file.name for file in record.files] == [f"{NAMES[0]}.mp4"]


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this would run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Harmful(), "contains program code in addition to its tensors and is refused"),
        (b"no file of torch", r"video_latents.00001\.pt"),
        ({"latents": torch.zeros(1)}, "contains dict, not a tensor"),
        (torch.zeros(32, 4, 4), "contains 32x4x4 of torch.float32, not moments"),
        (
            torch.zeros(32, 1, 4, 3),
            "is of a clip of 24x32 pixels, but this model needs sides that are multiples of 16",
        ),
        (torch.zeros(16, 1, 4, 4), "has 16 channels: this model's VAE has 32: .* look like latents"),
        (torch.full((32, 1, 4, 4), float("nan")), "values of latents are NaN"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_the_others_are_cached(
    content: object, words: str, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_data(tmp_path / "data", count=2)
    good, bad = (root / "video_latents" / f"{name}.pt" for name in NAMES[:2])
    save(torch.zeros(32, 1, 4, 4), good)
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        torch.save(content, bad)

    with pytest.raises(UserError, match=words):
        cache(vae, write_config(tmp_path, root, "load_tensors = true"))

    assert "this would run" not in capsys.readouterr().out
    if "NaN" not in words:  # that one ends the run, as of clips
        assert [path.name[:5] for path in (tmp_path / "cache").glob("*.safetensors")] == [NAMES[0]]


def test_another_vae_is_refused_by_name_before_anything_is_read(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", count=1)
    save(torch.zeros(32, 1, 4, 4), root / "video_latents" / f"{NAMES[0]}.pt")
    with pytest.raises(DatasetError, match="has 32 channels, but this model's VAE has 96"):
        cache(
            save(vae22_tensors(), tmp_path / "wan22.pth"), write_config(tmp_path, root, "load_tensors = true")
        )
