"""The image guides' dataset configuration as tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batches.finding import find_items, require_items
from dataset.batches.items import TrainingItem, group_items
from dataset.batches.reading import read_batch
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.subsets import folders_config
from dataset.table import Augmentation, BucketRule, CaptionChanges
from modules.errors import DatasetError
from protocols.data import LOSS_MASK
from tests.dataset.making import given, load, make_image
from tests.dataset.toy_family import LATENT, ToyFamily, options

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
    assert (
        cat.buckets.resolution,
        cat.learning.batch_size,
        cat.learning.num_repeats,
        cat.captions.class_tokens,
    ) == ((1024, 1024), 2, 10, "cat")
    assert cat.captions.changes == CaptionChanges(shuffle=True, keep_tokens=2, varies_per_step=True)
    assert (reg.learning.is_reg, reg.learning.prior_loss_weight, cat.learning.prior_loss_weight) == (
        True,
        0.5,
        1.0,
    )
    assert (reg.captions.changes.keep_tokens, reg.learning.num_repeats) == (1, 1)
    assert small.buckets.rule == BucketRule(256, 1024, 32, "bicubic")
    assert small.captions.changes == CaptionChanges(keep_tokens=1)
    assert small.buckets.augmentation == Augmentation(flip=True, random_crop=True)
    assert (small.captions.caption_extension, cat.captions.caption_extension) == (".caption", ".txt")
    assert small.learning.attributes == {"diff_output_preservation"}
    assert cat.name.endswith(f"data.toml, [[datasets]] 1, subset 1 ({tmp_path / 'cat'})")
    more = TWO_SIZES + '\n  [[datasets.subsets]]\n  image_dir = "FOLDER/cat"\n'
    folders = [table.cache_directory.relative_to(tmp_path) for table in load(tmp_path, more).datasets]
    assert list(map(str, folders)) == ["cat/1024x1024", "reg/1024x1024", "cat/768x512", "cat/768x512_2"]


def test_keys_above_all_tables_are_those_of_general(tmp_path: Path) -> None:
    inner = TWO_SIZES.replace("[general]\n", "").replace("resolution = 1024\n", "")
    above = f"validation_seed = 7\nresolution = [640, 512]\nvalidation_split = 0.1\n{inner}"

    first, _, other = load(tmp_path, above).datasets

    assert (first.learning.validation_split, first.learning.validation_seed, first.buckets.resolution) == (
        0.1,
        7,
        (640, 512),
    )
    assert (other.learning.validation_seed, other.buckets.resolution) == (7, (768, 512))
    said = faults(tmp_path, f"shuffle_caption = true\n{TWO_SIZES}")
    assert said.endswith("cannot be used:\n  above all tables and in [general]: shuffle_caption; omit one")
    said = faults(tmp_path, f'image_directory = "cats"\n{TWO_SIZES}')
    assert said.endswith(
        "cannot be used:\n  image_directory is above all tables: write it below [[datasets]]"
    )


def test_options_that_a_dataset_file_replaces_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = ["--train_batch_size", "3", "--resolution", "512", "--keep_tokens", "3", "--flip_aug"]
    one = '[[datasets]]\nresolution = 64\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = "FOLDER"\n'
    load(tmp_path, TWO_SIZES, *typed)
    assert [text.partition(" is ignored")[0] for text in caplog.messages] == ["--resolution", "--keep_tokens"]
    caplog.clear()
    load(tmp_path, one, *typed)
    assert [text.partition(" is ignored")[0] for text in caplog.messages] == ["--resolution"]
    caplog.clear()
    load(tmp_path, '[[datasets]]\nimage_directory = "FOLDER"\nresolution = [64, 64]\n', *typed)
    assert caplog.messages[0].startswith(
        "--flip_aug, --keep_tokens, --resolution, --train_batch_size: ignored"
    )


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
    [[datasets]]
    resolution = 64
      [[datasets.subsets]]
      num_repeats = 2
    """

    said = faults(tmp_path, text)

    assert said.splitlines()[0].endswith("data.toml cannot be used:")
    for line in (
        "[general]: unknown key suffle_caption = true. Did you mean shuffle_caption?",
        "[[datasets]] 1: batch_size = 0 (a whole number); allowed: a whole number, 1 or more",
        '[[datasets]] 1: image_dir = "here" is for [[datasets.subsets]]; move it there',
        "[[datasets]] 1, subset 1: resolution = 512 is for [[datasets]] or [general]; move it there",
        '[[datasets]] 1, subset 1: keep_tokens = "2" (text); allowed: a whole number, 0 or more',
        "[[datasets]] 1, subset 1: caption_extention and caption_extension are the same key; omit one",
        "[[datasets]] 2 has no [[datasets.subsets]]; each folder of images needs one",
        "[[datasets]] 3, subset 1: image_dir, the folder of its images, is missing",
    ):
        assert line in said


