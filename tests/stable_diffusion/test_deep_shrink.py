"""Deep Shrink in diffusers' U-Net, against the U-Net walked by hand in the released files' order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import interpolate

from modules.errors import OptionError
from stable_diffusion.contract import AskedPicture, PictureSettings, UnetCall
from stable_diffusion.sampling_options import DeepShrinkOptions
from stable_diffusion.small_start import DeepShrinks
from tests.tiny.stable_diffusion import KINDS, unet_state


@pytest.fixture(scope="module")
def unet() -> Any:
    network = UNet2DConditionModel(**KINDS["sd1"].unet)
    network.load_state_dict(unet_state("sd1"))
    return network.eval().requires_grad_(False)


def pictures(shrink: DeepShrinkOptions | None) -> list[AskedPicture]:
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
    with DeepShrinks(unet).for_batch(pictures(shrink), 64, 64) as idea:
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
    with DeepShrinks(unet).for_batch(pictures(None), 64, 64) as idea:
        assert idea is None
        assert torch.equal(run(unet, call), before)
    with DeepShrinks(unet).for_batch(
        pictures(DeepShrinkOptions(ds_depth_1=1, ds_timesteps_1=950)), 64, 64
    ) as idea:
        assert torch.equal(run(unet, idea(call)), before)  # above this timestep only
    shrunk(unet, call, DeepShrinkOptions(ds_depth_1=1))
    assert torch.equal(run(unet, call), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(("timestep", "is_told"), [(400.0, True), (700.0, False)])
def test_it_is_told_if_the_steps_from_a_picture_begin_too_late(
    unet: Any, timestep: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (picture,) = pictures(DeepShrinkOptions(ds_depth_1=1))
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
            DeepShrinks(unet).for_batch(pictures(shrink), 64, 64),
        ):
            pass
