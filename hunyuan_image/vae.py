"""The VAE of HunyuanImage-2.1: images to latents and back, 32 pixels to one along each side.

Encoder and decoder have FLUX's levels, with pixels folded into channels between them; module names follow the
published file. The shortcuts that average or repeat channels are those of Chen et al. 2024, arXiv 2410.10733.
Latents are those of cache files: not multiplied by the scaling factor. An image is a clip of one frame.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.autoencoder import ATTENTION, DIFFUSERS, ImageVae, as_matrices
from encoders.autoencoder_blocks import EPS, Level, Middle, norm_and_silu
from hunyuan_image.configs import LATENT, STRIDE
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.layers.convolution import set_memory_format

GROUPS = 32  # in every group norm
FOLDED = 4  # pixels of one resolution in a pixel of the next


@dataclass(frozen=True)
class HunyuanImageVaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors."""

    latent_channels: int  # Z
    widths: tuple[int, ...]  # channels of each level, from the image to the latents
    encoder_blocks: int  # residual blocks in a level
    decoder_blocks: int


class FoldDown(nn.Module):
    """Downsample by 2, B C H W to B C' H/2 W/2, by folding 2 x 2 pixels into channels.

    The shortcut folds the input in the same way and averages neighboring channels.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out // FOLDED, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x at half the height and width, with its shortcut added."""
        folded = _fold(self.conv(x))
        return folded.add_(average_channels(_fold(x), folded.shape[1]))


class FoldUp(nn.Module):
    """Upsample by 2, B C H W to B C' 2H 2W, as the reverse of `FoldDown`; a shortcut repeats channels."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out * FOLDED, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x at twice the height and width, with its shortcut added."""
        unfolded = self.conv(x)
        return _unfold(unfolded).add_(_unfold(repeat_channels(x, unfolded.shape[1])))


class HunyuanImageVaeEncoder(nn.Module):
    """Encode pixels B 3 H W as means and logarithms of variances, B 2Z h w."""

    def __init__(self, config: HunyuanImageVaeConfig) -> None:
        super().__init__()
        widths = config.widths
        moments = 2 * config.latent_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = _levels(widths, config.encoder_blocks)
        for level, width, following in zip(self.down, widths, widths[1:], strict=False):
            level.downsample = FoldDown(width, following)
        self.mid = Middle(widths[-1], GROUPS)
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode pixels, B 3 H W, to means and log variances, B 2Z h w."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        shortcut = average_channels(x, self.conv_out.out_channels)
        return self.conv_out(norm_and_silu(self.norm_out, x)).add_(shortcut)


class HunyuanImageVaeDecoder(nn.Module):
    """Decode latents B Z h w to pixels B 3 H W. Levels are in computing order."""

    def __init__(self, config: HunyuanImageVaeConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], GROUPS)
        self.up = _levels(widths, config.decoder_blocks)
        for level, width, following in zip(self.up, widths, widths[1:], strict=False):
            level.upsample = FoldUp(width, following)
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents x, B Z h w, to pixels, B 3 H W."""
        x = self.mid(self.conv_in(x).add_(repeat_channels(x, self.conv_in.out_channels)))
        for level in self.up:
            x = level(x)
        return self.conv_out(norm_and_silu(self.norm_out, x))


class RowConvolution(nn.Module):
    """A 3x3 convolution that computes a few rows at a time, with the same result.

    Each piece reads the rows around it. The layer takes over the weights of the one that it replaces.
    """

    def __init__(self, layer: nn.Conv2d, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.out_channels = layer.out_channels
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, B C H W to B C' H W."""
        # x: B C H W
        height = x.shape[2]
        if height <= self._rows:
            return functional.conv2d(x, self.weight, self.bias, padding=1)
        out = x.new_empty(x.shape[0], self.out_channels, *x.shape[2:])
        for top in range(0, height, self._rows):
            bottom = min(top + self._rows, height)
            piece = x[:, :, max(top - 1, 0) : bottom + 1]
            # zeros only where the image ends
            piece = functional.pad(piece, (0, 0, int(top == 0), int(bottom == height)))
            out[:, :, top:bottom] = functional.conv2d(piece, self.weight, self.bias, padding=(0, 1))
        return out


