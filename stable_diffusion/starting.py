"""Start of denoising: noise, a noisy image, or an image to repaint under a mask.

An image's generator draws in the order of diffusers' pipelines: the posterior of the input image, the start
noise, the posterior of the masked image, then the noise of the steps.
"""

# Letters: B images, h w latent size, H W in pixels: 8 times as much

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from modules.errors import OptionError
from modules.media.reading import read_image, read_mask
from stable_diffusion.contract import ImageSettings, Model, RequestedImage, SecondStageInput
from stable_diffusion.samplers import MakeStep, SchedulerSolver
from stable_diffusion.sampling_options import StartNoiseOptions

# Changes to the start noise of some images: pyramid noise and noise offset (--pyramid_noise_prob,
# --noise_offset_prob).
#
# All random numbers come from the image's own generator, and options that are off draw none. So an image
# does not depend on its batch, and these options change nothing if they are left out.
LEVELS = 6  # maximum number of levels of pyramid noise, as in training with it
# each level is smaller than the one before by a factor that is drawn between these
MIN_STEP, MAX_STEP = 2.0, 4.0


def vary_noise(noise: Tensor, options: StartNoiseOptions, generator: torch.Generator) -> Tensor:
    """Add pyramid noise, then an offset, each with its probability.

    Args:
        noise: Noise of standard deviation 1, C h w.
        options: Options of the noise.
        generator: Source of random numbers.
    """
    if _draw_hit(options.pyramid_noise_prob, generator):
        assert options.pyramid_noise_discount_range is not None
        noise = add_pyramid(noise, _draw_between(options.pyramid_noise_discount_range, generator), generator)
    if _draw_hit(options.noise_offset_prob, generator):
        assert options.noise_offset_range is not None
        noise = add_offset(noise, _draw_between(options.noise_offset_range, generator), generator)
    return noise


