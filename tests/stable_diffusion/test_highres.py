"""Pictures in two stages, and Deep Shrink against the U-Net walked by hand."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from checkpoints.writing import save_tensors
from modules.errors import CheckpointError, OptionError
from stable_diffusion import latent_upscaler
from stable_diffusion.contract import ImageSettings, RequestedImage, SecondStageInput, UnetCall
from stable_diffusion.highres import load_upscaler, make_images, parse_upscaler_args, prepare_highres
from stable_diffusion.sampling_options import DeepShrinkOptions, HighresOptions
from stable_diffusion.small_start import DeepShrinks
from tests.stable_diffusion.loaded import PlainMaker, call_of, run_unet, unet_of
from tests.tiny.post_upscaling import rrdb_weights

OPTIONS = HighresOptions(highres_fix_scale=0.5, highres_fix_steps=7)
OURS = "stable_diffusion.model_upscaler"


def requests(width: int = 96, height: int = 64) -> list[RequestedImage]:
    settings = ImageSettings(width, height, 20, 7.5, strength=0.6)
    return [
        RequestedImage("line 1", "a cat", "", seed, settings, "a cat", guides=(Path("edges.png"),))
        for seed in (3, 9)
    ]


def make(options: HighresOptions, asked: list[RequestedImage] | None = None) -> tuple[PlainMaker, list[Any]]:
    """The maker, which knows what it was asked for, and the stages that are saved."""
    maker: Any = PlainMaker()
    return maker, list(make_images(maker, prepare_highres(options), asked or requests()))


def test_the_first_stage_is_small_and_the_second_has_the_next_seed() -> None:
    maker, (stage,) = make(OPTIONS)
    first, second = maker.batches
    small, large = first[0].settings, second[0].settings
    assert (small.width, small.height, small.steps) == (48, 32, 7)
    assert (large.width, large.height, large.steps, large.strength) == (96, 64, 20, 0.6)
    assert [each.seed for each in first] == [3, 9]
    assert [each.seed for each in second] == [4, 10]
    assert [each.seed for each in stage.requests] == [3, 9]  # what is written into the files
    assert stage.stage_digit == "1"
    assert stage.result.images[0].size == (96, 64)
    assert all(each.guides for each in second)
    maker, _ = make(OPTIONS, [replace(requests()[0], seed=2**64 - 1)])
    assert maker.batches[1][0].seed == 0


def test_options_of_the_stages() -> None:
    options = replace(
        OPTIONS,
        highres_fix_strength=0.3,
        highres_fix_save_1st=True,
        highres_fix_latents_upscaling=True,
        highres_fix_disable_control_net=True,
    )
    maker, (first, second) = make(options)
    assert (first.stage_digit, second.stage_digit) == ("0", "1")
    assert first.result.images[0].size == (48, 32)
    assert first.requests[0].settings.steps == 7
    assert maker.batches[1][0].settings.strength == second.requests[0].settings.strength == 0.3
    assert maker.batches[0][0].guides
    assert not maker.batches[1][0].guides


@pytest.mark.parametrize(("scale", "side", "wanted"), [(0.5, 520, 256), (0.66, 1000, 656), (0.01, 64, 8)])
def test_sides_of_the_first_stage_are_multiples_of_8(scale: float, side: int, wanted: int) -> None:
    maker, _ = make(replace(OPTIONS, highres_fix_scale=scale), requests(side, 64))
    assert maker.batches[0][0].settings.width == wanted


def write_module(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> str:
    (folder / "own_upscaler.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_upscaler", raising=False)
    return "own_upscaler"


def upscaled(name: str, args: str | None = None) -> SecondStageInput:
    maker, _ = make(replace(OPTIONS, highres_fix_upscaler=name, highres_fix_upscaler_args=args))
    start = maker.starts[1]
    assert start is not None
    return start


IMAGES = """
from PIL import Image
class Own:
    def __init__(self, color): self.color = color
    def upscale(self, vae, imgs, latents, dtype, width, height, batch_size, vae_batch_size):
        assert latents is None and (width, height, batch_size, vae_batch_size) == (96, 64, 2, 2)
        return [Image.new("RGB", (200, 200), self.color) for image in imgs]
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
    start = upscaled(write_module(monkeypatch, tmp_path, IMAGES), "color=#ff0000")
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
        ("1 / 0", "ZeroDivisionError"),
        ("def create_upscaler(color): return 1", "missing 1 required positional argument: 'color'"),
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
    start, (plain, *_) = upscaled(OURS, f"model={model};tile=0"), make(OPTIONS)
    assert start.images is not None
    assert start.images[0].size == (96, 64)
    assert plain.starts[1] is not None
    assert plain.starts[1].images is not None
    assert start.images[0].tobytes() != plain.starts[1].images[0].tobytes()


