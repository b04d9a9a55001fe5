"""CLIP vision conditioning: where the image encoder is found, and what it makes of the pooled state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.clip_layers import load_clip_vision
from modules.errors import CheckpointError, DownloadError, OptionError
from stable_diffusion.contract import Model, TextState
from stable_diffusion.text import FOLDER, PictureVectors, find_image_tower
from tests.encoders.test_clip import noise, write_tower
from tests.faults.messages import run_here
from tests.stable_diffusion.text_towers import make_towers
from tests.tiny.stable_diffusion import TEXT_DIM, tokenizer_folder, write_sdxl

CPU = torch.device("cpu")


def make_model(kind: str, path: Path) -> Model:
    """A model of which only the text encoders are there."""
    towers, sort = make_towers(kind)
    return Model(sort, path, None, None, towers, False, False, CPU, torch.float32, torch.float32)


def write_pictures(folder: Path) -> list[Path]:
    paths = [folder / "one.png", folder / "two.png"]
    for path, image in zip(paths, (noise(40, 30), noise(30, 50)), strict=True):
        image.save(path)
    return paths


def test_the_image_encoder_is_found_with_the_tokenizers_then_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "models" / "sdxl.safetensors"
    beside, _ = write_tower(tmp_path / "models" / "image_encoder")
    file = beside / "model.safetensors"
    assert find_image_tower(checkpoint, tmp_path / "cache") == file
    assert find_image_tower(beside.parent, None) == file  # a diffusers folder
    (tmp_path / "cache" / FOLDER).mkdir(parents=True)  # only a tokenizer
    assert find_image_tower(checkpoint, tmp_path / "cache") == file
    cached, _ = write_tower(tmp_path / "cache" / FOLDER)
    assert find_image_tower(checkpoint, tmp_path / "cache") == cached / "model.safetensors"


def test_without_the_image_encoder_the_message_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match="OpenCLIP's bigG, which is not in .*cache.*Put the files"):
        find_image_tower(tmp_path / "sdxl.safetensors", tmp_path / "cache")


def test_the_pictures_vector_times_the_strength_replaces_the_pooled_state(tmp_path: Path) -> None:
    folder, _ = write_tower(tmp_path / "image_encoder", projection=TEXT_DIM)
    paths = write_pictures(tmp_path)
    vectors = PictureVectors(make_model("sdxl", tmp_path / "x.safetensors"), None, 0.5)
    states = [TextState(torch.full((77, 128), float(index)), torch.ones(TEXT_DIM)) for index in range(3)]
    found = vectors.replace_pooled(states, [paths[0], paths[1], paths[0]])
    tower = load_clip_vision(folder, CPU, torch.float32, "--x", "a tower")
    for state, before, path in zip(found, states, (paths[0], paths[1], paths[0]), strict=True):
        assert state.context is before.context
        with Image.open(path) as image:
            expected = tower.encode([image])[0] * 0.5
        assert state.pooled is not None
        assert torch.equal(state.pooled, expected)


def test_another_width_and_another_model_are_refused(tmp_path: Path) -> None:
    write_tower(tmp_path / "image_encoder", projection=32)
    model = make_model("sdxl", tmp_path / "x.safetensors")
    vectors = PictureVectors(model, None, 1.0)
    with pytest.raises(CheckpointError, match="makes vectors of 32 numbers, the pooled state of .* has 64"):
        vectors.replace_pooled([TextState(torch.ones(77, 128), torch.ones(64))], write_pictures(tmp_path)[:1])
    with pytest.raises(OptionError, match=r"is Stable Diffusion 1\.x, which has no pooled state"):
        PictureVectors(make_model("sd1", tmp_path / "x.safetensors"), None, 1.0)


SMALL = ("--tokenizer_cache_dir", "tokenizers", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_sdxl(folder)
    tokenizer_folder(folder / "tokenizers")
    write_tower(folder / "image_encoder", projection=TEXT_DIM)
    noise(64, 64).save(folder / "one.png")
    return folder


def make(project: Path, out: Path, *words: object) -> np.ndarray:
    code, said = run_here("gen_img.py", *SMALL, "--outdir", out, *words, folder=project)
    assert code == 0, said[-3000:]
    (path,) = out.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_in_place_of_the_pooled_state(project: Path, tmp_path: Path) -> None:
    words = ("--ckpt", "sdxl.safetensors", "--prompt", "a cat", "--image_path", "one.png")
    plain, weak, strong = (
        make(project, tmp_path / str(number), *words, *more)
        for number, more in enumerate(
            ((), ("--clip_vision_strength", "0.5"), ("--clip_vision_strength", "2"))
        )
    )
    assert np.abs(plain - weak).max() > 1
    assert np.abs(weak - strong).max() > 1
