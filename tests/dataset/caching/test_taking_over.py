"""Latents that another model has cached: taken over if they are the same, else a sentence says why not."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_2.vae import EPS, load_vae
from protocols.families import FAMILIES
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import TinyFamily, family_called
from tests.tiny.project import write_plain_images

MOSS, FLUX_2, FLUX_3 = (family_called(name) for name in ("moss_image", "flux_2", "flux_3"))
TAGS = {"moss_image": "moss", "flux_2": "f2k4b", "flux_3": "f3"}
TAKEN = "are reused, and nothing is encoded for them"
PAIRS = [(FLUX_2, MOSS), (MOSS, FLUX_2), (FLUX_3, MOSS), (MOSS, FLUX_3)]


def prepare(folder: Path, family: TinyFamily, vae: bytes | None = None) -> Path:
    """Write the model of a family, and pictures without references; return the file of the autoencoder.

    vae: content of that file, of another model.
    """
    family.prepare(folder)
    write_plain_images(folder, side=48)
    path = folder / "model" / "vae.safetensors"
    if vae is not None:
        path.write_bytes(vae)
    return path


def list_latents(folder: Path, family: TinyFamily) -> list[Path]:
    return sorted(path for path in folder.rglob(f"*_{TAGS[family.name]}.safetensors"))


def read_info(path: Path) -> Mapping[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda family: family.name)
def test_latents_of_an_equal_autoencoder_are_taken_over_to_the_bit(
    tmp_path: Path, first: TinyFamily, second: TinyFamily
) -> None:
    vae = prepare(tmp_path, first).read_bytes()
    succeed_here(*first.cache_latents, folder=tmp_path)
    prepare(tmp_path, second, vae)
    theirs = list_latents(tmp_path, first)

    said = succeed_here(*second.cache_latents, folder=tmp_path)

    ours = list_latents(tmp_path, second)
    assert len(ours) == len(theirs) > 0
    assert said.count(TAKEN) == 1
    assert f"{len(ours)} images: the latents that {read_info(theirs[0])['architecture']} has cached" in said
    assert "VAE:" not in said  # it was not loaded
    taken = {path.name: load_file(path) for path in ours}
    maker = read_info(ours[0])["architecture"]
    for path in (*ours, *theirs):
        path.unlink()
    succeed_here(*second.cache_latents, folder=tmp_path)
    for path in ours:
        encoded = load_file(path)
        assert encoded.keys() == taken[path.name].keys()
        assert all(torch.equal(tensor, taken[path.name][name]) for name, tensor in encoded.items())
    assert read_info(ours[0])["architecture"] == maker


@pytest.mark.parametrize(
    ("more", "why"),
    [(("--vae_dtype", "bfloat16"), "vae_dtype was float32, is now bfloat16"), ((), "vae was ")],
)
def test_latents_of_another_file_or_dtype_are_encoded_anew_and_a_sentence_says_why(
    tmp_path: Path, more: tuple[str, ...], why: str
) -> None:
    vae = prepare(tmp_path, FLUX_2).read_bytes()
    succeed_here(*FLUX_2.cache_latents, folder=tmp_path)
    prepare(tmp_path, MOSS, vae if more else None)

    said = succeed_here(*MOSS.cache_latents, *more, folder=tmp_path)

    (line,) = [line for line in said.splitlines() if "differ from those that this command makes" in line]
    assert "the latents that flux_2_klein_4b has cached" in line
    assert why in line
    assert "pass the file and the options of the autoencoder that made them" in line
    assert TAKEN not in said
    assert len(list_latents(tmp_path, MOSS)) == len(list_latents(tmp_path, FLUX_2))


def test_damaged_and_changed_latents_of_another_model_are_not_taken_over(tmp_path: Path) -> None:
    vae = prepare(tmp_path, FLUX_2).read_bytes()
    succeed_here(*FLUX_2.cache_latents, folder=tmp_path)
    prepare(tmp_path, MOSS, vae)
    damaged, *_ = list_latents(tmp_path, FLUX_2)
    tensors = {name: tensor + 1 for name, tensor in load_file(damaged).items()}
    save_file(tensors, damaged, dict(read_info(damaged)))

    said = succeed_here(*MOSS.cache_latents, folder=tmp_path)

    assert "do not match their checksum" in said
    assert TAKEN in said
    made = load_file(damaged.with_name(damaged.name.replace("f2k4b", "moss")))
    assert not any(torch.equal(tensor, tensors[name]) for name, tensor in made.items())


def test_references_are_cached_in_sizes_of_their_model(tmp_path: Path) -> None:
    """FLUX.2 reduces large ones alone, MOSS-Image gives all the area of the picture."""
    edits = family_called("moss_image edit")
    FLUX_2.prepare(tmp_path)
    vae = (tmp_path / "model" / "vae.safetensors").read_bytes()
    succeed_here(*FLUX_2.cache_latents, folder=tmp_path)
    edits.prepare(tmp_path)
    (tmp_path / "model" / "vae.safetensors").write_bytes(vae)

    said = succeed_here(*edits.cache_latents, folder=tmp_path)

    assert "its reference images were cached in the sizes that the other model uses" in said
    assert TAKEN not in said


def test_training_names_caches_of_another_model_and_what_takes_them_over(tmp_path: Path) -> None:
    """Latents that are there; captions that only the other model can read."""
    prepare(tmp_path, FLUX_2)
    succeed_here(*FLUX_2.cache_latents, folder=tmp_path)
    succeed_here(*FLUX_2.cache_texts, folder=tmp_path)
    prepare(tmp_path, MOSS)

    command = [*MOSS.train, "--output_dir", "output", "--output_name", "lora", "--max_train_steps", "1"]
    code, said = run_here(*command, folder=tmp_path)
    assert_one_message(code, said, "moss_image_cache_latents.py", "is for another model")
    assert "which this model cannot read" in said
    succeed_here(*MOSS.cache_latents, folder=tmp_path)
    code, said = run_here(*command, folder=tmp_path)
    assert_one_message(
        code,
        said,
        "_f2k4b_te.safetensors contains what the text encoder of another model made of the caption",
    )
    assert "moss_image_cache_text_encoder_outputs.py" in said


def test_the_small_decoder_encodes_as_the_full_one_and_its_statistics_have_the_released_eps(
    tmp_path: Path,
) -> None:
    """Against diffusers' class, whose config says the eps. The decoder alone differs."""
    prepare(tmp_path, FLUX_2)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / "model" / "vae.safetensors"
    full = load_vae(path, torch.device("cpu"), torch.float32)
    state = load_file(path)
    prepare(tmp_path, MOSS)
    small_state = load_file(path)
    encoding = [name for name in state if not name.startswith(("decoder.", "post_quant_conv."))]
    assert [name for name in encoding if state[name].shape != small_state[name].shape] == []
    save_file({**small_state, **{name: state[name] for name in encoding}}, path)

    small = load_vae(path, torch.device("cpu"), torch.float32)

    assert torch.equal(small.encode(pixels[:, :, None]), full.encode(pixels[:, :, None]))
    assert AutoencoderKLFlux2().config.batch_norm_eps == EPS
    assert {name: entry.same_latents for name, entry in FAMILIES.items() if name in TAGS} == {
        "moss_image": "flux_2",
        "flux_3": "flux_2",
        "flux_2": "",
    }