def test_upscaler_files_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    model = tmp_path / "4x.safetensors"
    save_tensors(model, {"unknown.weight": torch.zeros(3)}, {})
    for args, error, words in (
        (f"model={model}", CheckpointError, "SwinIR"),
        ("model=none.pth", OptionError, "model=none.pth: no such file"),
        (f"model={model};factor=3", OptionError, "factor is not known"),
        ("tile=5", OptionError, "give model=FILE"),
        (f"model={model};tile=many", OptionError, "tile"),
    ):
        with pytest.raises(error, match=words):
            prepare_highres(replace(OPTIONS, highres_fix_upscaler=OURS, highres_fix_upscaler_args=args))


def test_arguments_of_upscalers() -> None:
    assert parse_upscaler_args("weights=C:\\a b.pth; tile=5;;") == {"weights": "C:\\a b.pth", "tile": "5"}
    with pytest.raises(OptionError, match="write key=value"):
        parse_upscaler_args("weights")


@pytest.fixture(scope="module")
def unet() -> Any:
    return unet_of("sd1")


def call_at(timestep: float, height: int = 9, width: int = 12, residuals: Any = None) -> UnetCall:
    """A call for latents of that height and width."""
    return replace(call_of("sd1", size=(8 * width, 8 * height)), timestep=timestep, residuals=residuals)


def shrinking(shrink: DeepShrinkOptions | None) -> list[RequestedImage]:
    return [
        RequestedImage("line 1", "a cat", "", 1, ImageSettings(64, 64, 4, 7.5, deep_shrink=shrink), "a cat")
    ]


