"""The autoencoder of Qwen-Image-2.1: images with alpha to latents and back.

It is Wan2.2's VAE for single frames: convolutions are 2-D, pixels have four channels, and no patches are cut.
Module names are those of the released file. Source: the released code of Qwen-Image-2.1.
"""
# Letters: B batch, C channels, Z latent channels, H height, W width (at the layer's own resolution)

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.encoders import declared_settings
from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.autoencoder import ImageVae
from encoders.frame_groups import RmsNorm
from modules.devices import dtype_name, tensor_on
from modules.errors import CheckpointError
from modules.layers.convolution import cast_for_convolution, repeat_pixels, set_memory_format
from modules.media.pixels import from_bytes
from protocols.loading import TensorSource
from wan.vae_blocks import WanFrameAttention
from wan.vae_shortcuts import Factors, add_repeated, average_groups, fits_shortcut

logger = logging.getLogger(__name__)

MODEL_KIND = "the VAE of Qwen-Image-2.1"
VAE_OPTION = "--vae"
FILES = "qwen_image_2.1_vae_bf16.safetensors of Comfy-Org, or the folder vae of Qwen/Qwen-Image-2.1"
CLASSES = ("AutoencoderKLQwenImage21",)  # in a config.json next to the file
FOLDER = "vae"  # path in the folder of a release
STRIDE = 16  # height and width of one latent pixel, in pixels
PIXEL_CHANNELS = 4  # red, green, blue, alpha
LARGEST = 1e6  # mean or deviation of latents; float32 has room for these
OPAQUE = 1.0  # alpha of an image without transparency, in -1..1

# fmt: off
# statistics of the latents, per channel. Source: defaults of diffusers' AutoencoderKLQwenImage21
MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177, -0.651, 0.2732,
    0.7562, -0.6163, -1.0277, 3.8363, 2.021, 0.0472, 0.932, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464,
    -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955, -0.0342, -1.0265, -0.7636,
    3.0555, 0.0746, -3.0751, -0.1076, 1.7376, -1.0914, -1.9435, -0.2784, -1.368, 0.4809, -0.4433,
    0.3764, 0.5729, -2.0595, 1.096, -1.326, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505, 0.3026, 1.9373,
    1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)
DEVIATION = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.791, 3.0785, 3.65, 3.9308, 3.0904, 2.8778,
    3.7675, 3.732, 5.0756, 3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489, 3.4896,
    3.8513, 3.9323, 3.4719, 3.7498, 4.283, 3.5694, 4.2467, 3.9037, 3.2947, 5.077, 3.5075, 3.27, 3.4767,
    2.8063, 5.1125, 3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875, 3.9624, 4.0168,
    3.5643, 4.055, 5.5614, 4.2963, 4.408, 3.4959, 3.8747, 3.7608, 3.5735, 3.149, 3.7662, 3.6746, 3.4563,
    3.8161,
)
# fmt: on


@dataclass(frozen=True)
class VaeLevel:
    """Channels and blocks of one resolution in the encoder or decoder."""

    width_in: int
    width_out: int
    blocks: int
    factors: Factors  # frames, rows and columns that the shortcut merges into one, or expands one into


@dataclass(frozen=True)
class QwenImage21VaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors, and statistics of its latents."""

    latent_channels: int
    encoder: tuple[VaeLevel, ...]
    decoder: tuple[VaeLevel, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class ImageConv(nn.Conv2d):
    """A 2D convolution for clips of one frame, B C 1 H W."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, B C 1 H W to B C' 1 H W."""
        return super().forward(x.squeeze(2)).unsqueeze(2)


class ImageResidual(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width_in)
        self.conv1 = ImageConv(width_in, width_out, 3, padding=1)
        self.norm2 = RmsNorm(width_out)
        self.conv2 = ImageConv(width_out, width_out, 3, padding=1)
        self.conv_shortcut = ImageConv(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x, B C 1 H W to B C' 1 H W."""
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class ImageMiddle(nn.Module):
    """Two residual blocks with self-attention among all pixels between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ImageResidual(width, width), ImageResidual(width, width)])
        self.attentions = nn.ModuleList([WanFrameAttention(width)])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers to x, B C 1 H W."""
        before, after = self.resnets
        (attention,) = self.attentions
        h: Tensor = after(attention(before(x), None))
        return h


class ImageResample(nn.Module):
    """Halve or double height and width; the released layers over time leave a single frame unchanged."""

    def __init__(self, width: int, is_down: bool) -> None:
        super().__init__()
        stride, padding = (2, 0) if is_down else (1, 1)
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=stride, padding=padding)})
        self.is_down = is_down

    def forward(self, x: Tensor) -> Tensor:
        """Resample x, B C 1 H W, to the next resolution."""
        image = x.squeeze(2)
        # one row more below and one column more at the right, as trained
        image = F.pad(image, (0, 1, 0, 1)) if self.is_down else repeat_pixels(image, 2)
        h: Tensor = self.resample["1"](image)
        return h.unsqueeze(2)


