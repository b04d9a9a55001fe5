"""Deep Shrink: early in denoising the U-Net's inner features are made smaller, then larger again.

So the composition of a large picture is made at a size that the model knows. Source: kohya-ss, "Deep
Shrink", 2023. Depths count the U-Net's input blocks as the released files number them: 0 is the first
convolution, then each residual block (with its attention) and each halving is one more.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn
from torch.nn.functional import interpolate

from modules.errors import OptionError
from stable_diffusion.contract import AskedPicture, Idea, UnetCall
from stable_diffusion.shrink_options import DeepShrinkOptions

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class DeepShrinks:
    """Set up Deep Shrink for batches that want it. Without it the U-Net has no hooks."""

    unet: Any

    @contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        """Set the U-Net up for a batch; it is put back at the end. None: the batch wants no Deep Shrink.

        Raises OptionError if the U-Net is not that deep.
        """
        shrink = pictures[0].settings.deep_shrink
        if shrink is None:
            yield None
            return
        if shrink.ds_depth_2 is not None and shrink.ds_timesteps_2 >= shrink.ds_timesteps_1:
            logger.warning(
                "%s: --ds_depth_2 never acts: it would from --ds_timesteps_1 (%d) down to --ds_timesteps_2 "
                "(%d). Give a lower --ds_timesteps_2.",
                *(pictures[0].label, shrink.ds_timesteps_1, shrink.ds_timesteps_2),
            )
        shrinking = _Shrinking(shrink, input_blocks(self.unet))
        _check_depths(shrink, len(shrinking.blocks))
        with ExitStack() as stack:
            for handle in _install(shrinking, self.unet):
                stack.callback(handle.remove)
            yield shrinking
        if pictures[0].image is not None and not shrinking.has_acted:
            logger.warning(
                "%s: Deep Shrink never acts: with this --strength all timesteps are below --ds_timesteps_1 "
                "(%d). Give a lower one, or a higher --strength.",
                *(pictures[0].label, shrink.ds_timesteps_1),
            )


def _check_depths(shrink: DeepShrinkOptions, count: int) -> None:
    for name, depth in (("ds_depth_1", shrink.ds_depth_1), ("ds_depth_2", shrink.ds_depth_2)):
        if depth is not None and not 0 <= depth < count:
            raise OptionError(
                f"--{name} {depth}: this model's U-Net has the input blocks 0 to {count - 1}. Give one "
                "of them, such as 3"
            )


def input_blocks(unet: Any) -> list[nn.Module]:
    """Return the first module of each input block of diffusers' U-Net, in the order of their depths."""
    blocks = [unet.conv_in]
    for block in unet.down_blocks:
        blocks += [*block.resnets, *(block.downsamplers or ())]
    return blocks


def active_depth(shrink: DeepShrinkOptions, timestep: float) -> int | None:
    """Return the depth at which features are made smaller at a timestep; None: they stay as they are."""
    if timestep >= shrink.ds_timesteps_1:
        return shrink.ds_depth_1
    return shrink.ds_depth_2 if timestep >= shrink.ds_timesteps_2 else None


def make_smaller(features: Tensor, ratio: float) -> Tensor:
    """Return features B C h w with sides times `ratio`, rounded down but at least 1; bicubic, in float32."""
    height, width = features.shape[-2:]
    if min(height, width) * ratio < 1:
        size = smaller_size((height, width), ratio)
        return interpolate(features.float(), size, mode="bicubic").to(features.dtype)
    return interpolate(features.float(), scale_factor=ratio, mode="bicubic").to(features.dtype)


def smaller_size(size: Size, ratio: float) -> Size:
    """Return the size that `make_smaller` gives."""
    return max(int(size[0] * ratio), 1), max(int(size[1] * ratio), 1)


def resize_like(features: Tensor, size: Size) -> Tensor:
    """Return features B C h w in that size, bicubic, in float32; as they are if they have it."""
    if tuple(features.shape[-2:]) == size:
        return features
    return interpolate(features.float(), size, mode="bicubic").to(features.dtype)


