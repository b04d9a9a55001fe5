"""Pictures in two stages: what the stages are asked for, and how the first becomes the second's start."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules.checkpoints.writing import save_tensors
from modules.errors import CheckpointError, OptionError
from stable_diffusion.contract import AskedPicture, Made, PictureSettings, SecondStart
from stable_diffusion.highres import make_pictures, prepare_highres, read_args
from stable_diffusion.sampling_options import HighresOptions
from tests.tiny.post_upscaling import rrdb_weights

OPTIONS = HighresOptions(highres_fix_scale=0.5, highres_fix_steps=7)
OURS = "stable_diffusion.model_upscaler"


@dataclass
class Asked:
    """What a stage was asked for."""

    pictures: Sequence[AskedPicture]
    start: SecondStart | None
    wants_images: bool


@dataclass
class Maker:
    """Makes pictures whose numbers depend on the seed."""

    asked: list[Asked] = field(default_factory=list)
    model: Any = field(
        default_factory=lambda: SimpleNamespace(
            vae=SimpleNamespace(device=torch.device("cpu")), device=torch.device("cpu"), dtype=torch.float32
        )
    )

    def make(
        self, pictures: Sequence[AskedPicture], start: SecondStart | None = None, wants_images: bool = True
    ) -> Made:
        self.asked.append(Asked(pictures, start, wants_images))
        settings = pictures[0].settings
        latents, images = [], []
        for picture in pictures:
            generator = torch.Generator().manual_seed(picture.seed)
            latents.append(torch.randn(4, settings.height // 8, settings.width // 8, generator=generator))
            random = np.random.default_rng(picture.seed)
            pixels = random.integers(0, 256, (settings.height, settings.width, 3), np.uint8)
            images.append(Image.fromarray(pixels))
        return Made(torch.stack(latents), images if wants_images else None)


def pictures(width: int = 96, height: int = 64) -> list[AskedPicture]:
    settings = PictureSettings(width, height, 20, 7.5, strength=0.6)
    return [
        AskedPicture("line 1", "a cat", "", seed, settings, "a cat", guides=(Path("edges.png"),))
        for seed in (3, 9)
    ]


def make(options: HighresOptions, maker: Maker, asked: list[AskedPicture] | None = None) -> list[Any]:
    return list(make_pictures(maker, prepare_highres(options), asked or pictures()))


def test_the_first_stage_is_small_and_the_second_has_the_next_seed() -> None:
    maker = Maker()
    (stage,) = make(OPTIONS, maker)
    first, second = maker.asked
    small, large = first.pictures[0].settings, second.pictures[0].settings
    assert (small.width, small.height, small.steps) == (48, 32, 7)
    assert (large.width, large.height, large.steps, large.strength) == (96, 64, 20, 0.6)
    assert [each.seed for each in first.pictures] == [3, 9]
    assert [each.seed for each in second.pictures] == [4, 10]
    assert [each.seed for each in stage.pictures] == [3, 9]  # what is written into the files
    assert stage.digit == "1"
    assert stage.made.images[0].size == (96, 64)
    assert all(each.guides for each in second.pictures)


def test_options_of_the_stages() -> None:
    maker = Maker()
    options = replace(
        OPTIONS,
        highres_fix_strength=0.3,
        highres_fix_save_1st=True,
        highres_fix_latents_upscaling=True,
        highres_fix_disable_control_net=True,
    )
    first, second = make(options, maker)
    assert (first.digit, second.digit) == ("0", "1")
    assert first.made.images[0].size == (48, 32)
    assert first.pictures[0].settings.steps == 7
    assert maker.asked[1].pictures[0].settings.strength == second.pictures[0].settings.strength == 0.3
    assert maker.asked[0].pictures[0].guides
    assert not maker.asked[1].pictures[0].guides


def test_sides_of_the_first_stage_are_multiples_of_8() -> None:
    for scale, side, wanted in ((0.5, 520, 256), (0.75, 1024, 768), (0.66, 1000, 656), (0.01, 64, 8)):
        maker = Maker()
        next(
            make_pictures(
                maker, prepare_highres(replace(OPTIONS, highres_fix_scale=scale)), pictures(side, 64)
            )
        )
        assert maker.asked[0].pictures[0].settings.width == wanted


def test_the_highest_seed_has_a_next_one() -> None:
    maker = Maker()
    make(OPTIONS, maker, [replace(pictures()[0], seed=2**64 - 1)])
    assert maker.asked[1].pictures[0].seed == 0


def write_module(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> str:
    (folder / "own_upscaler.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_upscaler", raising=False)
    return "own_upscaler"


def upscaled(name: str, args: str | None = None) -> SecondStart:
    maker = Maker()
    make(replace(OPTIONS, highres_fix_upscaler=name, highres_fix_upscaler_args=args), maker)
    start = maker.asked[1].start
    assert start is not None
    return start


PICTURES = """
from PIL import Image
class Own:
    def __init__(self, colour): self.colour = colour
    def upscale(self, vae, imgs, latents, dtype, width, height, batch_size, vae_batch_size):
        assert latents is None and (width, height, batch_size, vae_batch_size) == (96, 64, 2, 2)
        return [Image.new("RGB", (200, 200), self.colour) for image in imgs]