class DownLevel(nn.Module):
    """Encoder blocks of one resolution; averages of their input are added to their output."""

    def __init__(self, level: VaeLevel) -> None:
        super().__init__()
        self.resnets = _blocks(level)
        self.downsampler = ImageResample(level.width_out, is_down=True) if _resamples(level) else None
        self.factors = level.factors

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to x, and add averaged groups of x to the result."""
        h = x
        for block in self.resnets:
            h = block(h)
        if self.downsampler is not None:
            h = self.downsampler(h)
        return h.add_(average_groups(x, h.shape[1], self.factors))


class UpLevel(nn.Module):
    """Decoder blocks of one resolution; with upsampling, the repeated input is added to the output."""

    def __init__(self, level: VaeLevel) -> None:
        super().__init__()
        self.resnets = _blocks(level)
        self.upsampler = ImageResample(level.width_out, is_down=False) if _resamples(level) else None
        self.factors = level.factors

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to x; if they upsample, add repeated values of x."""
        h = x
        for block in self.resnets:
            h = block(h)
        if self.upsampler is None:
            return h
        return add_repeated(self.upsampler(h), x, self.factors)


def _blocks(level: VaeLevel) -> nn.ModuleList:
    widths = [level.width_in] + [level.width_out] * level.blocks
    return nn.ModuleList(ImageResidual(widths[index], widths[index + 1]) for index in range(level.blocks))


def _resamples(level: VaeLevel) -> bool:
    return level.factors != (1, 1, 1)


class ImageEncoder(nn.Module):
    """Encode pixels, B 4 1 H W, as moments before the last convolution, B 2Z 1 h w."""

    def __init__(self, config: QwenImage21VaeConfig) -> None:
        super().__init__()
        levels = config.encoder
        width = levels[-1].width_out
        self.conv_in = ImageConv(PIXEL_CHANNELS, levels[0].width_in, 3, padding=1)
        self.down_blocks = nn.ModuleList(DownLevel(level) for level in levels)
        self.mid_block = ImageMiddle(width)
        self.norm_out = RmsNorm(width)
        self.conv_out = ImageConv(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode pixels x, B 4 1 H W, to posterior moments, B 2Z 1 h w."""
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        h = self.mid_block(h)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(h), inplace=True))
        return moments


class ImageDecoder(nn.Module):
    """Decode latents after the first convolution, B Z 1 h w, to pixels, B 4 1 H W."""

    def __init__(self, config: QwenImage21VaeConfig) -> None:
        super().__init__()
        levels = config.decoder
        self.conv_in = ImageConv(config.latent_channels, levels[0].width_in, 3, padding=1)
        self.mid_block = ImageMiddle(levels[0].width_in)
        self.up_blocks = nn.ModuleList(UpLevel(level) for level in levels)
        self.norm_out = RmsNorm(levels[-1].width_out)
        self.conv_out = ImageConv(levels[-1].width_out, PIXEL_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents x, B Z 1 h w, to RGBA pixels, B 4 1 H W."""
        h = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            h = level(h)
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(h), inplace=True))
        return pixels