def add_offset(noise: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Add a Gaussian offset per channel, scaled by `amount`, to noise C h w (Guttenberg 2023)."""
    return noise + amount * _draw((len(noise), 1, 1), noise, generator)


def add_pyramid(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Add coarser noise to C h w, level i times discount^i, and scale the sum to a standard deviation of 1.

    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    channels, height, width = noise.shape
    total = noise
    level_height = float(height)
    level_width = float(width)
    for level in range(1, LEVELS + 1):
        step = _draw_between((MIN_STEP, MAX_STEP), generator)
        level_height = max(level_height / step, 1.0)
        level_width = max(level_width / step, 1.0)
        coarse = _draw((channels, int(level_height), int(level_width)), noise, generator)
        fine = interpolate(coarse[None], (height, width), mode="bilinear")[0]
        total = total + fine * discount**level
        if min(level_height, level_width) <= 1:
            break
    return total / total.std()


def _draw_hit(probability: float | None, generator: torch.Generator) -> bool:
    return bool(probability) and _draw_between((0.0, 1.0), generator) < (probability or 0)


def _draw_between(limits: tuple[float, ...], generator: torch.Generator) -> float:
    share = torch.rand((), generator=generator, device=generator.device).item()
    return limits[0] + (limits[1] - limits[0]) * share


def _draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(like.device, like.dtype)


# Inpainting: after each step the unmasked (black) area is restored at the current noise level.
def mask_pixels(mask: Image.Image, width: int, height: int) -> Tensor:
    """Return a resized mask, 1 1 H W: 1 (repaint) where it is at least half gray, else 0, as in diffusers."""
    gray = fit(mask.convert("RGB"), width, height).convert("L")
    values = torch.from_numpy(np.asarray(gray, dtype=np.float32) / 255)
    return (values >= 0.5).float()[None, None]


@dataclass(frozen=True, eq=False)
class Inpainting:
    """Solver step that repaints only the masked area.

    After each step the latents become
        noisy original * (1 - mask) + latents * mask
    and after the last step, the original without noise is used.
    """

    sampler: SchedulerSolver
    original: Tensor  # B 4 h w, scaled as the U-Net sees them
    noise: Tensor  # B 4 h w, the start noise
    mask: Tensor  # B 1 h w; 1 is repainted

    def __call__(self, step: MakeStep, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Take a step, then restore the latents outside of the mask."""
        painted = step(index, velocity, sample).squeeze(2)
        original = self.original
        if index + 1 < self.sampler.schedule.num_steps:
            original = self.sampler.add_noise(index + 1, original, self.noise)
        return ((1 - self.mask) * original + self.mask * painted).unsqueeze(2)


CHANNELS = 4  # number of latent channels


@dataclass(frozen=True, eq=False)
class Beginning:
    """Initial latents of the denoising loop, and the sampler to use."""

    latents: Tensor  # B 4 1 h w, float32, the sampler's input at its first step
    sampler: SchedulerSolver
    inpainting: Tensor | None = None  # see `UnetPasses`


def is_masked(request: RequestedImage) -> bool:
    """Return whether the mask selects an area to repaint, rather than regions of prompt parts."""
    return request.mask is not None and request.settings.num_parts == 1


def find_strength(request: RequestedImage, start: SecondStageInput | None) -> float | None:
    """Return which fraction of the steps to run on an input image; None if sampling starts from noise."""
    return None if request.image is None and start is None else request.settings.strength


def check_start(model: Model, request: RequestedImage, start: SecondStageInput | None) -> None:
    """Raise OptionError for a mask without an image, or an inpainting checkpoint without a mask."""
    if is_masked(request) and request.image is None and start is None:
        raise OptionError(
            f"{request.label}: the mask {request.mask} needs --image_path, the image that is repainted "
            "where it is white"
        )
    if model.is_inpainting and not is_masked(request):
        raise OptionError(
            f"{request.label}: {model.path} is an inpainting checkpoint, which needs an image and its "
            "mask, and does not support regions for parts of a prompt. Use another checkpoint, or omit "
            "AND"
        )


def begin(
    model: Model,
    requests: Sequence[RequestedImage],
    start: SecondStageInput | None,
    sampler: SchedulerSolver,
    noise_options: StartNoiseOptions,
    restores_unmasked: bool = False,
) -> Beginning:
    """Return a batch's start latents, B 4 1 h w, the sampler, and an inpainting U-Net's additional inputs.

    1. Without an input image: noise.
    2. With one: encode it, and blend it with noise by the strength.
    3. With a mask too: pass it to an inpainting U-Net, or let the sampler restore the unmasked area.

    Args:
        model: The loaded model.
        requests: Requested images; all or none have an input image, and likewise a mask.
        start: Latents or images to start from, one per requested image; None uses the requests' images.
        sampler: The sampler.
        noise_options: Options of the noise.
        restores_unmasked: Whether latents outside the mask are replaced by the image's after each step
            even for inpainting models, unlike in diffusers' pipelines. Other models always do this.

    Raises:
        MediaError: If an input image or a mask cannot be read.
    """
    settings = requests[0].settings
    if find_strength(requests[0], start) is None:  # there is no input image
        noise = _draw_start_noise(model, settings, sampler.generators, noise_options)
        return Beginning((noise * sampler.noise_level).unsqueeze(2), sampler)
    has_mask = is_masked(requests[0])
    restores_unmasked = restores_unmasked or not model.is_inpainting
    # inpainting with strength 1 starts from pure noise
    starts_from_noise = has_mask and settings.strength == 1
    pixels = _start_pixels(requests, start)
    clean: Tensor | None = None
    if pixels is None:
        assert start is not None
        assert start.latents is not None
        clean = start.latents.to(model.device, torch.float32)
    elif restores_unmasked or not starts_from_noise:
        clean = encode_pixels(model, pixels, sampler.generators)
    noise = _draw_start_noise(model, settings, sampler.generators, noise_options)
    latents = _blend_with_noise(sampler, None if starts_from_noise else clean, noise)
    latents = latents.unsqueeze(2)  # the loop's latents have an axis of frames
    if not has_mask:
        return Beginning(latents, sampler)
    latent_mask, masked_latents = _encode_masked(model, pixels, _read_masks(requests), sampler.generators)
    inpainting: Tensor | None = None
    if model.is_inpainting:
        assert masked_latents is not None
        inpainting = torch.cat([latent_mask, masked_latents], dim=1)
    if restores_unmasked:
        assert clean is not None
        sampler = replace(sampler, wrap_step=Inpainting(sampler, clean, noise, latent_mask))
    return Beginning(latents, sampler, inpainting)


def _blend_with_noise(sampler: SchedulerSolver, clean: Tensor | None, noise: Tensor) -> Tensor:
    """Return the latents at which the sampler begins: `clean` with its first step's noise, or pure noise."""
    if clean is None:
        return noise * sampler.noise_level
    if sampler.first_index >= sampler.schedule.num_steps:  # no step is left
        return clean
    return sampler.add_noise(sampler.first_index, clean, noise)


def _encode_masked(
    model: Model, pixels: Tensor | None, masks: Tensor, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """Return the masks at latent size, B 1 H W, and the latents of the images with the masked area erased."""
    # The latents are None without images. They are computed even if the U-Net does not take them, so that the
    # generators then draw the same noise as in diffusers' pipeline.
    latent_mask = masks[:, :, ::STRIDE, ::STRIDE].to(model.device)  # the upper left pixel of each square
    if pixels is None:
        return latent_mask, None
    return latent_mask, encode_pixels(model, pixels * (1 - masks), generators)


def _draw_start_noise(
    model: Model,
    settings: ImageSettings,
    generators: Sequence[torch.Generator],
    noise_options: StartNoiseOptions,
) -> Tensor:
    """Draw initial noise with each image's own generator; return B 4 h w on the model's device."""
    shape = (CHANNELS, *latent_size(settings))
    noises = []
    for generator in generators:
        noises.append(vary_noise(torch.randn(shape, generator=generator), noise_options, generator))
    return torch.stack(noises).to(model.device)


def _start_pixels(requests: Sequence[RequestedImage], start: SecondStageInput | None) -> Tensor | None:
    """Return the input images as pixels, B 3 H W; None if generation starts from latents or noise."""
    images = None if start is None else start.images
    if start is None:
        images = [read_picture(request.image) for request in requests if request.image is not None]
    if images is None:
        return None
    settings = requests[0].settings
    return torch.cat([to_pixels(image, settings.width, settings.height) for image in images])


def _read_masks(requests: Sequence[RequestedImage]) -> Tensor:
    """Return the images' masks, B 1 H W, with 1 in the area to repaint."""
    settings = requests[0].settings
    masks = [Image.fromarray(read_mask(request.mask)) for request in requests if request.mask is not None]
    return torch.cat([mask_pixels(mask, settings.width, settings.height) for mask in masks])


# Images to latents and back, by the autoencoder of a model. Pixels are B 3 H W, -1..1.
logger = logging.getLogger(__name__)

STRIDE = 8  # pixels per latent, in each direction


def latent_size(settings: ImageSettings) -> tuple[int, int]:
    """Return the latent height and width of an image."""
    return settings.height // STRIDE, settings.width // STRIDE


def read_picture(path: Path) -> Image.Image:
    """Read an image as upright sRGB, with transparent pixels on white.

    Raises:
        MediaError: If the image cannot be read.
    """
    return Image.fromarray(read_image(path))


def to_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """Resize an image with Lanczos and return its pixels, 1 3 H W, float32."""
    resized = fit(picture.convert("RGB"), width, height)
    values = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
    return 2 * values.permute(2, 0, 1)[None] - 1


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image with Lanczos, unless it already has the size."""
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode_pixels(model: Model, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Encode images and sample the posteriors with their generators; return scaled latents, B 4 h w float32.

    Images are encoded one at a time, so that the result does not depend on the batch.
    """
    samples = []
    for image, generator in zip(pixels, generators, strict=True):
        posterior = model.vae.encode(image[None].to(model.device, model.vae_dtype)).latent_dist
        mean = posterior.mean.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        samples.append((mean + posterior.std.float() * noise) * model.kind.latent_scale)
    return torch.cat(samples)


@torch.no_grad()
def decode_latents(
    model: Model, latents: Tensor, labels: Sequence[str], vae_batch_size: float | None = None
) -> list[Image.Image]:
    """Decode latents B 4 h w to images.

    Args:
        model: The loaded model.
        latents: Latents, B 4 h w.
        labels: Names of the images for warnings.
        vae_batch_size: Number of images that the VAE decodes at once; None for all.
    """
    images: list[Image.Image] = []
    group_size = vae_batch(vae_batch_size, len(latents))
    for group in latents.split(group_size):
        pixels = model.vae.decode((group / model.kind.latent_scale).to(model.vae_dtype)).sample.float()
        for image in pixels:
            images.append(to_image(image, labels[len(images)]))
    return images


def to_image(pixels: Tensor, label: str) -> Image.Image:
    """Convert pixels, 3 H W, to an image; NaN becomes black, with a warning that contains `label`."""
    if not bool(pixels.isfinite().all()):
        logger.warning(
            "%s: the image has NaN or infinite pixels, which become black. A number was too large for 16 "
            "bits: try --no_half_vae, then --bf16 instead of --fp16",
            label,
        )
        pixels = pixels.nan_to_num(-1, -1, -1)
    values = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu() * 255
    return Image.fromarray(values.round().to(torch.uint8).numpy())


def vae_batch(size: float | None, count: int) -> int:
    """Return the number of images that the VAE processes at once.

    Args:
        size: Value of --vae_batch_size, a number or a fraction of the images; None for all images.
        count: Number of images.
    """
    if size is None:
        return count
    return max(int(size * count if size < 1 else size), 1)