def create_upscaler(**args): return Own(**args)
"""
LATENTS = """
class Own:
    def support_latents(self): return True
    def upscale(self, vae, imgs, latents, dtype, width, height, batch_size, vae_batch_size):
        assert imgs is None
        return latents.new_ones(batch_size, 4, height // 8, width // 8)
def create_upscaler(): return Own()
"""


def test_modules_of_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = upscaled(write_module(monkeypatch, tmp_path, PICTURES), "colour=#ff0000")
    assert start.images is not None
    assert start.images[1].size == (96, 64)
    assert start.images[1].getpixel((5, 5)) == (255, 0, 0)
    start = upscaled(write_module(monkeypatch, tmp_path, LATENTS))
    assert start.latents is not None
    assert torch.equal(start.latents, torch.ones(2, 4, 8, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no create_upscaler"),
        ("import missing_package", "cannot be imported: No module named 'missing_package'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def create_upscaler(colour): return 1", "missing 1 required positional argument: 'colour'"),
        ("def create_upscaler(): return 1", "has no upscale"),
        (LATENTS.replace("width // 8", "width"), "returned latents of 2 x 4 x 8 x 96"),
        (LATENTS.replace("latents.new_ones", "latents.missing"), "failed: AttributeError"),
        (LATENTS.replace("return latents.new", "return latents.new_ones(1).item() #"), "returned float"),
    ],
)
def test_modules_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, words: str
) -> None:
    name = write_module(monkeypatch, tmp_path, text)
    with pytest.raises(OptionError, match=f"(?s)--highres_fix_upscaler own_upscaler.*{words}"):
        upscaled(name)


def test_upscaler_files_enlarge(tmp_path: Path) -> None:
    model = tmp_path / "4x.safetensors"
    save_tensors(model, rrdb_weights(), {})
    start = upscaled(OURS, f"model={model};tile=0")
    assert start.images is not None
    assert start.images[0].size == (96, 64)
    plain = Maker()
    make(OPTIONS, plain)
    assert plain.asked[1].start is not None
    assert plain.asked[1].start.images is not None
    assert start.images[0].tobytes() != plain.asked[1].start.images[0].tobytes()


def test_upscaler_files_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    def prepare(args: str) -> None:
        prepare_highres(replace(OPTIONS, highres_fix_upscaler=OURS, highres_fix_upscaler_args=args))

    model = tmp_path / "4x.safetensors"
    save_tensors(model, {"unknown.weight": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="SwinIR"):
        prepare(f"model={model}")
    with pytest.raises(OptionError, match="model=none.pth: no such file"):
        prepare("model=none.pth")
    with pytest.raises(OptionError, match="factor is not known"):
        prepare(f"model={model};factor=3")
    with pytest.raises(OptionError, match="give model=FILE"):
        prepare("tile=5")
    with pytest.raises(OptionError, match="tile"):
        prepare(f"model={model};tile=many")


def test_arguments_of_upscalers() -> None:
    assert read_args("weights=C:\\a b.pth; tile=5;;") == {"weights": "C:\\a b.pth", "tile": "5"}
    with pytest.raises(OptionError, match="write key=value"):
        read_args("weights")