@dataclass(eq=False)
class _Shrinking:
    """Deep Shrink at work: an `Idea`, which settles what the hooks in the U-Net do in the next call."""

    shrink: DeepShrinkOptions
    blocks: Sequence[nn.Module]
    depth: int | None = None  # where features are made smaller in this call
    has_acted: bool = False
    size: Size = (0, 0)  # of the sample
    # of the skips that the running output block takes, in the order in which it takes them
    skips: list[Size] = field(default_factory=list)

    def __call__(self, call: UnetCall) -> UnetCall:
        self.depth = active_depth(self.shrink, call.timestep)
        self.has_acted = self.has_acted or self.depth is not None
        height, width = call.sample.shape[-2:]
        self.size = height, width
        if self.depth is None or call.residuals is None:
            return call
        # a ControlNet sees the whole size: what it adds has to be of the features' size
        skips, middle = call.residuals
        sizes = self.skip_sizes()
        fitted = [resize_like(skip, size) for skip, size in zip(skips, sizes, strict=True)]
        return replace(call, residuals=(fitted, resize_like(middle, sizes[-1])))

    def skip_sizes(self) -> list[Size]:
        """Return the sizes of the input blocks' outputs."""
        size, sizes = self.size, []
        for depth, block in enumerate(self.blocks):
            if depth == self.depth:
                size = smaller_size(size, self.shrink.ds_ratio)
            if isinstance(block, Downsample2D):
                size = -(-size[0] // 2), -(-size[1] // 2)
            sizes.append(size)
        return sizes

    # What the hooks call

    def enter_block(self, depth: int, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if depth != self.depth:
            return None
        return make_smaller(args[0], self.shrink.ds_ratio), *args[1:]

    def enter_output(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Fit the features to an output block's first skip, and note the sizes of the others."""
        if self.depth is None:
            return None
        self.skips = [_size(skip) for skip in reversed(kwargs["res_hidden_states_tuple"])]
        wanted = kwargs.get("upsample_size")
        # of a picture with an odd side diffusers' U-Net enlarges to the next skip's size straight away, which
        # is right unless that one is from before the features were made smaller
        if wanted is not None and [-(-side // 2) for side in wanted] != list(self.skips[-1]):
            wanted = None
        fitted = resize_like(kwargs["hidden_states"], self.skips[0])
        return {**kwargs, "hidden_states": fitted, "upsample_size": wanted}

    def leave_layer(self, layer: int, output: Any) -> Any:
        """Fit the features to the skip that the next layer of the output block takes."""
        if self.depth is None:
            return None
        size = self.skips[layer + 1]
        if isinstance(output, tuple):
            return resize_like(output[0], size), *output[1:]
        return resize_like(output, size)

    def enter_end(self, features: Tensor) -> Tensor | None:
        return None if self.depth is None else resize_like(features, self.size)


def _size(features: Tensor) -> Size:
    height, width = features.shape[-2:]
    return height, width


def _install(shrinking: _Shrinking, unet: Any) -> Iterator[Any]:
    """Add hooks to diffusers' U-Net; yield what removes each."""
    for depth, block in enumerate(shrinking.blocks):
        yield block.register_forward_pre_hook(_at_depth(shrinking, depth))
    for output in unet.up_blocks:
        yield output.register_forward_pre_hook(
            lambda _, args, kwargs: _keep(args, shrinking.enter_output(kwargs)), with_kwargs=True
        )
        attentions = getattr(output, "attentions", None)
        for layer, last in enumerate(list(attentions or output.resnets)[:-1]):
            yield last.register_forward_hook(_after(shrinking, layer))
    yield unet.conv_norm_out.register_forward_pre_hook(lambda _, args: shrinking.enter_end(args[0]))


def _keep(args: Any, kwargs: dict[str, Any] | None) -> tuple[Any, dict[str, Any]] | None:
    return None if kwargs is None else (args, kwargs)


def _at_depth(shrinking: _Shrinking, depth: int) -> Callable[[nn.Module, Any], Any]:
    return lambda _, args: shrinking.enter_block(depth, args)


def _after(shrinking: _Shrinking, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda _, args, output: shrinking.leave_layer(layer, output)
