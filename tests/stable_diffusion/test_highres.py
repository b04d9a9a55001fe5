"""Pictures in two stages, and Deep Shrink against the U-Net walked by hand."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from modules.checkpoints.writing import save_tensors
from modules.errors import CheckpointError, OptionError
from stable_diffusion.contract import AskedPicture, Made, PictureSettings, SecondStart, UnetCall
from stable_diffusion.highres import make_pictures, prepare_highres, read_args
from stable_diffusion.sampling_options import DeepShrinkOptions, HighresOptions
from stable_diffusion.small_start import DeepShrinks
from tests.tiny.post_upscaling import rrdb_weights
from tests.tiny.stable_diffusion import KINDS, unet_state

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
    vae_batch_size: float | None = None
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


@pytest.fixture(scope="module")
def unet() -> Any:
    network = UNet2DConditionModel(**KINDS["sd1"].unet)
    network.load_state_dict(unet_state("sd1"))
    return network.eval().requires_grad_(False)


def shrinking(shrink: DeepShrinkOptions | None) -> list[AskedPicture]:
    return [
        AskedPicture("line 1", "a cat", "", 1, PictureSettings(64, 64, 4, 7.5, deep_shrink=shrink), "a cat")
    ]


def call_of(height: int, width: int, timestep: float, unet: Any, residuals: Any = None) -> UnetCall:
    generator = torch.Generator().manual_seed(height + width)
    sample = torch.randn(2, 4, height, width, generator=generator)
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    return UnetCall(0, 4, timestep, sample, context, 1, residuals=residuals)


def run(unet: Any, call: UnetCall) -> Tensor:
    added = {}
    if call.residuals is not None:
        added["down_block_additional_residuals"], added["mid_block_additional_residual"] = call.residuals
    return unet(call.sample, call.timestep, call.context, **added).sample


def shrunk(unet: Any, call: UnetCall, shrink: DeepShrinkOptions) -> Tensor:
    with DeepShrinks(unet).for_batch(shrinking(shrink), 64, 64) as idea:
        assert idea is not None
        return run(unet, idea(call))


def walk(unet: Any, call: UnetCall, depth: int | None, ratio: float) -> Tensor:
    """The specification in plain words: down, middle, up, one module after the other."""
    h, context = call.sample, call.context
    emb = unet.time_embedding(unet.get_time_embed(h, call.timestep))
    steps: list[Any] = [lambda x: unet.conv_in(x)]
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            steps.append(lambda x, r=resnet, a=attention: attend(a, r(x, emb), context))
        steps += list(block.downsamplers or ())
    skips = []
    for number, step in enumerate(steps):
        if number == depth:
            h = interpolate(h, scale_factor=ratio, mode="bicubic")
        h = step(h)
        skips.append(h)
    h = unet.mid_block(h, emb, encoder_hidden_states=context)
    if call.residuals is not None:
        down, middle = call.residuals
        skips = [skip + fit(more, skip) for skip, more in zip(skips, down, strict=True)]
        h = h + fit(middle, h)
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            skip = skips.pop()
            h = attend(attention, resnet(torch.cat([fit(h, skip), skip], 1), emb), context)
        for up in block.upsamplers or ():
            # where a side is odd, diffusers' U-Net enlarges to the next skip at once
            odd = any(side % 2 for side in call.sample.shape[-2:])
            follows = tuple(skips[-1].shape[-2:])
            h = up(h, follows if odd and halves(follows) == tuple(h.shape[-2:]) else None)
    h = fit(h, call.sample)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def halves(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((side + 1) // 2 for side in size)


def fit(features: Tensor, like: Tensor) -> Tensor:
    if features.shape[-2:] == like.shape[-2:]:
        return features
    return interpolate(features, tuple(like.shape[-2:]), mode="bicubic")


def attend(attention: Any, features: Tensor, context: Tensor) -> Tensor:
    return features if attention is None else attention(features, context, return_dict=False)[0]


@pytest.mark.parametrize(
    ("depth", "height", "width", "ratio"),
    [*((depth, 9, 13, 0.6) for depth in range(6)), (0, 8, 12, 0.5), (3, 8, 12, 0.5)],
)
def test_each_depth(unet: Any, depth: int, height: int, width: int, ratio: float) -> None:
    call = call_of(height, width, 900.0, unet)
    made = shrunk(unet, call, DeepShrinkOptions(ds_depth_1=depth, ds_ratio=ratio))
    assert made.shape == call.sample.shape
    torch.testing.assert_close(made, walk(unet, call, depth, ratio), atol=1e-5, rtol=1e-5)
    assert (made - run(unet, call)).abs().max() > 1e-3


def test_nothing_stays_behind(unet: Any) -> None:
    call = call_of(9, 12, 900.0, unet)
    before = run(unet, call)
    with DeepShrinks(unet).for_batch(shrinking(None), 64, 64) as idea:
        assert idea is None
        assert torch.equal(run(unet, call), before)
    with DeepShrinks(unet).for_batch(
        shrinking(DeepShrinkOptions(ds_depth_1=1, ds_timesteps_1=950)), 64, 64
    ) as idea:
        assert torch.equal(run(unet, idea(call)), before)  # above this timestep only
    shrunk(unet, call, DeepShrinkOptions(ds_depth_1=1))
    assert torch.equal(run(unet, call), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(("timestep", "is_told"), [(400.0, True), (700.0, False)])
def test_it_is_told_if_the_steps_from_a_picture_begin_too_late(
    unet: Any, timestep: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (picture,) = shrinking(DeepShrinkOptions(ds_depth_1=1))
    picture = replace(picture, image=Path("a.png"))
    with DeepShrinks(unet).for_batch([picture], 64, 64) as idea:
        assert idea is not None
        idea(call_of(8, 8, timestep, unet))
    assert ("Deep Shrink never acts: with this --strength" in caplog.text) == is_told


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_control_residuals_are_fitted(unet: Any, depth: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(32, 9, 12)] * 3 + [(32, 5, 6), (64, 5, 6), (64, 5, 6)]
    *down, middle = [torch.randn(2, *size, generator=generator) for size in [*sizes, sizes[-1]]]
    call = call_of(9, 12, 900.0, unet, residuals=(down, middle))
    made = shrunk(unet, call, DeepShrinkOptions(ds_depth_1=depth))
    torch.testing.assert_close(made, walk(unet, call, depth, 0.5), atol=1e-5, rtol=1e-5)


def test_a_depth_that_the_model_lacks_is_refused(unet: Any) -> None:
    for shrink, name in (
        (DeepShrinkOptions(ds_depth_1=6), "ds_depth_1"),
        (DeepShrinkOptions(ds_depth_1=1, ds_depth_2=7, ds_timesteps_2=0), "ds_depth_2"),
    ):
        with (
            pytest.raises(OptionError, match=f"--{name} .*0 to 5"),
            DeepShrinks(unet).for_batch(shrinking(shrink), 64, 64),
        ):
            pass
