"""Caches in npz files, as image trainers of the known family lay them out."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batches.finding import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.converting import convert_caches
from dataset.cache.store import Stores, npz_names
from dataset.cache_files import EMPTY
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, load_dataset_config
from dataset.forms import npz_files
from dataset.forms.npz_files import format_array, read_arrays, read_members, write_members
from dataset.options import ConvertCacheOptions
from dataset.table import Augmentation
from modules.errors import CacheError, DatasetError, OptionError
from protocols.data import LOSS_MASK, Batch, CacheEntry, LatentSpec, MediaBatch, MediaEncoders
from protocols.rules import NpzFormat
from tests.dataset.cache.killing import needs_fork, run_to_step
from tests.dataset.making import make_table
from tests.dataset.toy_family import LATENT, ToyFamily, options

FORMAT = NpzFormat(
    "_toy",
    "_toy_te",
    constants={"applies_mask": True},
    zeros={"places": ("t5", 3), "pooled": ("", 7)},
    variable_length=frozenset({"t5"}),
)
LATENTS, TEXTS = "pic 0_0040x0040_toy.npz", "pic 0_toy_te.npz"


@dataclasses.dataclass
class NpzFamily(ToyFamily):
    """Latents are bfloat16 and depend on where a pixel is, so that sides and sizes differ."""

    latent: LatentSpec = dataclasses.replace(LATENT, npz=FORMAT, in_sections=False)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        self.seen.append(media.keys)
        pixels = media.frames.float().mean(-1) / 255  # B F H W
        # no operation that starts threads: a test forks this process
        small = pixels.unflatten(3, (-1, 8)).mean(4).unflatten(2, (-1, 8)).mean(3)
        latents = torch.stack([small, -small], 1).bfloat16()
        return [[CacheEntry({"latents": one})] for one in latents]


def make_images(folder: Path, count: int = 3, size: tuple[int, int] = (40, 40)) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        path = folder / f"pic {number}.png"
        path.with_suffix(".txt").write_text("picture " * (number + 1), encoding="utf-8")
        generator = np.random.default_rng(number)
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return folder


def make_config(folder: Path, form: str = "npz", **changes: Any) -> DatasetConfig:
    """One table of the pictures; its npz files are beside them, its others in `cache`."""
    return of_tables(folder, [{"cache_format": form, **changes}])


def of_tables(folder: Path, tables: Sequence[Mapping[str, Any]]) -> DatasetConfig:
    default = {"resolution": (32, 32), "caption_extension": ".txt", "batch_size": 2}
    found = []
    for index, changes in enumerate(tables):
        place = folder if changes.get("cache_format") == "npz" else folder / "cache"
        fields = {"cache_directory": place, "index": index, **default, **changes}
        found.append(make_table(folder, "image_directory", **fields))
    return DatasetConfig(folder / "data.toml", tuple(found))


def cache(config: DatasetConfig, family: ToyFamily | None = None) -> tuple[int, int]:
    """Cache all; how many latents and texts were written."""
    family = family or NpzFamily()
    return cache_media(family, config, options()).written, cache_texts(family, config, options()).written


def read_all(config: DatasetConfig, **more: Any) -> list[Batch]:
    """Each item alone, as training reads it."""
    family = NpzFamily()
    stores = Stores(npz_names(family))
    found = find_items(config, family.cache_tag, family.latent, family.text_keys, stores)
    return [read_batch([item], family.latent, stores=stores, **more) for item in require_items(found)]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    found, expected = ([one.tensors for one in batches] for batches in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "pictures")


def test_plain_numpy_reads_what_is_written(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "pictures", size=(100, 50))
    config = make_config(folder, caption_dropout_rate=0.5)
    assert cache(config) == (3, 4)
    assert len(read_all(config, captions=[EMPTY])) == 3

    with np.load(folder / "pic 0_0100x0050_toy.npz", allow_pickle=False) as file:
        arrays = {name: array for name, array in file.items() if not name.startswith("reelsmith")}
    latents = arrays.pop("latents_4x4")
    assert (latents.shape, latents.dtype) == ((2, 4, 4), np.float32)
    # the crop is where the whole picture would lie in the bucket
    expected = {"original_size_4x4": [100, 50], "crop_ltrb_4x4": [0, 8, 32, 24]}
    assert {name: array.tolist() for name, array in arrays.items()} == expected
    with np.load(folder / TEXTS, allow_pickle=False) as texts:
        assert texts["t5"].shape == (1, 4)
        assert texts["places"].tolist() == [[0.0, 0.0, 0.0]]
        assert texts["pooled"].tolist() == [0.0] * 7
        assert texts["applies_mask"].item() is True


def test_training_reads_the_same_from_npz_and_from_files(folder: Path) -> None:
    for form in ("npz", "files"):
        cache(make_config(folder, form))

    ours, theirs = (read_all(make_config(folder, form)) for form in ("npz", "files"))

    assert len(ours) == 3
    assert_same(ours, theirs)
    assert [one.captions for one in ours] == [one.captions for one in theirs]


def test_what_numpy_wrote_is_taken_as_it_is(folder: Path) -> None:
    for number in range(3):
        stem = folder / f"pic {number}"
        latents, size = np.full((2, 4, 4), number, np.float32), np.array([40, 40])
        np.savez(f"{stem}_0040x0040_toy.npz", latents_4x4=latents, original_size_4x4=size)
        text = np.full((number + 1, 4), number, np.float16)
        np.savez_compressed(f"{stem}_toy_te.npz", t5=text, applies_mask=True, others=np.zeros(3))

    family = NpzFamily()
    assert cache(make_config(folder, caption_prefix="a"), family) == (0, 0)

    assert family.seen == []
    for number, batch in enumerate(read_all(make_config(folder))):
        assert batch.tensor("latents").shape == (1, 2, 1, 4, 4)
        assert batch.tensor("latents").unique().tolist() == [number]
        (text,) = batch.tensors["t5"]
        assert (text.dtype, tuple(text.shape)) == (torch.float16, (number + 1, 4))


@pytest.mark.parametrize(
    ("name", "arrays", "says"),
    [
        (LATENTS, {"latents_8x8": np.zeros((2, 8, 8), np.float32)}, "has no latents_4x4, but those of _8x8"),
        (
            LATENTS,
            {"latents_4x4": np.zeros((3, 4, 4), np.float32)},
            r"of shape \(3, 4, 4\), but this model's",
        ),
        (LATENTS, {"latents_4x4": np.zeros((2, 4, 4), np.int64)}, "int64"),
        (LATENTS, {"latents_4x4": np.array([{}], object)}, "Object arrays"),
        (
            TEXTS,
            {"t5": np.zeros((1, 4), np.float32), "applies_mask": False},
            "made with applies_mask False, this training has True",
        ),
    ],
)
def test_what_does_not_fit_is_made_again(folder: Path, name: str, arrays: dict[str, Any], says: str) -> None:
    cache(make_config(folder))
    np.savez(folder / name, **arrays)

    with pytest.raises(CacheError, match=says):
        read_all(make_config(folder))
    assert cache(make_config(folder)) == ((1, 0) if name == LATENTS else (0, 1))
    read_all(make_config(folder))


def test_resolutions_share_a_file_and_keep_each_other(folder: Path) -> None:
    both = of_tables(folder, [{"cache_format": "npz", "resolution": size} for size in ((32, 32), (16, 16))])

    assert cache(both) == (6, 3)

    with np.load(folder / LATENTS) as file:
        assert {"latents_4x4", "latents_2x2"} <= set(file.files)
    assert cache(both) == (0, 0)
    assert [one.tensor("latents").shape[-1] for one in read_all(both)] == [4, 4, 4, 2, 2, 2]


@needs_fork
def test_a_kill_while_a_resolution_is_added_loses_nothing(folder: Path, tmp_path: Path) -> None:
    small, large = (make_config(folder, resolution=size) for size in ((16, 16), (32, 32)))
    cache(small)
    before = read_all(small)
    start = tmp_path / "start"
    shutil.copytree(folder, start)
    for step in range(1, 30):
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        is_done = run_to_step(lambda: cache_media(NpzFamily(), large, options()), step)
        assert_same(before, read_all(small))
        if is_done:
            break
        cache_media(NpzFamily(), large, options())
        assert len(read_all(large)) == 3
    assert step > 3


def test_arrays_that_another_program_replaced_count_as_its_own(folder: Path) -> None:
    cache(make_config(folder))
    with np.load(folder / LATENTS) as file:
        arrays = dict(file)
    arrays["latents_4x4"] = np.full((2, 4, 4), 7, np.float32)
    np.savez(folder / LATENTS, **arrays)

    assert cache(make_config(folder)) == (0, 0)
    assert read_all(make_config(folder))[0].tensor("latents").unique().tolist() == [7]


def test_damaged_values_are_found_when_they_are_read(folder: Path) -> None:
    config = make_config(folder, resolution=(512, 512))
    cache(config)
    data = bytearray((folder / LATENTS).read_bytes())
    data[data.index(b"latents_64x64.npy") + 20_000] ^= 1
    (folder / LATENTS).write_bytes(bytes(data))

    with pytest.raises(CacheError, match=r"(?s)damaged, cannot be read as npz.*remove damaged npz files"):
        read_all(config)
    assert cache(config) == (1, 0)
    read_all(config)


def test_nothing_is_removed_as_stale(folder: Path) -> None:
    cache(make_config(folder))
    before = set(folder.glob("*.npz"))
    for path in folder.glob("pic 0.*"):
        path.unlink()

    cache(make_config(folder))

    assert set(folder.glob("*.npz")) == before


def test_both_sides_are_cached_and_chosen_between(folder: Path) -> None:
    mirrored = {"augmentation": Augmentation(flip=True)}
    cache(make_config(folder))
    assert cache(make_config(folder, **mirrored)) == (3, 0)  # the other side was missing
    assert cache(make_config(folder)) == (0, 0)  # one more does no harm

    with np.load(folder / LATENTS) as file:
        assert np.array_equal(file["latents_flipped_4x4"], file["latents_4x4"][..., ::-1])
    for form in ("npz", "files"):
        cache(make_config(folder, form, **mirrored))
        config = make_config(folder, form, **mirrored)
        for one, other in zip(read_all(config, flips=[False]), read_all(config, flips=[True]), strict=True):
            assert one.tensors.keys() == other.tensors.keys() == {"latents", "t5"}
            assert torch.equal(one.tensor("latents").flip(-1), other.tensor("latents"))


def test_foreign_latents_need_the_other_side_and_the_mask(folder: Path) -> None:
    np.savez(folder / LATENTS, latents_4x4=np.zeros((2, 4, 4), np.float32))
    cache_texts(NpzFamily(), make_config(folder), options())

    with pytest.raises(CacheError, match="it has no latents_flipped of 4x4, which flip_aug needs"):
        read_all(make_config(folder, augmentation=Augmentation(flip=True)))
    assert cache(make_config(folder, alpha_mask=True)) == (3, 0)


def test_opaque_pictures_have_a_mask_of_ones_for_other_programs(folder: Path) -> None:
    config = make_config(folder, alpha_mask=True)
    cache(config)

    assert LOSS_MASK not in read_all(config)[0].tensors  # training is as without it
    with np.load(folder / LATENTS) as file:
        assert set(file["alpha_mask_4x4"].flat) == {1.0}
        arrays = {name: file[name] for name in file.files if name != "alpha_mask_4x4"}
    np.savez(folder / LATENTS, **arrays)  # as earlier versions wrote it
    assert cache(config) == (0, 0)


def test_masks_are_of_pixels_and_come_back_bit_for_bit(folder: Path) -> None:
    for number in range(3):
        pixels = torch.randint(0, 256, (40, 40, 4), dtype=torch.uint8).numpy()
        Image.fromarray(pixels, "RGBA").save(folder / f"pic {number}.png")
    for form in ("npz", "files"):
        cache(make_config(folder, form, alpha_mask=True))

    ours, theirs = (read_all(make_config(folder, form, alpha_mask=True)) for form in ("npz", "files"))

    assert_same(ours, theirs)
    for path in folder.glob("*0x0040_toy.npz"):
        with np.load(path) as file:
            foreign = {name: array for name, array in file.items() if not name.startswith("reelsmith")}
        assert foreign["alpha_mask_4x4"].shape == (32, 32)
        np.savez(path, **foreign)
    read = read_all(make_config(folder, alpha_mask=True))[0]
    assert torch.equal(read.tensor(LOSS_MASK), theirs[0].tensor(LOSS_MASK))
    assert LOSS_MASK not in read_all(make_config(folder))[0].tensors  # nobody asks for it


def test_trusted_files_are_not_opened(folder: Path) -> None:
    cache(make_config(folder))

    for name in (LATENTS, TEXTS):
        (folder / name).write_bytes(b"damaged")
    (folder / "pic 1_0040x0040_toy.npz").unlink()
    family = NpzFamily()
    stores = Stores(npz_names(family), trusts_shared_caches=True)

    assert cache_media(family, make_config(folder), options(), stores).written == 1
    assert cache_texts(family, make_config(folder), options(), stores).written == 0
    assert cache(make_config(folder)) == (1, 1)


def test_what_npz_files_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r'cache_format = "npz": this model has no caches in npz files'):
        cache_media(ToyFamily(), make_config(folder), options())
    tables = [{"cache_format": "npz", "caption_prefix": text} for text in ("one", "two")]
    with pytest.raises(DatasetError, match="both share one npz file"):
        cache_texts(NpzFamily(), of_tables(folder, tables), options())
    wanted = ConvertCacheOptions.from_defaults(dataset_config=folder / "data.toml", to="files")
    with pytest.raises(OptionError, match="only a caching script knows which of the sizes"):
        convert_caches(wanted, make_config(folder))
    config = tmp_path / "data.toml"
    config.write_text("[[datasets]]\nvideo_directory = 'a'\ncache_format = 'npz'\n", encoding="utf-8")
    with pytest.raises(DatasetError, match='cache_format = "npz" is for image tables'):
        load_dataset_config(config)


def test_a_hostile_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    header = format_array(np.zeros(4, np.float32))
    for data, says in (
        (header[:-1], "got 15"),
        (header.replace(b"(4,)", b"(9,)"), "got 16"),
        (b"x" + header, "magic"),
        (header + bytes(4), "longer"),
        (header.replace(b"<f4", b"|O8"), "(?i)object"),
    ):
        write_members(path, {"latents": data})
        with pytest.raises(CacheError, match=says):
            read_arrays(path, {"latents"}.__contains__)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("latents", "other"):
            file.writestr(f"{name}.npy", bytes(1 << 18))
    monkeypatch.setattr(npz_files, "MAX_ARRAY_BYTES", 3 << 17)
    for read in (lambda: read_arrays(path, {"latents"}.__contains__), lambda: read_members(path)):
        with pytest.raises(CacheError, match="its arrays have 524,288 bytes"):
            read()


def test_pictures_of_a_list_have_their_files_beside_them(folder: Path, tmp_path: Path) -> None:
    other, listed = make_images(tmp_path / "other", 1), tmp_path / "list.json"
    content = {str(place / "pic 0.png"): {"caption": "a picture"} for place in (folder, other)}
    listed.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "lists").mkdir()
    of_list = {"directory": None, "metadata_file": listed}
    config = make_config(folder, cache_directory=tmp_path / "lists", **of_list)

    assert cache(config) == (2, 2)

    for place in (folder, other):
        assert {path.name for path in place.glob("*.npz")} == {LATENTS, TEXTS}
    assert cache(config) == (0, 0)
    assert len(read_all(config)) == 2
    del content[str(folder / "pic 0.png")]  # the other one has its name now
    listed.write_text(json.dumps(content), encoding="utf-8")
    assert len(read_all(make_config(folder, **of_list))) == 1
