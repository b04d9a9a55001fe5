"""References are laid on a canvas, or cut, as diffusers does it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from PIL import Image
from torch import Tensor

from flux_3.family import Flux3
from flux_3.files import Flux3Files
from flux_3.references import (
    fit_canvas,
    fit_image_canvas,
    fit_one_of_several,
    read_on_canvas,
    read_one_of_several,
)
from protocols.data import MediaEncoders

SIZES = [(75, 61), (64, 48), (16, 9), (16, 40), (20, 100), (17, 640), (2049, 33)]


def write_noise(path: Path, width: int, height: int) -> Image.Image:
    """Write a picture without two equal rows."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_a_single_reference_is_on_the_same_canvas(size: tuple[int, int], tmp_path: Path) -> None:
    image = write_noise(tmp_path / "a.png", *size)
    expected, kwargs = Flux3ImageProcessor().preprocess(image, resize_mode="fill")

    frames = read_on_canvas(tmp_path / "a.png", 16)

    pixels = torch.round((expected[0].permute(1, 2, 0) + 1) * 127.5).to(torch.uint8)
    assert torch.equal(frames[0, 0], pixels)
    canvas = fit_image_canvas(tmp_path / "a.png", 16)
    left, top = canvas.corner
    width, height = canvas.image
    assert (left, top, left + width, top + height) == kwargs["reference_crop"]


@pytest.mark.parametrize(
    "size", [(2048, 2048), (2049, 2047), (4097, 100), (4999, 3001), (5000, 5000), (9000, 20)]
)
def test_large_canvases_have_the_same_sizes(size: tuple[int, int]) -> None:
    """By the sizes alone: pixels of that many would take long."""
    processor = Flux3ImageProcessor()
    resized = processor._resize_if_canvas_exceeds_area(Image.new("RGB", size))
    height, width = processor._get_canvas_height_width(resized.height, resized.width)

    canvas = fit_canvas(size, 16)

    assert canvas.image == resized.size
    assert canvas.size == (width, height)


@pytest.mark.parametrize("size", [(50, 83), (1300, 1100)], ids=["small", "reduced"])
def test_one_of_several_is_reduced_and_cut_the_same_way(size: tuple[int, int], tmp_path: Path) -> None:
    image = write_noise(tmp_path / "a.png", *size)
    expected, _ = Flux3ImageProcessor().preprocess(image, resize_mode="crop")

    frames = read_one_of_several(tmp_path / "a.png", 16)

    assert torch.equal(frames[0, 0], torch.round((expected[0].permute(1, 2, 0) + 1) * 127.5).to(torch.uint8))
    assert fit_one_of_several(tmp_path / "a.png", 16).bucket == (frames.shape[3], frames.shape[2])


class ShowingVae:
    """Latents are the pixels, B C 1 H W."""

    def encode(self, clips: Tensor) -> Tensor:
        return clips


@pytest.mark.parametrize(("count", "sizes"), [(1, [(80, 112)]), (2, [(64, 96), (64, 96)])])
def test_one_reference_stands_on_its_canvas_and_two_are_cut(
    count: int, sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    paths = tuple(tmp_path / f"{number}.png" for number in range(count))
    for path in paths:
        write_noise(path, 100, 70)
    prepared: Any = SimpleNamespace(request=SimpleNamespace(control_images=paths))

    conditions = Flux3(Flux3Files()).request_conditions(MediaEncoders(ShowingVae()), prepared)[0]

    assert [conditions[f"latents_control_{number}"].shape[-2:] for number in range(count)] == sizes
