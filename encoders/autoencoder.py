"""The autoencoder of FLUX.1, also used by Chroma and Lumina-Image-2.0.

An image is a clip of one frame. Latents are in model space, as in cache files: shifted and scaled. Images of
a batch are computed one after the other, so that memory does not grow with their number and no result depends
on the rest of the batch. Tiles limit the memory for large images and change the result slightly; neighbors
overlap by a quarter, as in diffusers.

Modules are named as in the released ae.safetensors; the names of diffusers' AutoencoderKL are translated.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from checkpoints import dialects
from checkpoints.encoders import ALL_IN_ONE, check_groups, declared_groups
from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.autoencoder_blocks import AutoencoderConfig, AutoencoderDecoder, AutoencoderEncoder
from encoders.tiles import AxisTiling, compute_in_tiles, sample_posterior
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.layers.convolution import Compute, cast_for_convolution, set_memory_format
from modules.media.pixels import check_clip, from_bytes
from protocols.loading import TensorSource

LEVELS = 4  # resolution levels; each halves the size of the previous one, so 8 pixels are one latent pixel
GROUPS = 32  # groups of group norms, as released; tensors do not show them


@dataclass(frozen=True)
class AutoencoderKind:
    """Properties of a released autoencoder with FLUX's architecture."""

    description: str = "the autoencoder of FLUX"
    option: str = "--ae"
    release: str = "ae.safetensors of FLUX.1 or the folder vae of its diffusers release"
    channels: int = 16  # latent channels
    is_quantized: bool = False  # has a quant_conv after the encoder and a post_quant_conv before the decoder
    classes: tuple[str, ...] = ("AutoencoderKL",)  # allowed classes in a config.json next to the file


FLUX_KIND = AutoencoderKind()

DIFFUSERS: dialects.Names = (  # for decoder levels, which diffusers numbers in reverse, see `_from_diffusers`
    (r"encoder\.down_blocks\.(\d+)\.(.+)", r"encoder.down.\1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:group_)?norm\.(.+)", r"\1.mid.attn_1.norm.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.(.+)", r"\1.mid.attn_1.\2.\3"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to_out\.0|proj)\.(.+)", r"\1.mid.attn_1.proj_out.\2"),
    (r"(encoder|decoder)\.conv_norm_out\.(.+)", r"\1.norm_out.\2"),
    (r"(quant_conv\..+)", r"encoder.\1"),
    (r"(post_quant_conv\..+)", r"decoder.\1"),
)
ATTENTION = r".+\.attn_1\.(q|k|v|proj_out)\.weight"  # 1x1 convolutions in files, linear layers here
DIFFUSERS_LEVEL: dialects.Names = (  # inside a numbered level, after the names above have been translated
    (r"(.+\.\d+)\.resnets\.(.+)", r"\1.block.\2"),
    (r"(.+\.\d+)\.downsamplers\.0\.(.+)", r"\1.downsample.\2"),
    (r"(.+\.\d+)\.upsamplers\.0\.(.+)", r"\1.upsample.\2"),
)
SHORTCUT: dialects.Names = ((r"(.+)\.conv_shortcut\.(.+)", r"\1.nin_shortcut.\2"),)


def read_autoencoder(
    checkpoint: Checkpoint, kind: AutoencoderKind = FLUX_KIND
) -> dialects.LoadPlan[AutoencoderConfig]:
    """Plan how to load an autoencoder from a released file, diffusers' layout or an all-in-one file.

    Raises:
        CheckpointError: If the file contains another model or is incomplete.
    """
    # The file without other networks, and its autoencoder's tensors under the released names
    prefixes = ("first_stage_model.", "vae.")  # prefixes of the autoencoder in all-in-one files
    other_networks = [prefix for prefix in ALL_IN_ONE if prefix not in prefixes]
    autoencoder = checkpoint.without_prefix(*prefixes, ignored_prefixes=(*other_networks, "model."))
    sources = list_tensor_sources(autoencoder)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in sources:  # diffusers' names
        levels = dialects.count(sources, r"decoder\.up_blocks\.\d+")
        sources = dialects.rename_sources(sources, lambda name: _from_diffusers(name, levels))
    checkpoint, sources = autoencoder, sources
    wrong_model = dialects.make_wrong_kind_error(checkpoint, kind.description, kind.option, kind.release)
    if "encoder.down.0.block.0.conv1.weight" not in sources or "decoder.conv_in.weight" not in sources:
        raise wrong_model
    as_matrices(sources, ATTENTION)
    get_shape = dialects.make_shape_reader(checkpoint, sources, wrong_model)
    channels = get_shape("decoder.conv_in.weight")[1]
    has_quant_conv = "quant_conv.weight" in sources or "encoder.quant_conv.weight" in sources
    _check_kind(checkpoint, kind, channels, has_quant_conv)
    for part in ("encoder.down", "decoder.up"):
        _check_levels(checkpoint, kind, part, dialects.count(sources, rf"{re.escape(part)}\.\d+"))
    config = _read_config(checkpoint, kind, sources, get_shape)
    unused = ("bn.*",) if kind.is_quantized else ()  # statistics of FLUX.2's latents
    return dialects.LoadPlan(config, checkpoint, sources, unused)


