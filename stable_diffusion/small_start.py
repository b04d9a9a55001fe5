"""Start denoising at a smaller size: Deep Shrink, and at the end of this file Gradual Latent.

Deep Shrink makes the U-Net's inner features smaller early in denoising, so that the composition of a large
image is made at a size that the model was trained on. Source: kohya-ss, "Deep Shrink", 2023. Depths count
the U-Net's input blocks as the released files number them: 0 is the first convolution; each residual block
(with its attention) and each downsampling counts as one more.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from modules.errors import OptionError
from modules.integers import ceil_div
from stable_diffusion.contract import RequestedImage, UnetCall, UnetHook
from stable_diffusion.samplers import MakeStep, SchedulerSolver
from stable_diffusion.sampling_options import DeepShrinkOptions, GradualLatentOptions, Unsharp
from stable_diffusion.starting import STRIDE, is_masked

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class DeepShrinks:
    """Set up Deep Shrink for batches that use it; other batches get no U-Net hooks."""

    unet: Any

    @contextmanager
    def apply_to_batch(
        self, requests: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Register forward hooks of Deep Shrink for a batch; yield the hook that selects the depth per call.

        Raises:
            OptionError: If the U-Net does not have a block at the given depth.
        """
        shrink = requests[0].settings.deep_shrink
        if shrink is None:
            yield None
            return
        label = requests[0].label
        if shrink.ds_depth_2 is not None and shrink.ds_timesteps_2 >= shrink.ds_timesteps_1:
            logger.warning(
                "%s: --ds_depth_2 never acts: it would act from --ds_timesteps_1 (%d) down to "
                "--ds_timesteps_2 (%d). Use a lower --ds_timesteps_2.",
                label,
                shrink.ds_timesteps_1,
                shrink.ds_timesteps_2,
            )
        hooks = _ShrinkHooks(shrink, input_blocks(self.unet))
        num_blocks = len(hooks.blocks)
        for name, depth in (("ds_depth_1", shrink.ds_depth_1), ("ds_depth_2", shrink.ds_depth_2)):
            if depth is not None and not 0 <= depth < num_blocks:
                raise OptionError(
                    f"--{name} {depth}: this model's U-Net has the input blocks 0 to "
                    f"{num_blocks - 1}. Pass one of them, such as 3"
                )
        with ExitStack() as stack:
            for handle in _register_hooks(hooks, self.unet):
                stack.callback(handle.remove)
            yield hooks
        if requests[0].image is not None and not hooks.has_acted:
            logger.warning(
                "%s: Deep Shrink never acts: with this --strength all timesteps are below --ds_timesteps_1 "
                "(%d). Use a lower one, or a higher --strength.",
                label,
                shrink.ds_timesteps_1,
            )


def input_blocks(unet: Any) -> list[nn.Module]:
    """Return the modules of the U-Net's encoder half in the order of LDM's `input_blocks`."""
    blocks = [unet.conv_in]
    for block in unet.down_blocks:
        blocks += [*block.resnets, *(block.downsamplers or ())]
    return blocks


def make_smaller(features: Tensor, ratio: float) -> Tensor:
    """Resize features B C h w by `ratio` with bicubic interpolation in float32; sides are at least 1."""
    height, width = features.shape[-2:]
    if min(height, width) * ratio < 1:
        size = smaller_size((height, width), ratio)
        return interpolate(features.float(), size, mode="bicubic").to(features.dtype)
    return interpolate(features.float(), scale_factor=ratio, mode="bicubic").to(features.dtype)


def smaller_size(size: Size, ratio: float) -> Size:
    """Multiply a size by a ratio; sides are at least 1."""
    return max(int(size[0] * ratio), 1), max(int(size[1] * ratio), 1)


def resize_like(features: Tensor, size: Size) -> Tensor:
    """Resize features B C h w to `size` with bicubic interpolation in float32, unless they have this size."""
    if tuple(features.shape[-2:]) == size:
        return features
    return interpolate(features.float(), size, mode="bicubic").to(features.dtype)


