"""Transparency by the commands: pictures that are made, samples of a training, sources, references, tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import qwen_image_21_generate_image
from modules.media.reading import read_tags
from tests.faults.messages import succeed_here
from tests.qwen_image_21.test_vae import statistics, their_vae
from tests.tiny.dit_files import TinyModel
from tests.tiny.families import family_called
from tests.tiny.qwen_image_21 import write_tiny_qwen_image_21
from tests.tiny.qwen_image_21_vae import vae_config

# of 255: a value that lies between two numbers may be rounded to either
ROUNDED = 0.6
SIZE = (64, 96)  # height, width


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image_21(tmp_path_factory.mktemp("models"))


def generate(files: TinyModel, output: Path, *words: object) -> Image.Image:
    """Generate one picture by the command."""
    height, width = SIZE
    default = (
        f"--prompt hat --image_size {height} {width} --infer_steps 2 --seed 3 --device cpu "
        "--vae_dtype float32 --text_encoder_dtype float32"
    )
    words = (*files.models, *default.split(), "--save_path", output, *words)
    qwen_image_21_generate_image.main([str(word) for word in words])
    (path,) = output.glob("*.png")
    return Image.open(path)


def random_image(path: Path, mode: str = "RGBA") -> np.ndarray[Any, Any]:
    height, width = SIZE
    pixels = np.random.default_rng(4).integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def decoded(latents: Tensor, tile: int | None = None) -> Tensor:
    """What diffusers decodes of latents Z 1 h w: H W 4, 0..255, not rounded."""
    vae = their_vae(vae_config())
    if tile is not None:
        vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
    mean, deviation = statistics(vae_config())
    with torch.no_grad():
        pixels = vae.decode(latents[None] * deviation + mean).sample
    return (pixels[0, :, 0].movedim(0, -1) / 2 + 0.5).clamp(0, 1) * 255


def assert_shows(picture: Image.Image, expected: Tensor) -> None:
    difference = torch.from_numpy(np.array(picture)).float() - expected
    assert float(difference.abs().max()) <= ROUNDED


def test_a_picture_is_written_with_its_alpha_and_its_metadata(files: TinyModel, tmp_path: Path) -> None:
    image = generate(files, tmp_path / "out", "--output_type", "latent_images")

    (path,) = (tmp_path / "out").glob("*_latent.safetensors")
    latents = load_file(path)["latent"]
    assert (image.mode, image.size) == ("RGBA", SIZE[::-1])
    assert_shows(image, decoded(latents))
    assert len(np.unique(np.array(image)[..., 3])) > 10
    assert read_tags(Path(image.filename))["bt_prompt"] == "hat"  # type: ignore[attr-defined]

    words = ("--latent_path", path, "--vae", files.vae, "--vae_dtype", "float32", "--device", "cpu")
    tiles = ("--vae_spatial_tile_sample_min_size", 64, "--save_path", tmp_path / "tiles")
    qwen_image_21_generate_image.main([str(word) for word in (*words, *tiles)])
    (tiled,) = (tmp_path / "tiles").glob("*.png")
    assert_shows(Image.open(tiled), decoded(latents, tile=64))
    assert np.array(Image.open(tiled)).tolist() != np.array(image).tolist()


def test_a_picture_to_begin_with_has_an_alpha(files: TinyModel, tmp_path: Path) -> None:
    colors = random_image(tmp_path / "plain.png", "RGB")
    clear = np.dstack([colors, np.full(SIZE, 100, np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")

    made = {
        name: np.array(
            generate(files, tmp_path / name, "--i2i_path", tmp_path / f"{name}.png", "--strength", 0.5)
        )
        for name in ("plain", "clear")
    }

    assert (made["clear"] != made["plain"]).any()


@pytest.mark.slow
def test_the_vae_sees_the_alpha_of_a_reference_and_the_text_encoder_sees_it_on_white(
    files: TinyModel, tmp_path: Path
) -> None:
    Image.new("RGBA", (96, 64), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (96, 64), (255, 255, 255)).save(tmp_path / "white.png")
    Image.new("RGBA", (96, 64), (255, 255, 255, 255)).save(tmp_path / "opaque.png")
    edit = ("--resize_control_to_image_size", "--control_image_path")

    made = {
        name: np.array(generate(files, tmp_path / name, *edit, tmp_path / f"{name}.png"))
        for name in ("clear", "white", "opaque")
    }

    np.testing.assert_array_equal(made["white"], made["opaque"])
    assert (made["clear"] != made["white"]).any()


def test_samples_of_a_training_are_transparent_too(tmp_path: Path) -> None:
    family = family_called("qwen_image_21")
    family.prepare(tmp_path)
    (tmp_path / "samples.txt").write_text(family.sample_line, encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    samples = ("--sample_prompts", "samples.txt", "--sample_at_first")
    run = ("--max_train_steps", "1", "--output_dir", "out", "--output_name", "lora")
    succeed_here(*family.train, *run, *samples, folder=tmp_path)

    paths = list((tmp_path / "out").glob("sample/*_7.png"))
    assert paths
    for path in paths:
        image = Image.open(path)
        assert (image.mode, image.size) == ("RGBA", (32, 32))
        assert len(np.unique(np.array(image)[..., 3])) > 1
        assert read_tags(path)["bt_prompt"] == "a cat"
