"""What the generation script writes as images equals diffusers' decoder, to the rounding of a level."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.commands import run_script
from tests.parity.reference import open_image
from tests.parity.running import models_in
from tests.parity.theirs import Theirs
from tests.tiny.wan import write_tiny_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_tiny_wan(path)
    return path


def levels(pixels: Tensor) -> Tensor:
    """1 3 F H W in -1..1 -> F H W 3 in 0..255, not yet rounded."""
    return (pixels[0].permute(1, 2, 3, 0) / 2 + 0.5) * 255


def assert_rounded(paths: list[Path], expected: Tensor) -> None:
    """Every stored level is the expected number rounded; 1e-4 of the range beside a half may fall on either
    side.
    """
    stored = torch.from_numpy(numpy.stack([open_image(path) for path in paths])).float()
    assert stored.shape == expected.shape
    assert float((stored - expected).abs().max()) <= 0.5 + 255e-4


def test_latent_files_are_decoded_to_images(tmp_path: Path, folder: Path) -> None:
    """Several at once; what they say about themselves is the seed only."""
    generator = torch.Generator().manual_seed(0)
    latents = {
        "one": torch.randn(16, 3, 4, 6, generator=generator),
        "two": 1.5 * torch.randn(16, 1, 2, 2, generator=generator),
    }
    for index, (name, values) in enumerate(latents.items()):
        save_file({"latent": values}, tmp_path / f"{name}.safetensors", {"bt_seeds": str(70 + index)})
    files = [f"{name}.safetensors" for name in latents]
    options = [
        "--latent_path",
        *files,
        "--output_type",
        "images",
        "--save_path",
        "out",
        "--device",
        "cpu",
        "--task",
        "t2v-1.3B",
    ]

    run_script("wan_generate_video.py", *models_in(folder), *options, folder=tmp_path)

    theirs = Theirs(folder)
    for index, name in enumerate(latents):
        (made,) = (tmp_path / "out").glob(f"*_{70 + index}_{name}")
        paths = sorted(made.iterdir())
        assert [path.name for path in paths] == [
            f"{made.name}_{frame:03d}.png" for frame in range(len(paths))
        ]
        assert_rounded(paths, levels(theirs.decode(latents[name][None])))