def shrunk(unet: Any, call: UnetCall, shrink: DeepShrinkOptions) -> Tensor:
    with DeepShrinks(unet).apply_to_batch(shrinking(shrink), 64, 64) as idea:
        assert idea is not None
        return run_unet(unet, idea(call))


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
            follows = skips[-1].shape[-2:]
            is_half = [(side + 1) // 2 for side in follows] == list(h.shape[-2:])
            h = up(h, tuple(follows) if odd and is_half else None)
    h = fit(h, call.sample)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


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
    call = call_at(900.0, height, width)
    made = shrunk(unet, call, DeepShrinkOptions(ds_depth_1=depth, ds_ratio=ratio))
    assert made.shape == call.sample.shape
    torch.testing.assert_close(made, walk(unet, call, depth, ratio), atol=1e-5, rtol=1e-5)
    assert (made - run_unet(unet, call)).abs().max() > 1e-3


def test_nothing_stays_behind(unet: Any) -> None:
    call = call_at(900.0)
    before = run_unet(unet, call)
    with DeepShrinks(unet).apply_to_batch(shrinking(None), 64, 64) as idea:
        assert idea is None
        assert torch.equal(run_unet(unet, call), before)
    above = DeepShrinkOptions(ds_depth_1=1, ds_timesteps_1=950)
    assert torch.equal(shrunk(unet, call, above), before)
    shrunk(unet, call, DeepShrinkOptions(ds_depth_1=1))
    assert torch.equal(run_unet(unet, call), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(("timestep", "is_told"), [(400.0, True), (700.0, False)])
def test_it_is_told_if_the_steps_from_a_picture_begin_too_late(
    unet: Any, timestep: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = shrinking(DeepShrinkOptions(ds_depth_1=1))
    image = replace(image, image=Path("a.png"))
    with DeepShrinks(unet).apply_to_batch([image], 64, 64) as idea:
        assert idea is not None
        idea(call_at(timestep))
    assert ("Deep Shrink never acts: with this --strength" in caplog.text) == is_told


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_control_residuals_are_fitted(unet: Any, depth: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(32, 9, 12)] * 3 + [(32, 5, 6), (64, 5, 6), (64, 5, 6)]
    *down, middle = [torch.randn(2, *size, generator=generator) for size in [*sizes, sizes[-1]]]
    call = call_at(900.0, residuals=(down, middle))
    made = shrunk(unet, call, DeepShrinkOptions(ds_depth_1=depth))
    torch.testing.assert_close(made, walk(unet, call, depth, 0.5), atol=1e-5, rtol=1e-5)


def test_a_depth_that_the_model_lacks_is_refused(unet: Any) -> None:
    second = DeepShrinkOptions(ds_depth_1=1, ds_depth_2=7, ds_timesteps_2=0)
    for shrink, name in ((DeepShrinkOptions(ds_depth_1=6), "ds_depth_1"), (second, "ds_depth_2")):
        with pytest.raises(OptionError, match=f"--{name} .*0 to 5"):
            shrunk(unet, call_at(900.0), shrink)


class HalfVae(nn.Module):
    """Encode pixels as their mean color, in squares of 8."""

    def __init__(self, scale: float = 0.18215) -> None:
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.zeros(1)), SimpleNamespace(scaling_factor=scale)

    def encode(self, pixels: Tensor) -> Any:
        gray = avg_pool2d(pixels.mean(1, keepdim=True), 8).expand(-1, 4, -1, -1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=gray))


def write_refiner(path: Path, final: float) -> Path:
    """Weights whose last convolution gives `final` everywhere; the others are those of a new network."""
    refiner = latent_upscaler.LatentRefiner()
    state = {name: tensor.clone() for name, tensor in refiner.state_dict().items() if tensor.ndim}
    state["conv_final.weight"].zero_()
    state["conv_final.bias"].fill_(final)
    save_tensors(path, state)
    return path


def test_the_latent_upscaler_of_sd_scripts_adds_to_the_enlarged_latents(tmp_path: Path) -> None:
    path = write_refiner(tmp_path / "upscaler.safetensors", final=0.25)
    images = [Image.new("RGB", (16, 8), "white"), Image.new("RGB", (16, 8), "black")]

    made = load_upscaler("tools.latent_upscaler", f"weights={path}").upscaler
    latents = made.upscale(HalfVae(), images, None, torch.float32, 32, 16, 2, 1)

    expected = torch.tensor([1.25, -0.75]).view(2, 1, 1, 1).expand(2, 4, 2, 4) * 0.18215
    torch.testing.assert_close(latents, expected)


def test_a_latent_upscaler_is_refused_if_it_does_not_fit(tmp_path: Path) -> None:
    path = write_refiner(tmp_path / "upscaler.safetensors", final=0.0)
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"conv1.weight": torch.zeros(1)})
    made = load_upscaler("tools.latent_upscaler", f"weights={path}").upscaler

    with pytest.raises(CheckpointError, match="other.safetensors is not a latent upscaler of sd-scripts"):
        load_upscaler("tools.latent_upscaler", f"weights={other}")
    with pytest.raises(OptionError, match="give weights=FILE"):
        load_upscaler("tools.latent_upscaler", "model=a.safetensors")
    with pytest.raises(OptionError, match="latents of Stable Diffusion 1.x and 2.x"):
        made.upscale(HalfVae(0.13025), [Image.new("RGB", (8, 8))], None, torch.float32, 16, 16, 1, 1)
