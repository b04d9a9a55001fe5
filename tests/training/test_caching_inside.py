"""Caches made inside the training command: where they are changes nothing of what is learned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.batches.finding import find_items, require_items
from dataset.batches.items import TrainingItem
from dataset.batches.order import split_validation
from dataset.cache.records import CacheChecks
from dataset.cache.store import MemoryStore
from dataset.caching.loop import cache_media, cache_texts
from dataset.table import DatasetConfig
from modules.errors import DatasetError, OptionError
from modules.installation import RUN_CHECKS, RUN_GOES_ON
from modules.options import NoOptions
from protocols.data import Batch
from protocols.rules import CountTokens, NpzFormat, TokenCount
from tests.dataset.toy_family import options as caching_options
from tests.training.toy import ToyTextEncoder, same
from tests.training.toy_images import LATENT, ImageFamily
from training.caching_inside import TensorLocation, plan_tables, prepare_sources
from training.data.feed import BatchSources
from training.data.live import LiveTextEncoders
from training.image_options import ImageTrainerDefaults, read_image_training
from training.learner import FULL_MODEL
from training.options import TrainingOptions
from training.plan import read_config
from training.run import train_network

CPU = torch.device("cpu")
NPZ = dataclasses.replace(LATENT, npz=NpzFormat("_pic", "_pic_te", variable_length=frozenset({"letters"})))
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
TO_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
STEPS = 6


def family() -> ImageFamily:
    torch.manual_seed(7)
    return ImageFamily(latent=NPZ)


def make(folder: Path, subset: str = "", dataset: str = "", count: int = 3) -> Path:
    """Pictures with captions, and a dataset file in the guides' form."""
    (folder / "pictures").mkdir(exist_ok=True, parents=True)
    random = np.random.default_rng(1)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"pictures/{index}.png")
        (folder / f"pictures/{index}.txt").write_text("a, b, c" * (index + 1), encoding="utf-8")
    here = (folder / "pictures").as_posix()
    path = folder / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 32\nbatch_size = 2\n{dataset}\n"
        f'[[datasets.subsets]]\nimage_dir = "{here}"\ncaption_extension = ".txt"\n{subset}\n',
        encoding="utf-8",
    )
    return path


def read(folder: Path, *arguments: object) -> TrainingOptions:
    default = ["--dataset_config", folder / "dataset.toml", "--output_dir", folder / "output"]
    default += ["--output_name", "x", "--seed", 3, "--no_page", "--network_train_unet_only"]
    default += ["--learning_rate", "1e-2", "--max_train_steps", STEPS]
    argv = [str(one) for one in (*default, *arguments)]
    defaults = ImageTrainerDefaults("uniform", 1.0, "raw")
    return read_image_training("", NoOptions, defaults, argv)[0]


def train(folder: Path, *arguments: object) -> dict[str, torch.Tensor]:
    assert train_network(family(), read(folder, *arguments)) == 0
    return load_file(folder / "output" / "x.safetensors")


def config_of(folder: Path, *arguments: object) -> DatasetConfig:
    return read_config(read(folder, *arguments), ImageFamily(), FULL_MODEL)


def cache(config: DatasetConfig) -> None:
    """As the caching scripts do."""
    assert cache_media(family(), config, caching_options()).written == 3
    assert cache_texts(family(), config, caching_options()).written == 3


def prepare(folder: Path, *arguments: object, live: bool = False) -> BatchSources:
    options, made = read(folder, *arguments), family()
    texts = LiveTextEncoders(made.text_encoders()) if live else None
    return prepare_sources(made, read_config(options, ImageFamily(), FULL_MODEL), options.caching, CPU, texts)


def items_of(folder: Path, sources: BatchSources) -> list[TrainingItem]:
    made = family()
    parts = made.cache_tag, made.latent, made.text_keys
    return require_items(find_items(config_of(folder), *parts, sources.stores, sources.tables))


def read_one(sources: BatchSources, item: TrainingItem, number: int = 0) -> Batch:
    return sources.read((item,), CacheChecks(), (3, number))


def batches(folder: Path, sources: BatchSources, number: int = 0) -> list[Batch]:
    return [read_one(sources, item, number) for item in items_of(folder, sources)]


