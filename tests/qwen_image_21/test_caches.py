"""Caches of Qwen-Image-2.1: transparent pictures, names and hashes of the known tuner, refusals."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataset.cache.records import record_metadata, text_records
from dataset.cache_files import read_entry
from modules.errors import CacheError
from protocols.data import Batch, CacheEntry, CacheOrigin, MediaBatch
from qwen_image_21.caches import (
    HASHES,
    SEEN_HASHES,
    SIZES,
    SLOTS,
    add_hashes,
    check_references,
    check_states,
    hash_images,
)
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.foreign_caches import train_with_and_without_records
from tests.parity.running import assert_equal
from tests.qwen_image_21.test_vae import NEAR, statistics, their_vae
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.qwen_image_21_vae import vae_config


def random_image(path: Path, width: int, height: int, mode: str = "RGBA", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


def hash_of(picture: Image.Image) -> list[int]:
    """The known tuner's hash of a resized picture."""
    content = f"{picture.width}x{picture.height}:".encode() + picture.convert("RGBA").tobytes()
    return list(hashlib.sha256(content).digest())


def latents_of(picture: Image.Image) -> Tensor:
    """Diffusers' normalized means of a picture, Z 1 h w."""
    pixels = torch.from_numpy(np.array(picture.convert("RGBA"))).movedim(-1, 0)[None, :, None]
    with torch.no_grad():
        means = their_vae(vae_config()).encode(pixels / 127.5 - 1).latent_dist.mode()
    mean, deviation = statistics(vae_config())
    return ((means - mean) / deviation)[0]


def project(folder: Path) -> TinyFamily:
    """Pictures with two references each; the first picture is transparent."""
    family = family_called("qwen_image_21 edit")
    family.prepare(folder)
    random_image(folder / "clips" / "picture 0.png", 32, 32)
    return family


def test_hashes_are_those_of_the_known_tuner_also_without_alpha(tmp_path: Path) -> None:
    clear = random_image(tmp_path / "a.png", 5, 3)
    plain = random_image(tmp_path / "b.png", 4, 6, "RGB")

    hashes = hash_images([torch.from_numpy(np.array(image)) for image in (clear, plain)])

    assert hashes.dtype == torch.uint8
    assert hashes.tolist() == [hash_of(clear), hash_of(plain)]
    assert hash_images([]).shape == (0, 32)


def test_each_picture_of_a_batch_gets_the_hashes_of_its_own_references() -> None:
    generator = torch.Generator().manual_seed(1)
    control = torch.randint(0, 256, (2, 1, 8, 6, 4), generator=generator, dtype=torch.uint8)
    media = MediaBatch(torch.zeros(2, 1, 8, 8, 4), ("a", "b"), ((0, 1), (0, 1)), control=(control,))

    entries = add_hashes([[CacheEntry({"latents": torch.zeros(1)})] for _ in range(2)], media)

    for index, (entry,) in enumerate(entries):
        assert torch.equal(entry.tensors[HASHES], hash_images([control[index, 0]]))
        assert entry.variable == {HASHES}