@dataclass(eq=False)
class _ShrinkHooks:
    """`UnetHook` that enables or disables Deep Shrink's forward hooks before each U-Net call."""

    shrink: DeepShrinkOptions
    blocks: Sequence[nn.Module]
    depth: int | None = None  # depth at which features are made smaller in this call; None if they are not
    has_acted: bool = False
    sample_size: Size = (0, 0)  # size of the sample
    # sizes of the skips that the running output block takes, in order of use
    skip_sizes: list[Size] = field(default_factory=list)

    def __call__(self, call: UnetCall) -> UnetCall:
        """Select the depth at which features shrink in this call, and fit a ControlNet's residuals to it."""
        shrink = self.shrink
        if call.timestep >= shrink.ds_timesteps_1:
            self.depth = shrink.ds_depth_1
        elif call.timestep >= shrink.ds_timesteps_2:
            self.depth = shrink.ds_depth_2
        else:
            self.depth = None
        self.has_acted = self.has_acted or self.depth is not None
        height, width = call.sample.shape[-2:]
        self.sample_size = height, width
        if self.depth is None or call.residuals is None:
            return call
        # a ControlNet runs at full size, so its residuals must be resized to the features' size
        skip_residuals, middle_residual = call.residuals
        # The output size (height, width) of each input block in this U-Net call
        size = self.sample_size
        sizes = []
        for depth, block in enumerate(self.blocks):
            if depth == self.depth:
                size = smaller_size(size, self.shrink.ds_ratio)
            if isinstance(block, Downsample2D):
                size = ceil_div(size[0], 2), ceil_div(size[1], 2)
            sizes.append(size)
        resized = [resize_like(skip, size) for skip, size in zip(skip_residuals, sizes, strict=True)]
        return replace(call, residuals=(resized, resize_like(middle_residual, sizes[-1])))

    # What the hooks call

    def enter_block(self, depth: int, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Shrink the features that enter the input block at `self.depth`; None for all other blocks."""
        if depth != self.depth:
            return None
        return make_smaller(args[0], self.shrink.ds_ratio), *args[1:]

    def enter_up_block(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Resize features to an output block's first skip connection; store the sizes of all its skips."""
        if self.depth is None:
            return None
        self.skip_sizes = [_size(skip) for skip in reversed(kwargs["res_hidden_states_tuple"])]
        upsample_size = kwargs.get("upsample_size")
        # for an image with an odd side diffusers' U-Net enlarges straight to the next skip's size, which is
        # right unless that skip is from before the features were made smaller
        if upsample_size is not None and [ceil_div(side, 2) for side in upsample_size] != list(
            self.skip_sizes[-1]
        ):
            upsample_size = None
        fitted = resize_like(kwargs["hidden_states"], self.skip_sizes[0])
        return args, {**kwargs, "hidden_states": fitted, "upsample_size": upsample_size}

    def leave_layer(self, layer: int, output: Any) -> Any:
        """Resize a layer's output to match the skip connection that the block's next layer concatenates.

        Return None, which leaves the output unchanged, if no features are shrunk in this call.
        """
        if self.depth is None:
            return None
        size = self.skip_sizes[layer + 1]
        if isinstance(output, tuple):
            return resize_like(output[0], size), *output[1:]
        return resize_like(output, size)


def _size(features: Tensor) -> Size:
    height, width = features.shape[-2:]
    return height, width


def _register_hooks(hooks: _ShrinkHooks, unet: Any) -> Iterator[Any]:
    """Add the forward hooks of Deep Shrink to diffusers' U-Net; yield the handles that remove them."""
    # The lambdas bind loop variables as defaults.
    for depth, block in enumerate(hooks.blocks):
        yield block.register_forward_pre_hook(lambda _, args, depth=depth: hooks.enter_block(depth, args))
    for up_block in unet.up_blocks:
        yield up_block.register_forward_pre_hook(
            lambda _, args, kwargs: hooks.enter_up_block(args, kwargs), with_kwargs=True
        )
        layers = list(getattr(up_block, "attentions", None) or up_block.resnets)
        # after each layer but the last, resize features to the skip that the next layer concatenates
        for layer, module in enumerate(layers[:-1]):
            yield module.register_forward_hook(
                lambda _, args, output, layer=layer: hooks.leave_layer(layer, output)
            )
    # if features were shrunk in this call, resize the output to the sample's size
    yield unet.conv_norm_out.register_forward_pre_hook(
        lambda _, args: None if hooks.depth is None else resize_like(args[0], hooks.sample_size)
    )


# Gradual Latent: denoising begins with small latents, which grow during sampling, with the sampler euler_a.
#
# A step that enlarges the latents resizes its sample and the U-Net's output; Euler's step and the fresh noise
# then have the new size. An unsharp mask can compensate for the blur of resizing. Source:
# kohya-ss, "Gradual Latent", 2023; the steps: Karras et al. 2022, arXiv 2206.00364, in the ancestral form of
# k-diffusion.
SAMPLERS = ("euler_a", "k_euler_a")
STEP = 8  # sides of the small latents are multiples of this, because the U-Net halves them repeatedly
NEARLY_ONE = 1 - 1e-6  # a ratio of at least this counts as 1, because its sum is rounded


def scale_size(full: Size, ratio: float) -> Size:
    """Multiply a latent size by a ratio and round down to multiples of 8, but not below 8."""
    if ratio >= NEARLY_ONE:
        return full
    height, width = (max(int(side * ratio) // STEP * STEP, min(STEP, side)) for side in full)
    return height, width


def plan_growth(timesteps: Sequence[float], gradual: GradualLatentOptions) -> dict[int, float]:
    """Return the size ratio after each step that enlarges the latents, by step index.

    Args:
        timesteps: Decreasing timesteps of the steps to run; step indices refer to them.
        gradual: Options of Gradual Latent.
    """
    ratio_after_step: dict[int, float] = {}
    ratio = gradual.gradual_latent_ratio
    last_growth: int | None = None
    for index, timestep in enumerate(timesteps):
        is_due = last_growth is None or index - last_growth >= gradual.gradual_latent_every_n_steps
        if timestep < (gradual.gradual_latent_timesteps or 0) and ratio < NEARLY_ONE and is_due:
            num_grown = len(ratio_after_step) + 1
            ratio = min(gradual.gradual_latent_ratio + num_grown * gradual.gradual_latent_ratio_step, 1.0)
            ratio_after_step[index] = ratio
            last_growth = index
    return ratio_after_step


def _warn_of_gradual_sizes(
    full_size: Size, first_size: Size, last_size: Size, gradual: GradualLatentOptions
) -> None:
    """Warn if Gradual Latent begins with latents of full size, or ends with smaller ones."""
    if first_size == full_size and gradual.gradual_latent_ratio < NEARLY_ONE:
        logger.warning(
            "--gradual_latent_timesteps (--glt) does nothing for %d x %d pixels: its first size, rounded to "
            "multiples of %d pixels, is the same. Pass larger --W and --H, or a smaller "
            "--gradual_latent_ratio.",
            full_size[1] * STRIDE,
            full_size[0] * STRIDE,
            STEP * STRIDE,
        )
    if last_size != full_size:
        logger.warning(
            "Gradual Latent ends at %d x %d pixels instead of %d x %d: there are too few steps to grow. "
            "Use more --steps, a larger --gradual_latent_ratio_step or a higher "
            "--gradual_latent_timesteps.",
            last_size[1] * STRIDE,
            last_size[0] * STRIDE,
            full_size[1] * STRIDE,
            full_size[0] * STRIDE,
        )


def begin_small(
    latents: Tensor, sampler: SchedulerSolver, gradual: GradualLatentOptions
) -> tuple[Tensor, SchedulerSolver]:
    """Return the start latents, B C 1 h w, at their first size, and the sampler that enlarges them later.

    If there are no steps, both are returned unchanged.

    Raises:
        OptionError: If the blur of an unsharp mask is larger than the latents.
    """
    if sampler.first_index >= sampler.schedule.num_steps:
        return latents, sampler
    full_size = _size(latents)
    unsharp = gradual.unsharp
    timesteps = sampler.schedule.timesteps[sampler.first_index :].tolist()
    ratio_after_step: dict[int, float] = {}  # by index in the whole schedule
    for index, ratio in plan_growth(timesteps, gradual).items():
        ratio_after_step[sampler.first_index + index] = ratio
    sizes = [scale_size(full_size, ratio) for ratio in ratio_after_step.values()]
    # the blur pads by half of its width, which has to be less than the shortest enlarged side
    if unsharp is not None and sizes and unsharp.ksize // 2 >= min(sizes[0]):
        raise OptionError(
            f"the blur of {unsharp.ksize} of --gradual_latent_unsharp_params (--glus) is too large for "
            f"latents of {sizes[0][1]} x {sizes[0][0]}. Use a smaller one, such as 3"
        )
    first_size = scale_size(full_size, gradual.gradual_latent_ratio)
    _warn_of_gradual_sizes(full_size, first_size, sizes[-1] if sizes else first_size, gradual)
    growing = GrowingSteps(
        sampler.scheduler,
        full_size,
        ratio_after_step=ratio_after_step,
        unsharp=unsharp,
        s_noise=gradual.gradual_latent_s_noise,
    )
    return resize_latents(latents, first_size), replace(sampler, wrap_step=growing)


def check_batch(requests: Sequence[RequestedImage], sampler: str) -> None:
    """Raise OptionError if Gradual Latent does not support a batch."""
    if sampler not in SAMPLERS:
        raise OptionError(
            f"{requests[0].label}: Gradual Latent (--gradual_latent_timesteps, --glt) works with --sampler "
            f"euler_a only, not with {sampler}"
        )
    if any(map(is_masked, requests)):
        raise OptionError(
            f"{requests[0].label}: Gradual Latent (--gradual_latent_timesteps, --glt) cannot be used with a "
            "mask: the unmasked part of the image has its full size. Omit one"
        )


@dataclass(frozen=True, eq=False)
class GrowingSteps:
    """Step function for euler_a that enlarges the sample before some steps, so new noise fits its size."""

    scheduler: Any
    full_size: Size
    ratio_after_step: Mapping[int, float]  # ratio to the full size, by index in the schedule; none: no growth
    unsharp: Unsharp | None
    s_noise: float

    def __call__(self, step: MakeStep, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Return the next sample, which is larger if this step enlarges it.

        Args:
            step: Takes a step of the sampler.
            index: Index of the step.
            velocity: Output of the U-Net.
            sample: Noisy latents.
        """
        if index not in self.ratio_after_step:
            return step(index, velocity, sample)
        size = scale_size(self.full_size, self.ratio_after_step[index])
        sample = resize_latents(sample.float(), size)
        velocity = resize_latents(velocity.float(), size)
        stepped = step(index, velocity, sample)
        if self.unsharp is None and self.s_noise == 1:
            return stepped
        # separate the step without noise, which is sharpened, from the noise that euler_a added
        # The sample's change in an Euler step, without the noise of euler_a
        scheduler = self.scheduler
        sigma, next_sigma = (float(scheduler.sigmas[sigma_index]) for sigma_index in (index, index + 1))
        if scheduler.config.prediction_type == "v_prediction":
            # the predicted clean sample is x / (s^2 + 1) - v s / sqrt(s^2 + 1)
            derivative = sample * (sigma / (sigma**2 + 1)) + velocity / (sigma**2 + 1) ** 0.5
        else:
            derivative = velocity
        added_noise = next_sigma * (max(sigma**2 - next_sigma**2, 0.0) ** 0.5) / sigma
        sigma_without_noise = max(next_sigma**2 - added_noise**2, 0.0) ** 0.5
        change = derivative * (sigma_without_noise - sigma)
        noise = stepped - (sample + change)
        return self._add_sharpened(sample, change) + self.s_noise * noise

    def _add_sharpened(self, sample: Tensor, change: Tensor) -> Tensor:
        """Return `sample + change`; the sum or only the sample is sharpened, if at all."""
        if self.unsharp is None:
            return sample + change
        if self.unsharp.sharpens_result:
            return sharpen(sample + change, self.unsharp)
        return sharpen(sample, self.unsharp) + change


def resize_latents(latents: Tensor, size: Size) -> Tensor:
    """Resize latents B C 1 h w with bicubic interpolation; return them unchanged if the size is equal."""
    if _size(latents) == size:
        return latents
    return interpolate(latents.squeeze(2), size, mode="bicubic").unsqueeze(2)


def sharpen(latents: Tensor, unsharp: Unsharp) -> Tensor:
    """Return x + (x - blur(x)) * strength for latents B C 1 h w.

    The blur is Gaussian with a `ksize` x `ksize` kernel and reflection padding.
    """
    radius = unsharp.ksize // 2
    positions = torch.arange(unsharp.ksize, dtype=torch.float32) - radius
    row = torch.exp(-0.5 * (positions / unsharp.sigma) ** 2)
    row = (row / row.sum()).to(latents.device, latents.dtype)
    images = latents.squeeze(2)
    channels = images.shape[1]
    kernel = torch.outer(row, row).expand(channels, 1, -1, -1)
    blurred = conv2d(pad(images, (radius,) * 4, mode="reflect"), kernel, groups=channels)
    return (images + (images - blurred) * unsharp.strength).unsqueeze(2)