class QwenImage21Vae(ImageVae):
    """Encoder and decoder. Latents B Z 1 h w are in model space. Load one with `load_vae`.

    Images of a batch are computed one after another, so that memory does not grow with their number and no
    result depends on the rest of the batch.
    """

    stride = STRIDE

    def __init__(self, config: QwenImage21VaeConfig, tile: int | None = None) -> None:
        super().__init__(tile)
        channels = config.latent_channels
        self.encoder = ImageEncoder(config)
        self.quant_conv = ImageConv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = ImageConv(channels, channels, 1)
        self.decoder = ImageDecoder(config)
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.quant_conv.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return the normalized means of the posterior, B Z 1 h w float32, on the VAE's device.

        Args:
            pixels: B 4 1 H W in -1..1, or bytes 0..255, on any device; with three channels they are opaque. H
                and W are multiples of 16.
            generators: Must be None, because nothing is drawn.

        Raises:
            ValueError: For other sizes.
        """
        if generators is not None:
            raise ValueError("the latents are means of the posterior: nothing is drawn")
        return torch.cat([self.moments(add_alpha(image)) for image in pixels.split(1)])

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """Decode normalized latents B Z 1 h w to pixels B 4 1 H W, without clamping them to -1..1."""
        images = []
        for image in latents.split(1):
            images.append(super().decode_unclamped(image))
        return torch.cat(images)

    def _moments(self, pixels: Tensor) -> Tensor:
        """Return the normalized posterior means, B Z h w float32, of RGBA pixels B 4 H W."""
        if pixels.dtype == torch.uint8:
            pixels = from_bytes(pixels.to(self.device))
        frames = cast_for_convolution(pixels, self.device, self.dtype)
        moments = self.quant_conv(self.encoder(frames.unsqueeze(2))).squeeze(2)
        mean, deviation = self._statistics()
        means = moments.chunk(2, dim=1)[0].float()
        return (means - mean) / deviation

    def _pixels(self, latents: Tensor) -> Tensor:
        """Decode normalized latents, B Z h w, to RGBA pixels, B 4 H W float32."""
        mean, deviation = self._statistics()
        # in float32: 16 bits would tint every image
        scaled = latents.to(self.device).float() * deviation + mean
        means = cast_for_convolution(scaled, self.device, self.dtype)
        pixels: Tensor = self.decoder(self.post_quant_conv(means.unsqueeze(2)))
        return pixels.squeeze(2).float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents, Z 1 1, float32."""
        mean = tensor_on(self.device, self.config.mean, torch.float32)
        deviation = tensor_on(self.device, self.config.deviation, torch.float32)
        return mean.view(-1, 1, 1), deviation.view(-1, 1, 1)


def add_alpha(pixels: Tensor) -> Tensor:
    """Add an opaque alpha channel to pixels, B 3 F H W uint8 or -1..1; leave four channels unchanged."""
    if pixels.shape[1] == PIXEL_CHANNELS:
        return pixels
    opaque = 255 if pixels.dtype == torch.uint8 else OPAQUE
    alpha = torch.full_like(pixels[:, :1], opaque)
    return torch.cat([pixels, alpha], dim=1)


def read_vae(checkpoint: Checkpoint) -> LoadPlan[QwenImage21VaeConfig]:
    """Plan how to load Qwen-Image-2.1's VAE, from a single file or a diffusers folder.

    Raises CheckpointError for any other file, or if config.json next to it does not fit.
    """
    checkpoint = checkpoint.without_prefix(
        "first_stage_model.", "vae.", ignored_prefixes=("model.diffusion_model.", "text_encoders.")
    )
    wrong = make_wrong_kind_error(checkpoint, MODEL_KIND, VAE_OPTION, FILES)
    sources = list_tensor_sources(checkpoint)
    if "quant_conv.weight" not in sources or "encoder.down_blocks.0.resnets.0.norm1.gamma" not in sources:
        raise wrong
    shape = make_shape_reader(checkpoint, sources, wrong)
    latent_channels = shape("post_quant_conv.weight")[1]
    encoder = _read_levels(shape, sources, "encoder.down_blocks", "downsampler")
    decoder = _read_levels(shape, sources, "decoder.up_blocks", "upsampler")
    channels = shape("encoder.conv_in.weight")[1], shape("decoder.conv_out.weight")[0]
    if channels != (PIXEL_CHANNELS, PIXEL_CHANNELS):
        raise CheckpointError(
            f"{checkpoint.path}: this VAE takes {channels[0]} channels of pixels and returns {channels[1]}; "
            f"{MODEL_KIND} has {PIXEL_CHANNELS} (red, green, blue, alpha). Pass {FILES}.",
            checkpoint.path,
        )
    _check_levels(checkpoint, "encoder", encoder, is_down=True)
    _check_levels(checkpoint, "decoder", decoder, is_down=False)
    mean, deviation = _read_statistics(checkpoint, latent_channels)
    config = QwenImage21VaeConfig(
        latent_channels=latent_channels,
        encoder=encoder,
        decoder=decoder,
        mean=mean,
        deviation=deviation,
    )
    # layers over time: a single frame passes them unchanged
    return LoadPlan(config, checkpoint, sources, ignore=("*.time_conv.*",))