def images_in(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(path)
    return folder


def test_folders_say_repeats_and_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = images_in(tmp_path / "train", "10_shs cat/a.png", "2_dog/b.png", "notes/c.png", "0_off/d.png")
    reg = images_in(tmp_path / "reg", "1_cat/r.png")
    (train / "2_dog" / "b.txt").write_text("a dog", encoding="utf-8")
    words = ("--train_data_dir", train, "--reg_data_dir", reg, "--resolution", "512,768")

    config = folders_config(given(*words, "--caption_extension", ".txt", "--train_batch_size", "3"))

    found = [
        (table.learning.num_repeats, table.captions.class_tokens, table.learning.is_reg, table.group)
        for table in config.datasets
    ]
    assert found == [(10, "shs cat", False, 0), (2, "dog", False, 0), (1, "cat", True, 0)]
    assert {(table.buckets.resolution, table.learning.batch_size) for table in config.datasets} == {
        ((512, 768), 3)
    }
    assert [find_sources(table)[0].caption for table in config.datasets] == ["shs cat", "a dog", "cat"]
    assert sorted(record.args[1].name for record in caplog.records) == ["0_off", "notes"]


def test_a_json_names_pictures_and_their_captions(tmp_path: Path) -> None:
    images = images_in(tmp_path / "pics", "a.png", "b.jpg", "sub/a.png", "c.webp")
    elsewhere = images_in(tmp_path / "other", "d.png") / "d.png"
    entries = {
        "a": {"caption": "one", "tags": "x, y", "train_resolution": [64, 64]},
        "b.jpg": {"tags": "tag"},
        "sub/a": {"caption": "first\nsecond", "tags": "x\ny"},
        str(elsewhere): {"caption": "far"},
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    words = ("--train_data_dir", images, "--in_json", path, "--dataset_repeats", "4", "--resolution", "64")

    (table,) = folders_config(given(*words)).datasets
    sources = find_sources(table)

    assert {source.path: source.caption for source in sources} == {
        images / "a.png": "one, x, y",
        images / "b.jpg": "tag",
        images / "sub" / "a.png": "first",
        elsewhere: "far",
    }
    assert len({source.stem for source in sources}) == 4
    assert table.learning.num_repeats == 4
    assert table.cache_directory == images / "64x64"
    text = (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'FOLDER/pics'\n"
        "metadata_file = 'FOLDER/meta.json'\nenable_wildcard = true"
    )
    of_wildcards = find_sources(load(tmp_path, text).datasets[0])
    assert "first, x,y\nsecond, x,y" in [source.caption for source in of_wildcards]  # tags end every line


def test_keys_of_a_json_may_have_the_folder_as_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tools of image trainers write them with --full_path."""
    images_in(tmp_path / "pics", "a.png", "sub/b.png")
    monkeypatch.chdir(tmp_path)
    entries = {"pics/a.png": {"tags": "one"}, "pics/sub/b": {"caption": "two"}}
    Path("meta.json").write_text(json.dumps(entries), encoding="utf-8")

    (table,) = folders_config(
        given("--train_data_dir", "pics", "--in_json", "meta.json", "--resolution", "64")
    ).datasets

    assert [source.caption for source in find_sources(table)] == ["one", "two"]


OF_TWO_SIZES = """
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


def make_images(folder: Path) -> None:
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
    make_images(tmp_path)
    config = load(tmp_path, OF_TWO_SIZES, "--prior_loss_weight", "0.5")
    with pytest.raises(DatasetError, match="no b.txt next to it, and no class_tokens in its table"):
        cache_texts(ToyFamily(), config, options())
    (tmp_path / "cat" / "b.txt").write_text("other", encoding="utf-8")

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
    groups = list(group_items(items).values())
    assert len(groups) == 4  # a and r share one
    (shared,) = (group for group in groups if len(group) == 2)
    batch = read_batch(shared, LATENT)
    assert batch.captions == ("photo of one", "animal")
    assert batch.loss_weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("random_crop = true\ncolor_aug = true", "color_aug and random_crop change what is encoded"),
        ("enable_wildcard = true", "its texts cannot be cached"),
    ],
)
def test_what_changes_each_time_is_not_cached(tmp_path: Path, key: str, said: str) -> None:
    make_images(tmp_path)
    subset = f"image_dir = 'FOLDER/cat'\nclass_tokens = ''\n{key}"
    text = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\n{subset}"

    with pytest.raises(DatasetError, match=said):
        cache(load(tmp_path, text))


