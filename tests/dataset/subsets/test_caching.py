"""Subsets through caching, finding and reading, as tables of our own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batches.items import TrainingItem, find_items, group_items, require_items
from dataset.batches.reading import read_batch
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from modules.contract.data import LOSS_MASK
from modules.errors import DatasetError
from tests.dataset.making import make_image
from tests.dataset.subsets.making import load
from tests.dataset.toy_family import LATENT, ToyFamily, options

TWO_SIZES = """
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 16
bucket_reso_steps = 16
[[datasets]]
resolution = 32
batch_size = 2
  [[datasets.subsets]]
  image_dir = "FOLDER/cat"
  class_tokens = "cat"
  num_repeats = 2
  caption_prefix = "photo of"
  [[datasets.subsets]]
  image_dir = "FOLDER/reg"
  class_tokens = "animal"
  is_reg = true
[[datasets]]
resolution = [64, 32]
  [[datasets.subsets]]
  image_dir = "FOLDER/cat"
"""


def make_pictures(folder: Path) -> None:
    for name, size in (("cat/a", (40, 40)), ("cat/b", (120, 40)), ("reg/r", (40, 40))):
        (folder / name).parent.mkdir(exist_ok=True)
        make_image(folder / f"{name}.png", size)
    (folder / "cat" / "a.txt").write_text("one\ntwo", encoding="utf-8")


def cache(config: DatasetConfig) -> tuple[int, list[str]]:
    """Cache all; return how many pictures were encoded, and the texts."""
    family = ToyFamily()
    cache_media(family, config, options())
    cache_texts(family, config, options())
    return sum(map(len, family.seen)), family.text[0].calls


def items_of(config: DatasetConfig) -> tuple[TrainingItem, ...]:
    return require_items(find_items(config, "toy", LATENT, frozenset({"t5"})))


def test_datasets_of_two_sizes_share_a_folder_of_pictures(tmp_path: Path) -> None:
    make_pictures(tmp_path)
    (tmp_path / "cat" / "b.txt").write_text("other", encoding="utf-8")
    config = load(tmp_path, TWO_SIZES)

    counts, texts = cache(config)
    items = items_of(config)

    assert counts == 5
    assert sorted(texts) == ["animal", "one", "other", "photo of one", "photo of other"]
    assert cache(config) == (0, [])  # nothing is made twice
    found = {(item.source_stem, item.table.index): item.bucket for item in items}
    assert found == {
        ("a", 0): (32, 32),
        ("b", 0): (48, 16),
        ("r", 1): (32, 32),
        ("a", 2): (32, 32),
        ("b", 2): (64, 32),
    }
    assert len(group_items(items)) == 4  # a and r share one


def test_a_batch_of_several_subsets_has_a_weight_for_each(tmp_path: Path) -> None:
    make_pictures(tmp_path)
    config = load(
        tmp_path, TWO_SIZES.split("[[datasets]]\nresolution = [64")[0], "--prior_loss_weight", "0.5"
    )
    cache(config)
    items = [item for item in items_of(config) if item.bucket == (32, 32)]

    batch = read_batch(items, LATENT)

    assert batch.captions == ("photo of one", "animal")
    assert batch.loss_weights == (1.0, 0.5)


def test_a_picture_without_caption_and_class_is_refused(tmp_path: Path) -> None:
    make_pictures(tmp_path)

    with pytest.raises(DatasetError, match="no b.txt beside it, and no class_tokens in its table"):
        cache(load(tmp_path, TWO_SIZES))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("random_crop = true\ncolor_aug = true", "color_aug and random_crop change what is encoded"),
        ("shuffle_caption = true", "shuffle_caption change"),
        ("enable_wildcard = true", "its texts cannot be cached"),
    ],
)
def test_what_changes_each_time_is_not_cached(tmp_path: Path, key: str, said: str) -> None:
    make_pictures(tmp_path)
    subset = f"image_dir = 'FOLDER/cat'\nclass_tokens = ''\n{key}"
    text = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\n{subset}"

    with pytest.raises(DatasetError, match=said):
        cache(load(tmp_path, text))


@pytest.mark.parametrize("is_option", [True, False])
def test_masks_lie_on_their_pictures(tmp_path: Path, is_option: bool) -> None:
    """The left half is learned, in a bucket to which the picture is cropped without resizing."""
    key = "conditioning_data_dir" if is_option else "mask_directory"
    (tmp_path / "masks").mkdir()
    (tmp_path / "pics").mkdir()
    left = Image.new("RGB", (80, 40))
    left.paste((255, 255, 255), (0, 0, 40, 40))
    left.save(tmp_path / "pics" / "a.png")
    left.resize((160, 80)).save(tmp_path / "masks" / "a.png")
    text = (
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nbucket_no_upscale = true\n"
        "bucket_reso_steps = 16\n"
        f"[[datasets.subsets]]\nimage_dir = 'FOLDER/pics'\nclass_tokens = 'x'\n{key} = 'FOLDER/masks'"
    )
    config = load(tmp_path, text, *(["--masked_loss"] if is_option else []))
    family = ToyFamily()

    cache_media(family, config, options())
    cache_texts(family, config, options())
    (mask,) = read_batch(list(items_of(config)), LATENT).tensor(LOSS_MASK)

    frames = family.media[0].frames[0, 0, ..., 0]
    assert frames.shape == (32, 80)
    means = torch.nn.functional.avg_pool2d(frames[None].float() / 255, 8)
    np.testing.assert_allclose(mask[0].float(), means[0], atol=0.04)


def test_control_pictures_are_control_media(tmp_path: Path) -> None:
    make_pictures(tmp_path)
    (tmp_path / "control").mkdir()
    for name in "ab":
        make_image(tmp_path / "control" / f"{name}.png", (20, 20), (9, 9, 9))
    text = (
        "[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = 'FOLDER/cat'\nclass_tokens = 'x'\n"
        "conditioning_data_dir = 'FOLDER/control'"
    )
    config = load(tmp_path, text)
    cache(config)

    batch = read_batch(list(items_of(config)), LATENT)

    assert batch.tensor("latents_control").unique().tolist() == [9.0]