def compute_in_rows(network: nn.Module, rows: int) -> None:
    """Replace a network's 3x3 convolutions with ones that compute `rows` rows at a time."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                setattr(module, name, RowConvolution(layer, rows))


def average_channels(x: Tensor, width: int) -> Tensor:
    """Average groups of neighboring channels, B C H W to B width H W."""
    return x.unflatten(1, (width, -1)).mean(dim=2)


def repeat_channels(x: Tensor, width: int) -> Tensor:
    """Repeat each channel to widen B C H W to B width H W."""
    return x.repeat_interleave(width // x.shape[1], dim=1)


def _fold(x: Tensor) -> Tensor:
    return rearrange(x, "b c (h high) (w wide) -> b (high wide c) h w", high=2, wide=2)


def _unfold(x: Tensor) -> Tensor:
    return rearrange(x, "b (high wide c) h w -> b c (h high) (w wide)", high=2, wide=2)


def _levels(widths: Sequence[int], blocks: int) -> nn.ModuleList:
    return nn.ModuleList(Level(width, width, blocks, GROUPS) for width in widths)


LEVELS = 6
RELEASED_FILES = (
    "hunyuan_image_2.1_vae_fp16.safetensors, vae/vae_2_1/pytorch_model.ckpt of tencent/HunyuanImage-2.1 or a "
    "diffusers vae folder"
)
MODEL_LABEL = "the VAE of HunyuanImage-2.1"
_LAYER = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)")


def read_vae(checkpoint: Checkpoint) -> LoadPlan[HunyuanImageVaeConfig]:
    """Plan how to load HunyuanImage's VAE, from the released file or a diffusers folder.

    Raises CheckpointError for another file.
    """
    checkpoint = checkpoint.without_prefix("module.", "_orig_mod.", "first_stage_model.", "vae.")
    sources = list_tensor_sources(checkpoint)
    # diffusers' names
    if "encoder.down_blocks.0.conv1.weight" in sources:
        sources = rename_sources(sources, NamesByLevel(sources))
    wrong_kind_error = make_wrong_kind_error(checkpoint, MODEL_LABEL, "--vae", RELEASED_FILES)
    if not sources.keys() >= {"encoder.down.0.downsample.conv.weight", "decoder.conv_in.weight"}:
        raise wrong_kind_error
    as_matrices(sources, ATTENTION)  # 1x1 convolutions in the file, linear layers here
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)
    levels = {count(sources, r"encoder\.down\.\d+"), count(sources, r"decoder\.up\.\d+")}
    if levels != {LEVELS}:
        raise _make_error(
            checkpoint, f"it has {' and '.join(map(str, levels))} levels, the model has {LEVELS}"
        )
    config = HunyuanImageVaeConfig(
        shape("decoder.conv_in.weight")[1],
        tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(LEVELS)),
        count(sources, r"encoder\.down\.0\.block\.\d+"),
        count(sources, r"decoder\.up\.0\.block\.\d+"),
    )
    _check_channels(checkpoint, config)
    return LoadPlan(config, checkpoint, sources)


def _check_channels(checkpoint: Checkpoint, config: HunyuanImageVaeConfig) -> None:
    """Raise CheckpointError if the latent channels or the widths of the levels do not fit the model."""
    if config.latent_channels != LATENT.channels:
        raise _make_error(
            checkpoint, f"it has {config.latent_channels} latent channels, the model has {LATENT.channels}"
        )
    if not _widths_fit(config.widths, config.latent_channels):
        raise _make_error(
            checkpoint, f"its levels have {', '.join(map(str, config.widths))} channels, which do not fit"
        )


def _widths_fit(widths: Sequence[int], channels: int) -> bool:
    """Return whether norms and shortcuts can be built for levels of these widths and latent channels."""
    if any(width % GROUPS for width in widths) or widths[-1] % (2 * channels):
        return False
    return all((FOLDED * near) % far == 0 for near, far in pairwise(widths))


def _make_error(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} is not {MODEL_LABEL}: {why}.\n  Pass {RELEASED_FILES} to --vae.", checkpoint.path
    )


class NamesByLevel:
    """Translates diffusers' tensor names to the names of the released file.

    diffusers numbers a layer that changes the resolution like a block; the release appends it to its level.
    """

    def __init__(self, names: Iterable[str]) -> None:
        changes: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
        for match in map(_LAYER.fullmatch, names):
            if match and match[4] == "conv.weight":
                changes[match[1]].add(int(match[3]))
        self._changes = {half: sorted(numbers) for half, numbers in changes.items()}

    def __call__(self, name: str) -> str:
        """Translate a tensor name of diffusers to the published name."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return translate_name(name, DIFFUSERS)
        half, direction, digits, name_end = match.groups()
        index = int(digits)
        changes = self._changes[half]
        level = sum(change < index for change in changes)
        start = f"{half}.{direction}.{level}"
        if index in changes:
            return f"{start}.{direction}sample.{name_end}"
        first = changes[level - 1] + 1 if level else 0
        return f"{start}.block.{index - first}.{name_end}"


logger = logging.getLogger(__name__)


class HunyuanImageVae(ImageVae):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`."""

    stride = STRIDE
    limits = (-30.0, 20.0)

    def __init__(self, config: HunyuanImageVaeConfig, tile: int | None = None) -> None:
        super().__init__(tile)
        self.encoder = HunyuanImageVaeEncoder(config)
        self.decoder = HunyuanImageVaeDecoder(config)


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int | None = None,
    tile: int | None = None,
) -> HunyuanImageVae:
    """Load HunyuanImage's VAE from the released file or a diffusers folder.

    Args:
        path: File or folder.
        device: Device to load onto.
        dtype: Compute dtype.
        chunk_size: Rows that a convolution computes at a time; it changes memory, not results.
        tile: Edge of a tile in pixels; None computes images as a whole.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(
            plan, lambda config: HunyuanImageVae(config, tile), device, dtype, label=MODEL_LABEL
        )
    set_memory_format(vae, device)  # memory layout of the convolutions' weights that is fast on this device
    if chunk_size is not None:
        compute_in_rows(vae, chunk_size)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