def _read_config(
    checkpoint: Checkpoint,
    kind: AutoencoderKind,
    sources: Mapping[str, TensorSource],
    get_shape: Callable[..., tuple[int, ...]],
) -> AutoencoderConfig:
    """Read the dimensions of an autoencoder from the shapes of its tensors, and the groups of its norms."""
    widths = tuple(get_shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(LEVELS))
    decoder_widths = tuple(
        get_shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(LEVELS)
    )
    groups = declared_groups(checkpoint, kind.classes) or GROUPS
    check_groups(checkpoint, (*widths, *decoder_widths), groups)
    return AutoencoderConfig(
        latent_channels=kind.channels,
        groups=groups,
        widths=widths,
        encoder_blocks=dialects.count(sources, r"encoder\.down\.0\.block\.\d+"),
        decoder_blocks=dialects.count(sources, r"decoder\.up\.0\.block\.\d+"),
        decoder_widths=() if decoder_widths == widths else decoder_widths,
    )


def _check_levels(checkpoint: Checkpoint, kind: AutoencoderKind, part: str, num_levels: int) -> None:
    if num_levels != LEVELS:
        raise CheckpointError(
            f"{checkpoint.path}: {part} has {num_levels} levels, but that of FLUX has {LEVELS}. The file "
            f"contains another model, or tensors are missing. Pass {kind.release}.",
            checkpoint.path,
        )


def _check_kind(checkpoint: Checkpoint, kind: AutoencoderKind, channels: int, is_quantized: bool) -> None:
    """Raise CheckpointError if a file's latent channels or quant_conv belong to a different autoencoder."""
    if (channels, is_quantized) == (kind.channels, kind.is_quantized):
        return
    quant_conv = " and a quant_conv" if is_quantized else ""
    expected = "one" if kind.is_quantized else "none"
    raise CheckpointError(
        f"{checkpoint.path}: this VAE has {channels} latent channels{quant_conv}, but {kind.description} has "
        f"{kind.channels} and {expected}. Pass {kind.release}.",
        checkpoint.path,
    )


def _from_diffusers(name: str, levels: int) -> str:
    """Translate a diffusers tensor name; diffusers numbers the decoder's `levels` in reverse."""
    match = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", name)
    if match:
        name = f"decoder.up.{levels - 1 - int(match[1])}.{match[2]}"
    for table in (DIFFUSERS, DIFFUSERS_LEVEL, SHORTCUT):
        name = dialects.translate_name(name, table)
    return name


def as_matrices(sources: dict[str, TensorSource], layers: str) -> None:
    """Convert 1x1 convolution weights in `sources` to linear layer weights, in place.

    `layers` is a regular expression that matches the names of these weights.
    """
    for name, source in sources.items():
        if re.fullmatch(layers, name):
            sources[name] = source.with_step(lambda weight: weight.flatten(1))


# Letters: B batch, H height, W width, Z latent channels, h = H / 8, w = W / 8


logger = logging.getLogger(__name__)

# `shift_factor` and `scaling_factor` of the latents, as released with FLUX.1
SHIFT = 0.1159
SCALE = 0.3611
PIXELS = 8  # height and width of one latent pixel, in pixels