def _read_levels(
    shape: Callable[..., tuple[int, ...]], sources: Mapping[str, TensorSource], start: str, resampler: str
) -> tuple[VaeLevel, ...]:
    """Return widths, blocks and resampling factors of the encoder's or the decoder's levels."""
    # `start` names the list of levels, `resampler` the resampling layer at the end of a level.
    levels = []
    for index in range(count(sources, rf"{re.escape(start)}\.\d+")):
        name = f"{start}.{index}"
        width_out, width_in = shape(f"{name}.resnets.0.conv1.weight")[:2]
        space_factor = 2 if f"{name}.{resampler}.resample.1.weight" in sources else 1
        time_factor = 2 if f"{name}.{resampler}.time_conv.weight" in sources else 1
        blocks = count(sources, rf"{re.escape(name)}\.resnets\.\d+")
        levels.append(
            VaeLevel(width_in, width_out, blocks, factors=(time_factor, space_factor, space_factor))
        )
    return tuple(levels)


def _check_levels(checkpoint: Checkpoint, half: str, levels: Sequence[VaeLevel], is_down: bool) -> None:
    """Raise CheckpointError if levels do not fit each other, or do not scale the sides by STRIDE in total."""
    # `half` is encoder or decoder, and `is_down` true for the encoder.
    scale = math.prod(level.factors[1] for level in levels)
    error = None
    if scale != STRIDE:
        error = f"its {half} scales height and width by {scale}, not by {STRIDE}"
    for current, following in pairwise(levels):
        if current.width_out != following.width_in:
            error = f"a level of its {half} has {current.width_out} channels, the next {following.width_in}"
    for level in levels:
        has_shortcut = is_down or _resamples(level)
        if has_shortcut and not fits_shortcut(level.width_in, level.width_out, level.factors, is_down):
            widths = f"{level.width_in} to {level.width_out} channels"
            error = f"a level of its {half} from {widths} cannot have a shortcut"
    if error is not None:
        raise CheckpointError(
            f"{checkpoint.path}: {error}. The file contains another model than {MODEL_KIND}, or tensors are "
            f"missing. Pass {FILES}.",
            checkpoint.path,
        )


def _read_statistics(checkpoint: Checkpoint, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the latents' mean and deviation from config.json next to the file, or else the released ones."""
    # Without config.json, only the released number of channels is accepted.
    path, settings = declared_settings(checkpoint, CLASSES)
    means = settings.get("latents_mean", MEAN)
    deviations = settings.get("latents_std", DEVIATION)
    for name, values in (("latents_mean", means), ("latents_std", deviations)):
        if name not in settings and channels != len(MEAN):
            raise CheckpointError(
                f"{checkpoint.path}: this VAE has {channels} latent channels, the released one has "
                f'{len(MEAN)}. Put the config.json with its "{name}" next to the file.',
                checkpoint.path,
            )
        minimum = 1 / LARGEST if name == "latents_std" else -LARGEST
        if not _are_numbers(values, channels, minimum):
            meaning = "positive numbers" if name == "latents_std" else "numbers"
            raise CheckpointError(
                f'{path}: "{name}" must be a list of {channels} {meaning}, one for each latent channel. '
                "Copy the config.json of the release again.",
                path,
            )
    return tuple(means), tuple(deviations)


def _are_numbers(values: Any, length: int, minimum: float) -> bool:
    if not isinstance(values, list | tuple) or len(values) != length:
        return False
    return all(type(value) in (int, float) and minimum <= value <= LARGEST for value in values)


def read_vae_config(path: Path) -> QwenImage21VaeConfig:
    """Read the VAE's dimensions from the header of a file, or of a release folder's `vae`.

    Raises CheckpointError if it is missing, damaged or for another model.
    """
    return read_once(inside(path, FOLDER), read_vae).config


def load_vae(path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = None) -> QwenImage21Vae:
    """Load the VAE from a file or folder; `tile` is the edge of a tile in pixels, None for whole images.

    Raises CheckpointError if the file is damaged or contains another model.
    """
    path = inside(path, FOLDER)
    with open_checkpoint(path) as checkpoint:
        network = load_planned(
            read_vae(checkpoint),
            lambda config: QwenImage21Vae(config, tile),
            device,
            dtype,
            label=MODEL_KIND,
        )
    set_memory_format(network, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return network
