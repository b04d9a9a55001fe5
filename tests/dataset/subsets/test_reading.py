"""The image guides' dataset configuration as tables."""

from pathlib import Path

import pytest

from dataset.table import Augmentation, BucketRule, CaptionChanges
from modules.errors import DatasetError
from tests.dataset.subsets.making import load

TWO_SIZES = """
[general]
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1

[[datasets]]
resolution = 1024
batch_size = 2

  [[datasets.subsets]]
  image_dir = "FOLDER/cat"
  num_repeats = 10
  class_tokens = "cat"
  keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "FOLDER/reg"
  is_reg = true

[[datasets]]
resolution = [768, 512]
bucket_reso_steps = 32
shuffle_caption = false

  [[datasets.subsets]]
  image_dir = "FOLDER/cat"
  flip_aug = true
  interpolation_type = "bicubic"
  caption_extention = ".caption"
  custom_attributes = { diff_output_preservation = true }
"""


def faults(folder: Path, text: str, *words: str) -> str:
    with pytest.raises(DatasetError) as caught:
        load(folder, text, *words)
    return str(caught.value)


def test_a_subset_is_a_table_and_values_fall_back(tmp_path: Path) -> None:
    cat, reg, small = load(tmp_path, TWO_SIZES, "--prior_loss_weight", "0.5", "--random_crop").datasets

    assert [(table.group, table.subset, table.index) for table in (cat, reg, small)] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
    ]
    assert (cat.resolution, cat.batch_size, cat.num_repeats, cat.class_tokens) == ((1024, 1024), 2, 10, "cat")
    assert cat.changes == CaptionChanges(shuffle=True, keep_tokens=2, is_raw=True)
    assert (reg.is_reg, reg.prior_loss_weight, cat.prior_loss_weight) == (True, 0.5, 1.0)
    assert (reg.changes.keep_tokens, reg.num_repeats) == (1, 1)
    assert small.buckets == BucketRule(256, 1024, 32, "bicubic")
    assert small.changes == CaptionChanges(keep_tokens=1)
    assert small.augmentation == Augmentation(flip=True, random_crop=True)
    assert (small.caption_extension, cat.caption_extension) == (".caption", ".txt")
    assert small.custom_attributes == {"diff_output_preservation": True}
    assert cat.name.endswith(f"data.toml, [[datasets]] 1, subset 1 ({tmp_path / 'cat'})")


def test_each_table_has_a_cache_folder_of_its_own(tmp_path: Path) -> None:
    text = TWO_SIZES + '\n  [[datasets.subsets]]\n  image_dir = "FOLDER/cat"\n'

    folders = [table.cache_directory for table in load(tmp_path, text).datasets]

    assert folders == [
        tmp_path / "cat" / "1024x1024",
        tmp_path / "reg" / "1024x1024",
        tmp_path / "cat" / "768x512",
        tmp_path / "cat" / "768x512_2",
    ]


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    text = """
    [general]
    suffle_caption = true
    [[datasets]]
    batch_size = 0
    image_dir = "here"
      [[datasets.subsets]]
      resolution = 512
      keep_tokens = "2"
      caption_extention = ".txt"
      caption_extension = ".txt"
    [[datasets]]
    resolution = 512
    """

    said = faults(tmp_path, text)

    assert said.splitlines()[0].endswith("data.toml cannot be used:")
    for line in (
        "[general]: unknown key suffle_caption = true. Did you mean shuffle_caption?",
        "[[datasets]] 1: batch_size = 0 (a whole number); allowed: a whole number, 1 or more",
        '[[datasets]] 1: image_dir = "here" is for [[datasets.subsets]]; move it there',
        "[[datasets]] 1, subset 1: resolution = 512 is for [[datasets]] or [general]; move it there",
        '[[datasets]] 1, subset 1: keep_tokens = "2" (text); allowed: a whole number, 0 or more',
        "[[datasets]] 1, subset 1: caption_extention and caption_extension are the same key; leave out one",
        "[[datasets]] 2 has no [[datasets.subsets]]; each folder of pictures needs one",
    ):
        assert line in said


def test_a_subset_needs_pictures(tmp_path: Path) -> None:
    assert "subset 1: image_dir, the folder of its pictures, is missing" in faults(
        tmp_path, "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nnum_repeats = 2"
    )