def edit_batch(count: int = 2) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of one item with `count` references, as its two caches have them."""
    generator = torch.Generator().manual_seed(2)
    hashes = torch.randint(0, 256, (count, 32), generator=generator, dtype=torch.uint8)
    references = {f"latents_control_{number}": torch.zeros(1, 8, 1, 2, 4) for number in range(count)}
    tensors: dict[str, Tensor | list[Tensor]] = {
        SLOTS: [torch.arange(count)],
        SIZES: [torch.tensor([[2, 4]] * count, dtype=torch.int64).view(-1, 2)],
        HASHES: [hashes],
        SEEN_HASHES: [hashes.clone()],
    }
    return Batch(tensors, ("edit",), ("picture",)), references


def changed(batch: Batch, name: str, change: Callable[[Tensor], Tensor] | None) -> Batch:
    tensors = dict(batch.tensors)
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = [change(value[0])]
    return replace(batch, tensors=tensors)


def test_caches_that_belong_together_pass() -> None:
    for count in (0, 1, 2):
        check_references(*edit_batch(count))
    batch, references = edit_batch()
    stacked = {name: torch.stack(list(value)) for name, value in batch.tensors.items()}
    check_references(replace(batch, tensors=stacked), references)  # encoded at each step
    without = {SLOTS: batch.tensors[SLOTS][:0] or [torch.arange(0)]}
    check_references(replace(batch, tensors=without), {})  # a text-to-image cache of before the hashes


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SLOTS, lambda slots: slots[:1], "encoded with 1 reference images, and its latents have 2"),
        (SIZES, lambda sizes: sizes.flip(1), r"references of \[\(4, 2\), \(4, 2\)\] latent pixels"),
        (
            SEEN_HASHES,
            lambda hashes: hashes.flip(0),
            r"different reference images than its latents \(number 1, 2",
        ),
        (
            HASHES,
            lambda hashes: hashes ^ torch.tensor([[0], [1]], dtype=torch.uint8),
            r"\(number 2: different pix",
        ),
        (SEEN_HASHES, None, "no vlm_reference_hashes.*cache_text_encoder_outputs.py"),
        (HASHES, None, "no reference_hashes.*qwen_image_21_cache_latents.py"),
        (HASHES, lambda hashes: hashes[:, :16], "reference_hashes in its cache is not 2 hashes of 32 bytes"),
    ],
)
def test_a_text_that_saw_other_references_is_refused(
    name: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    batch, references = edit_batch()

    with pytest.raises(CacheError, match=f"picture: .*{message}"):
        check_references(changed(batch, name, change), references)


def test_states_behind_the_norm_are_refused_with_the_version_that_made_them(tmp_path: Path) -> None:
    path = tmp_path / "a_qi21_te.safetensors"
    right = {"vl": "0", "vl_state": "-1, pre_norm", "vl_transformers": "5"}
    check_states(CacheOrigin(path, "vl", right), "vl")
    check_states(CacheOrigin(path, "vl", {}), "vl")  # of another program
    check_states(CacheOrigin(path, "latents", {"vae": "0"}), "vl")

    for state, words in (("-1", "read by transformers 4 after the final norm"), (None, "pre_norm")):
        made_by = {"vl": "0", "vl_transformers": "4"} | ({} if state is None else {"vl_state": state})
        with pytest.raises(CacheError, match=f"a_qi21_te.*{words}"):
            check_states(CacheOrigin(path, "vl", made_by), "vl")


def test_transparent_pictures_are_cached_as_diffusers_encodes_them(tmp_path: Path) -> None:
    """Target and references, by the commands; names and hashes are those of the known tuner."""
    family = project(tmp_path)
    target = Image.open(tmp_path / "clips" / "picture 0.png")
    names = [tmp_path / "control" / f"picture 0_{number}.png" for number in range(2)]
    references = [random_image(names[0], 64, 32), random_image(names[1], 32, 96, "RGB")]
    with (tmp_path / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("no_resize_control = true\n")

    succeed_here(*family.cache_latents, "--vae_dtype", "float32", folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    (path,) = (tmp_path / "cache").glob("picture 0_*_qi21.safetensors")
    tensors = load_file(path)
    assert path.name == "picture 0_0032x0032_qi21.safetensors"
    assert set(tensors) == {
        "latents_1x2x2_float32",
        "latents_control_0_1x2x4_float32",
        "latents_control_1_1x6x2_float32",
        "varlen_reference_hashes_uint8",
    }
    assert_equal(tensors["latents_1x2x2_float32"], latents_of(target), "target", NEAR)
    assert_equal(tensors["latents_control_0_1x2x4_float32"], latents_of(references[0]), "first", NEAR)
    assert_equal(tensors["latents_control_1_1x6x2_float32"], latents_of(references[1]), "second", NEAR)
    assert tensors["varlen_reference_hashes_uint8"].tolist() == [hash_of(image) for image in references]

    texts = load_file(tmp_path / "cache" / "picture 0_qi21_te.safetensors")
    assert texts["varlen_vlm_reference_hashes_uint8"].tolist() == [hash_of(image) for image in references]
    assert texts["varlen_reference_grids_int64"].tolist() == [[2, 4], [6, 2]]
    assert texts["varlen_image_slots_int64"].shape == (2,)
    with safe_open(tmp_path / "cache" / "picture 0_qi21_te.safetensors", "pt") as file:
        record = file.metadata()["reelsmith_record"]
    assert '"vl_state": "-1, pre_norm"' in record
    assert '"vl_transformers"' in record


@pytest.mark.slow
def test_caches_of_the_known_tuner_are_trained_on_as_they_are(tmp_path: Path) -> None:
    shapes = train_with_and_without_records(project(tmp_path), tmp_path, "qwen_image_21")

    assert shapes["picture 0_qi21_te.safetensors"]["varlen_vlm_reference_hashes_uint8"] == (2, 32)


def test_training_refuses_texts_of_other_references_and_of_normed_states(tmp_path: Path) -> None:
    family = project(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    train = (*family.train, "--max_train_steps", "1", "--output_dir", "out", "--output_name", "lora")
    paths = sorted((tmp_path / "cache").glob("*_qi21_te.safetensors"))
    originals = {path: path.read_bytes() for path in paths}

    for path in paths:  # as another program leaves it, with hashes of other pictures
        tensors = load_file(path)
        tensors["varlen_vlm_reference_hashes_uint8"] = tensors["varlen_vlm_reference_hashes_uint8"].flip(1)
        save_file(tensors, path, {"architecture": "qwen_image_21"})
    code, written = run_here(*train, folder=tmp_path)
    assert_one_message(code, written, "different reference images than its latents", "Cache again with")

    for path in paths:
        path.write_bytes(originals[path])
        entry = read_entry(path)
        records = text_records(entry)
        normed = {
            name: replace(record, encoder={**record.encoder, "vl_state": "-1"})
            for name, record in records.items()
        }
        save_file(load_file(path), path, {**entry.metadata, **record_metadata(normed)})
    code, written = run_here(*train, folder=tmp_path)
    assert_one_message(code, written, "after the final norm", "qwen_image_21_cache_text_encoder_outputs.py")
