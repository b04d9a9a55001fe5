"""Masks of the loss: where they are from, what is cached, and what is refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batches.finding import find_items
from dataset.batches.items import CachingCommands
from dataset.batches.reading import read_batch
from dataset.cache_files import read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.sources.decoding import decode_source
from dataset.sources.folders import ControlFolder
from dataset.sources.frames import shrink_mask
from modules.errors import CacheError, DatasetError, MediaError
from protocols.data import LOSS_MASK
from tests.dataset.caching.test_loop import make_config
from tests.dataset.making import make_clip, make_frames, make_image, make_table, subset_table
from tests.dataset.toy_family import LATENT, ToyFamily, options

COMMANDS = CachingCommands(lambda: ("latents again", "texts again"))


def half(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture whose left half is white."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    image.save(path)
    return path


def make_dataset(folder: Path, count: int = 2, **keys: Any) -> DatasetConfig:
    return make_config(folder, clips=(9,) * count, target_frames=(9,), batch_size=2, **keys)


def masks(folder: Path) -> dict[str, Path]:
    """The key of a folder of masks."""
    (folder / "masks").mkdir(exist_ok=True)
    return {"mask_directory": folder / "masks"}


def cache(config: DatasetConfig) -> int:
    """Cache all; returns how many items were encoded."""
    family = ToyFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())
    return sum(map(len, family.seen))


def test_a_mask_is_averaged_over_what_a_latent_stands_for() -> None:
    mask = torch.zeros(9, 16, 16, dtype=torch.uint8)
    mask[0] = 255  # the first frame alone
    mask[1:3] = 255  # half of the second group
    mask[5:, :, :8] = 255  # the left half of the third
    mask[5:, :4, 8:] = 255  # and half of its upper right latent

    found = shrink_mask(mask, (4, 8, 8))

    assert found.dtype == torch.float16
    expected = [[[1, 1], [1, 1]], [[0.5, 0.5], [0.5, 0.5]], [[1, 0.5], [1, 0]]]
    assert found.tolist() == expected
    assert shrink_mask(mask[:1], (4, 8, 8)).tolist() == expected[:1]
    assert shrink_mask(mask[:1], (1, 8, 8)).tolist() == expected[:1]


def test_masks_of_clips_that_are_encoded_by_themselves() -> None:
    """Of 22 frames: 1, 4, 4, 4, 4 and again 1, 4."""
    mask = torch.arange(22, dtype=torch.uint8).view(22, 1, 1).expand(22, 2, 2) * 10

    found = shrink_mask(mask, (4, 2, 2), clip=17)

    expected = [0, 2.5, 6.5, 10.5, 14.5, 17, 19.5]
    torch.testing.assert_close(found.flatten().float() * 25.5, torch.tensor(expected), atol=0.01, rtol=0)


def test_masks_are_cached_beside_latents_and_items_without_one_are_whole(tmp_path: Path) -> None:
    config = make_dataset(tmp_path, **masks(tmp_path))
    half(tmp_path / "masks" / "clip_0.png")
    cache(config)
    items = find_items(config, "toy", LATENT).items

    batch = read_batch(items, LATENT)

    left = [1.0, 1.0, 0.0, 0.0]
    assert batch.tensor(LOSS_MASK).shape == (2, 3, 4, 4)
    assert batch.tensor(LOSS_MASK)[0].tolist() == [[left] * 4] * 3
    assert (batch.tensor(LOSS_MASK)[1] == 1).all()
    assert LOSS_MASK not in read_batch(items[1:], LATENT).tensors
    names = read_entry(items[0].latent_path).shapes
    assert sorted(names) == ["latents_3x4x4_bfloat16", "reelsmith_loss_mask"]


@pytest.mark.parametrize("kind", ["short clip", "folder"])
def test_a_mask_may_be_a_clip_or_a_folder_of_images(tmp_path: Path, kind: str) -> None:
    make_clip(tmp_path / "clip.mkv", 9)
    (tmp_path / "masks").mkdir()
    if kind == "folder":
        make_frames(tmp_path / "masks" / "clip", 9)
    else:
        make_clip(tmp_path / "masks" / "clip.mkv", 5)
    table = make_table(tmp_path, target_frames=(9,), resolution=(32, 32), mask_directory=tmp_path / "masks")
    (source,) = find_sources(table)

    mask = decode_source(source, 16.0).mask

    assert mask is not None
    grays = [round(float(frame.mean()) / 4) - 1 for frame in mask]
    assert grays == [0, 1, 2, 3, 4, *([4] * 4 if kind == "short clip" else [5, 6, 7, 8])]


def test_transparent_parts_of_images_are_not_learned(tmp_path: Path) -> None:
    make_image(tmp_path / "opaque.png")
    image = np.zeros((32, 32, 4), np.uint8)
    image[:, :16, 3] = 255
    Image.fromarray(image).save(tmp_path / "clear.png")
    table = make_table(tmp_path, "image_directory", resolution=(32, 32), alpha_mask=True)

    clear, opaque = (decode_source(source, 16.0) for source in find_sources(table))

    assert opaque.mask is None
    assert clear.mask is not None
    assert clear.alpha is None  # else families would multiply latents by it
    assert np.array_equal(clear.mask, image[None, ..., 3])


def test_transparent_parts_of_clips_are_not_learned(tmp_path: Path) -> None:
    frames = []
    for index in range(5):
        frames.append(Image.new("RGBA", (32, 32), (200, 100, 50 * index, 255)))
        frames[-1].paste((0, 0, 0, 0), (16, 4, 28, 28))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=60, disposal=2)
    table = make_table(tmp_path, target_frames=(5,), resolution=(32, 32))
    (source,) = find_sources(table)
    (masked,) = find_sources(make_table(tmp_path, target_frames=(5,), resolution=(32, 32), alpha_mask=True))

    assert decode_source(source, 16.0).mask is None
    mask = decode_source(masked, 16.0).mask
    assert mask is not None
    assert (mask.shape, int(mask[2, 8, 20]), int(mask[2, 8, 8])) == ((5, 32, 32), 0, 255)
    assert decode_source(masked, 16.0).frames.shape == (5, 32, 32, 3)


def test_only_items_whose_mask_changed_are_encoded_again(tmp_path: Path) -> None:
    assert cache(make_dataset(tmp_path)) == 2
    config = make_dataset(tmp_path, **masks(tmp_path))
    half(tmp_path / "masks" / "clip_0.png")
    assert cache(config) == 1
    assert cache(config) == 0

    make_image(tmp_path / "masks" / "clip_0.png")
    assert cache(config) == 1
    assert cache(make_dataset(tmp_path)) == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("masks", "", "is from file, .* has no mask"),
        ("", "alpha", "is from nowhere, .* has alpha_mask = true"),
        ("alpha", "masks", "is from alpha, .* has a mask for it"),
    ],
)
def test_training_refuses_caches_with_other_masks(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    keys: dict[str, Any] = {"masks": masks(tmp_path), "alpha": {"alpha_mask": True}, "": {}}
    half(tmp_path / "masks" / "clip_0.png")
    cache(make_dataset(tmp_path, 1, **keys[before]))
    (item,) = find_items(make_dataset(tmp_path, 1, **keys[after]), "toy", LATENT).items

    with pytest.raises(CacheError, match=f"{message}.*\n.*latents again"):
        read_batch([item], LATENT, COMMANDS)


def test_training_notices_a_changed_mask_and_caching_one_of_another_shape(tmp_path: Path) -> None:
    config = make_dataset(tmp_path, 1, **masks(tmp_path))
    half(tmp_path / "masks" / "clip_0.png")
    cache(config)
    (item,) = find_items(config, "toy", LATENT).items
    assert len(read_batch([item], LATENT)) == 1
    make_image(tmp_path / "masks" / "clip_0.png", (64, 32))

    with pytest.raises(CacheError, match=r"clip_0\.png has changed since it was encoded"):
        read_batch([item], LATENT, COMMANDS)
    (source,) = find_sources(config.datasets[0])
    with pytest.raises(MediaError, match=r"clip_0\.png has 64x32 pixels, what it masks has 32x32"):
        decode_source(source, 16.0)


def test_a_folder_without_any_mask_and_two_masks_of_a_clip_are_errors(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mkv", 2)
    (tmp_path / "masks").mkdir()
    table = make_table(tmp_path, mask_directory=tmp_path / "masks")
    half(tmp_path / "masks" / "other.png")
    with pytest.raises(DatasetError, match=r"has no mask for any video.*cat\.mp4"):
        find_sources(table)

    half(tmp_path / "masks" / "clip.png")
    half(tmp_path / "masks" / "clip.bmp")
    with pytest.raises(DatasetError, match=r"clip\.bmp and clip\.png are masks of the same video"):
        find_sources(table)


def test_a_mask_is_cropped_and_mirrored_as_its_picture(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "masks").mkdir()
    gray = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    for folder in ("pics", "masks"):
        Image.fromarray(np.repeat(gray[..., None], 3, axis=2)).save(tmp_path / folder / "a.png")
    masks = str(tmp_path / "masks")
    table = subset_table(tmp_path, random_crop=True, flip_aug=True, mask_directory=masks)
    (source,) = find_sources(table, captions=False)

    drawn = [decode_source(source, 1.0, rng=random.Random(seed)) for seed in range(40)]
    plain = decode_source(source, 1.0)

    for one in (plain, *drawn):
        np.testing.assert_array_equal(one.frames[0, ..., 0], one.mask[0])
    np.testing.assert_array_equal(plain.frames[0, ..., 0], gray[:, 16:80])
    assert len({one.frames.tobytes() for one in drawn}) > 20
    again = decode_source(source, 1.0, rng=random.Random(7))
    np.testing.assert_array_equal(again.frames, drawn[7].frames)
    crops = {gray[:, left : left + 64].tobytes() for left in range(33)}
    sides = [one.frames[0, ..., 0].tobytes() in crops for one in drawn]
    assert 10 < sum(sides) < 30  # the others are mirrored


def test_a_mask_next_to_a_control_picture_is_no_control_picture(tmp_path: Path) -> None:
    for name in ("cat.png", "cat_1.png", "cat-masklabel.png"):
        make_image(tmp_path / name)
    controls = ControlFolder(tmp_path, {"cat"}).for_image("cat", None)
    assert [path.name for path in controls] == ["cat.png", "cat_1.png"]