def test_masks_lie_on_their_pictures(tmp_path: Path) -> None:
    """The left half is learned, in a bucket to which the picture is cropped without resizing."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "pics").mkdir()
    left = Image.new("RGB", (80, 40))
    left.paste((255, 255, 255), (0, 0, 40, 40))
    left.save(tmp_path / "pics" / "a.png")
    left.resize((160, 80)).save(tmp_path / "masks" / "a.png")
    text = (
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nbucket_no_upscale = true\n"
        "bucket_reso_steps = 16\n"
        "[[datasets.subsets]]\nimage_dir = 'FOLDER/pics'\nclass_tokens = 'x'\n"
        "conditioning_data_dir = 'FOLDER/masks'"
    )
    config = load(tmp_path, text, "--masked_loss")
    family = ToyFamily()

    cache_media(family, config, options())
    cache_texts(family, config, options())
    (mask,) = read_batch(list(items_of(config)), LATENT).tensor(LOSS_MASK)

    frames = family.media[0].frames[0, 0, ..., 0]
    assert frames.shape == (32, 80)
    means = torch.nn.functional.avg_pool2d(frames[None].float() / 255, 8)
    np.testing.assert_allclose(mask[0].float(), means[0], atol=0.04)


def test_control_pictures_are_control_media(tmp_path: Path) -> None:
    make_images(tmp_path)
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


def test_noise_levels_are_those_of_all_subsets_of_a_dataset(tmp_path: Path) -> None:
    """Subsets share batches, and a batch has one distribution."""
    text = TWO_SIZES.replace("[general]\n", "[general]\nmin_timestep = 100\n")
    text = text.replace("batch_size = 2\n", "batch_size = 2\nmax_timestep = 500\ndiscrete_flow_shift = 2\n")
    cat, reg, small = load(tmp_path, text).datasets

    assert [
        (table.learning.min_timestep, table.learning.max_timestep, table.learning.discrete_flow_shift)
        for table in (cat, reg)
    ] == [(100, 500, 2.0)] * 2
    assert (small.learning.min_timestep, small.learning.max_timestep, small.learning.discrete_flow_shift) == (
        100,
        None,
        None,
    )
    assert cat.describe()["max_timestep"] == 500
    inside = TWO_SIZES.replace("  keep_tokens = 2\n", "  max_timestep = 500\n")
    assert "subset 1: max_timestep = 500 is for [[datasets]] or [general]; move it there" in faults(
        tmp_path, inside
    )
    empty = text.replace("max_timestep = 500", "max_timestep = 50")
    assert "min_timestep = 100 is not below max_timestep = 50" in faults(tmp_path, empty)


def test_keys_that_act_only_with_others_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = "keep_tokens = 2\nprior_loss_weight = 0.5\ntoken_warmup_min = 1\n"
    text = f'[general]\n{keys}[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "FOLDER"\n'

    load(tmp_path, text)
    (said,) = caplog.messages
    caplog.clear()
    load(tmp_path, f'{text}shuffle_caption = true\n[[datasets.subsets]]\nimage_dir = "x"\nis_reg = true\n')

    needed = "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
    idle = f"keep_tokens (needs {needed}), prior_loss_weight (needs is_reg = true)"
    assert said == f"{tmp_path / 'data.toml'}: without effect: {idle}"
    assert caplog.messages == []


def test_a_folder_that_is_a_subset_itself_is_told_from_one_with_subsets(tmp_path: Path) -> None:
    place = tmp_path / "10_cat"
    place.mkdir()
    make_image(place / "a.png")

    with pytest.raises(DatasetError) as caught:
        folders_config(given("--train_data_dir", place, "--resolution", "64"))

    assert f"{place}: pass its parent folder, {tmp_path}. " in str(caught.value)


def test_only_folders_with_pictures_that_nothing_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = images_in(tmp_path, "10_cat/a.png", "reg/1_cat/b.png", "spare/c.png", "cache/images/10_cat/d.png")
    (train / "output").mkdir()
    words = ("--train_data_dir", train, "--resolution", "512")

    folders_config(given(*words, "--reg_data_dir", train / "reg"))
    assert [record.args[1].name for record in caplog.records] == ["spare"]
    caplog.clear()

    folders_config(given(*words))
    assert [record.args[1].name for record in caplog.records] == ["reg", "spare"]
    assert f"add --reg_data_dir {train / 'reg'}" in caplog.text