def test_where_caches_are_changes_nothing_of_what_is_learned(tmp_path: Path) -> None:
    make(tmp_path)
    in_memory = train(tmp_path, *CACHED)
    on_disk = train(tmp_path, *TO_DISK)
    again = train(tmp_path, *TO_DISK, "--skip_cache_check")
    cache(config_of(tmp_path))
    own = train(tmp_path)

    assert any(one.any() for name, one in in_memory.items() if name.endswith("lora_up.weight"))
    assert all(same(in_memory, other) for other in (on_disk, again, own))


def test_tables_with_one_npz_file_make_equal_captions(tmp_path: Path) -> None:
    config = make(tmp_path)
    first = config.read_text(encoding="utf-8")
    second = first.replace("resolution = 32", "resolution = 48")
    config.write_text(first + second, encoding="utf-8")
    prepare(tmp_path, *TO_DISK)  # one file for both

    config.write_text(first + second + 'caption_prefix = "two"\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="both share one npz file"):
        prepare(tmp_path, *TO_DISK)


def test_the_command_writes_what_the_script_writes(tmp_path: Path) -> None:
    for name, form in {"inside": "", "script": 'cache_format = "npz"'}.items():
        make(tmp_path / name, form)
    prepare(tmp_path / "inside", *TO_DISK)
    cache(config_of(tmp_path / "script"))

    inside, script = (tmp_path / name / "pictures" for name in ("inside", "script"))
    names = sorted(path.name for path in inside.glob("*.npz"))
    assert len(names) == 6
    for name in names:
        with np.load(inside / name) as one, np.load(script / name) as other:
            assert one.files == other.files
            # times of the two copies of a picture differ
            told = [key for key in one.files if not key.startswith("reelsmith")]
            assert all(np.array_equal(one[key], other[key]) for key in told)


@pytest.mark.parametrize("live", [False, True])
def test_a_removed_picture_is_not_trained(tmp_path: Path, live: bool) -> None:
    make(tmp_path)
    prepare(tmp_path, *TO_DISK)
    (tmp_path / "pictures/1.png").unlink()

    found = batches(tmp_path, prepare(tmp_path, *TO_DISK, live=live))

    assert [one.keys for one in found] == [("0_0048x0040_pic",), ("2_0048x0040_pic",)]


def test_without_options_latents_are_held_in_memory_and_texts_not(tmp_path: Path) -> None:
    path = make(tmp_path)
    (plan,) = plan_tables(family(), config_of(tmp_path), read(tmp_path).caching, ("letters",))

    assert (plan.latents, plan.texts) == (TensorLocation.MEMORY, TensorLocation.LIVE)
    assert not list((path.parent / "pictures").glob("*.npz"))


@pytest.mark.parametrize(
    ("subset", "argument"),
    [("random_crop = true", "--cache_latents"), ("color_aug = true", "--cache_latents_to_disk")],
)
def test_what_changes_each_time_is_not_cached(tmp_path: Path, subset: str, argument: str) -> None:
    make(tmp_path, subset)

    with pytest.raises(DatasetError, match="their latents cannot be cached"):
        train(tmp_path, argument)


def test_a_model_without_npz_files_refuses_them(tmp_path: Path) -> None:
    make(tmp_path)
    options = read(tmp_path, "--cache_latents_to_disk")

    with pytest.raises(OptionError, match="--cache_latents_to_disk: this model has no npz files"):
        plan_tables(ImageFamily(), read_config(options, ImageFamily(), FULL_MODEL), options.caching)


def test_live_pictures_are_a_function_of_seed_and_micro_batch(tmp_path: Path) -> None:
    make(tmp_path, "random_crop = true\ncolor_aug = true\nflip_aug = true")
    sources = prepare(tmp_path, "--cache_text_encoder_outputs")

    first, again, other = (batches(tmp_path, sources, number) for number in (0, 0, 1))

    assert sources.must_stay_in_process
    for one, two, three in zip(first, again, other, strict=True):
        assert one.tensor("latents").shape == (1, 3, 1, 4, 4)
        assert torch.equal(one.tensor("latents"), two.tensor("latents"))
        assert not torch.equal(one.tensor("latents"), three.tensor("latents"))
        assert "letters" in one.tensors


def test_live_pictures_are_trained_and_a_run_is_repeatable(tmp_path: Path) -> None:
    make(tmp_path, "random_crop = true")
    first = train(tmp_path, "--cache_text_encoder_outputs")
    again = train(tmp_path, "--cache_text_encoder_outputs")
    make(tmp_path)
    plain = train(tmp_path, "--cache_text_encoder_outputs")

    assert same(first, again)
    assert not same(first, plain)


def test_validated_pictures_are_not_changed(tmp_path: Path) -> None:
    changing = "random_crop = true\nnum_repeats = 3\ncaption_dropout_rate = 0.5"
    make(tmp_path, changing, "validation_split = 0.4", 5)
    sources = prepare(tmp_path, "--cache_text_encoder_outputs")

    training, validation = split_validation(items_of(tmp_path, sources), 0.0, 3)

    assert len(training) == 3
    assert sorted(item.source_stem for item in [*training, *validation]) == list("01234")
    table = validation[0].table
    assert (table.learning.num_repeats, table.captions.caption_dropout_rate) == (1, 0.0)
    assert not table.buckets.augmentation.varying_keys
    one, two = (read_one(sources, validation[0], number) for number in (1, 2))
    assert torch.equal(one.tensor("latents"), two.tensor("latents"))


def test_texts_that_are_not_cached_are_left_out_of_batches(tmp_path: Path) -> None:
    make(tmp_path, "shuffle_caption = true")

    first = batches(tmp_path, prepare(tmp_path, "--cache_latents", live=True))[0]

    assert set(first.tensors) == {"latents", "alpha_mask"}
    assert first.captions == ("a, b, c",)


def test_memory_stores_hold_copies() -> None:
    store, full = MemoryStore(Path("cache")), torch.zeros(4, 4)
    store.write("x_0032x0032_pic.safetensors", {"latents_1x1x4_float32": full[0]}, {})
    full.fill_(1)

    assert store.read("x_0032x0032_pic.safetensors").tensors["latents"].tolist() == [0, 0, 0, 0]
    assert store.size_bytes == 16


def test_a_check_says_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "", "validation_split = 0.4", 5)

    assert train_network(family(), read(tmp_path, "--check", *CACHED)) == 0

    said = capsys.readouterr().out
    assert "latents are in host memory, embeddings of captions in host memory" in said
    assert "32x32" in said
    assert "Training on it, without 2 items for validation: 2 batches an epoch" in said
    assert not list(tmp_path.glob("**/*.npz"))