class ImageVae(nn.Module):
    """Base class of image autoencoders; an image is a clip of one frame. Subclasses set encoder and decoder.

    Build it on the meta device. `tile` is the tile edge in pixels, a multiple of `stride`; larger images are
    processed in tiles, which changes the result slightly. None disables tiling.
    """

    stride: ClassVar[int]  # height and width of one latent pixel, in pixels
    limits: ClassVar[tuple[float, float] | None] = None  # bounds of log-variances; None: not clamped
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, tile: int | None = None) -> None:
        super().__init__()
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, pixels and latents."""
        return self.encoder.get_parameter("norm_out.weight").dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.encoder.get_parameter("norm_out.weight").device

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return a sample of the posterior, or its mean if `generators` is None.

        Args:
            pixels: B 3 1 H W in -1..1, or uint8 in 0..255, on any device; H and W are multiples of the
                stride.
            generators: One generator for each image; noise is drawn in float32.

        Returns:
            Latents, B Z 1 h w float32, on the VAE's device.

        Raises:
            ValueError: If sizes are not multiples of the stride, or the number of generators is wrong.
        """
        if generators is not None and len(generators) != len(pixels):
            raise ValueError(f"{len(generators)} generators for {len(pixels)} images")
        moments = self.moments(pixels)
        if generators is not None:
            return sample_posterior(moments, generators, self.limits)
        # moments: means, then log-variances, along the channels
        return moments.chunk(2, dim=1)[0].contiguous()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Encode pixels; return means and log-variances, B 2Z 1 h w float32."""
        return self.in_tiles(self._moments, pixels, pixels_in=self.stride, pixels_out=1, device=self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents B Z 1 h w; return pixels B 3 1 H W float32 in -1..1.

        The pixels are on the VAE's device, or on the CPU if they were decoded in tiles.
        """
        return self.decode_unclamped(latents).clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """Return the decoded pixels without clamping them to -1..1."""
        return self.in_tiles(
            self._pixels, latents, pixels_in=1, pixels_out=self.stride, device=torch.device("cpu")
        )

    def in_tiles(
        self, compute: Compute, x: Tensor, pixels_in: int, pixels_out: int, device: torch.device
    ) -> Tensor:
        """Apply `compute` to x, in tiles if x is larger than a tile.

        Args:
            compute: Function to apply to images, B C H W.
            x: B C 1 H W.
            pixels_in: Edge length of a latent pixel, in pixels of `x`.
            pixels_out: Edge length of a latent pixel, in pixels of the result.
            device: Device of the result if it is computed in tiles.

        Returns:
            Result, B C' 1 H' W'.

        Raises:
            ValueError: If the shape of `x` is wrong.
        """
        if x.ndim != 5 or x.shape[2] != 1:
            raise ValueError(f"an image is B C 1 H W, not {tuple(x.shape)}")
        check_clip(x, 1, pixels_in)
        image = x.squeeze(2)
        # no tiling: the whole image at once
        if self.tile is None:
            return compute(image).unsqueeze(2)
        tile_size = self.tile // self.stride  # in latent pixels
        if max(image.shape[-2:]) <= tile_size * pixels_in:
            return compute(image).unsqueeze(2)
        tiling = AxisTiling(tile_size, pixels_in, pixels_out)
        return compute_in_tiles(compute, image, tiling, device).unsqueeze(2)

    def _moments(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = from_bytes(pixels.to(self.device))
        return self.encoder(cast_for_convolution(pixels, self.device, self.dtype)).float()

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(cast_for_convolution(latents, self.device, self.dtype)).float()


class Autoencoder(ImageVae):
    """FLUX's autoencoder; its latents are in model space. Load a checkpoint with `load_autoencoder`."""

    stride = PIXELS

    def __init__(self, config: AutoencoderConfig, tile: int | None = None, shift: float = SHIFT) -> None:
        """Build the network without weights; `shift` is subtracted from latents before they are scaled."""
        super().__init__(tile)
        self.encoder = AutoencoderEncoder(config)
        self.decoder = AutoencoderDecoder(config)
        self.shift = shift

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Encode pixels B 3 1 H W; return latents in model space, B Z 1 h w float32.

        Latents are samples of the posterior, or its mean without generators. As in the released code,
        log-variances are not clamped.
        """
        return super().encode(pixels, generators).sub_(self.shift).mul_(SCALE)

    def in_tiles(
        self, compute: Compute, x: Tensor, pixels_in: int, pixels_out: int, device: torch.device
    ) -> Tensor:
        """Apply `compute` to each image of a batch, in tiles if the image is larger than a tile.

        Args:
            compute: Function to apply to an image, 1 C H W.
            x: B C 1 H W.
            pixels_in: Edge length of a latent pixel, in pixels of `x`.
            pixels_out: Edge length of a latent pixel, in pixels of the result.
            device: Device of results that are computed in tiles.
        """
        results = []
        for image in x.split(1):
            result = super().in_tiles(
                compute, image, pixels_in=pixels_in, pixels_out=pixels_out, device=device
            )
            results.append(result)
        return torch.cat(results)

    def _pixels(self, latents: Tensor) -> Tensor:
        # in float32: rounding the shift to 16 bits would tint every image
        return super()._pixels(latents.to(self.device).float() / SCALE + self.shift)


def load_autoencoder(
    path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = None, shift: float = SHIFT
) -> Autoencoder:
    """Load FLUX's autoencoder from any of its file layouts.

    Args:
        path: The file, or the folder of a release with the autoencoder in its subfolder `vae`.
        device: Device to load to.
        dtype: Dtype of the weights.
        tile: Tile edge in pixels, for processing large images; None disables tiling.
        shift: Number that is subtracted from latents before they are scaled, as the model was trained.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    path = inside(path, "vae")
    with open_checkpoint(path) as checkpoint:
        plan = read_autoencoder(checkpoint)
        network = dialects.load_planned(
            plan,
            lambda config: Autoencoder(config, tile, shift),
            device=device,
            dtype=dtype,
            label="the autoencoder of FLUX",
        )
    set_memory_format(network, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return network


def read_autoencoder_header(path: Path, option: str = FLUX_KIND.option) -> AutoencoderConfig:
    """Return the dimensions of the autoencoder in a file, or in a release's `vae` folder, from headers.

    Args:
        path: The file or folder.
        option: Option that gives the path, for messages.

    Raises:
        CheckpointError: If the file is missing, damaged or a different model.
    """
    return read_once(inside(path, "vae"), read_autoencoder, replace(FLUX_KIND, option=option)).config