def test_a_plan_needs_caches_on_disk(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(OptionError, match="--plan rehearses a batch from caches on disk"):
        train_network(family(), read(tmp_path, "--plan", *CACHED))


def test_a_schedule_is_compared_with_the_steps_of_the_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    long = [*CACHED, "--lr_scheduler", "warmup_stable_decay", "--lr_warmup_steps", 9, "--lr_decay_steps", 9]
    with pytest.raises(OptionError, match="exceed the 4 steps of the run"):
        train_network(family(), read(tmp_path, "--max_train_epochs", 2, *long))
    monkeypatch.setenv(RUN_GOES_ON, RUN_CHECKS)
    assert train_network(family(), read(tmp_path, "--max_train_epochs", 2, *long)) == 0
    with pytest.raises(OptionError, match=f"exceed the {STEPS} steps of the run"):
        train_network(family(), read(tmp_path, *long))


class OneCharacter(ToyTextEncoder):
    """Reads one letter of a text."""

    def token_counter(self) -> CountTokens:
        return lambda text: TokenCount(text, len(text), 1, 1)


@pytest.mark.parametrize("keys", ["", "shuffle_caption = true", "color_aug = true"])
def test_texts_that_are_encoded_while_training_have_the_remarks_of_caching(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: str
) -> None:
    make(tmp_path, keys)
    (tmp_path / "pictures/1.txt").write_text("a {b|c}", encoding="utf-8")
    options = read(tmp_path)
    config = read_config(options, ImageFamily(), FULL_MODEL)

    prepare_sources(family(), config, options.caching, CPU, LiveTextEncoders([OneCharacter()]))

    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    cut = [text for text in warnings if text.startswith("3 of 3 captions are longer than letters reads")]
    assert len(cut) == 1
    assert "0.txt: 7 tokens, letters reads 1; lost: , b, c" in cut[0]
    assert sum("{a|b}, which is learned as text" in text for text in warnings) == 1


def test_pictures_that_are_encoded_while_training_have_the_remarks_of_caching(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "random_crop = true")
    Image.new("RGBA", (48, 40), (200, 20, 20, 90)).save(tmp_path / "pictures/1.png")
    options = read(tmp_path)
    config = read_config(options, ImageFamily(), FULL_MODEL)
    made = dataclasses.replace(family(), latent=dataclasses.replace(NPZ, masks_latents=False))

    prepare_sources(made, config, options.caching, CPU)

    assert sum("1 is transparent and filled with white" in text for text in caplog.messages) == 1
