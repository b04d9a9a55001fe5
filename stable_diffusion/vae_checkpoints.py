"""The VAE of a checkpoint: names in released files and diffusers' folders, dimensions, network."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn

from modules.checkpoints.dialects import (
    LoadPlan,
    Names,
    checked_shapes_of,
    count,
    other_kind,
    rename_sources,
    translate_name,
)
from modules.checkpoints.encoders import check_groups, stated_groups
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError
from stable_diffusion.kinds import VAE

VaeSizes = Mapping[str, Any]  # keywords of diffusers' AutoencoderKL

GROUPS = 32  # of all group norms, as released
LEVELS = 4  # resolutions: 8 pixels are one latent pixel
LATENT_CHANNELS = 4
CONFIG_CLASSES = {"AutoencoderKL"}
GIVE = "a VAE of Stable Diffusion: a single file, or the folder vae in the layout of diffusers"

# what files of a VAE alone carry besides: the loss of its training, averages
IGNORED = ("loss.*", "model_ema.*")

_OLD_ATTENTION: Names = (  # of diffusers before 0.17
    (r"(.+\.attentions\.0)\.query\.(.+)", r"\1.to_q.\2"),
    (r"(.+\.attentions\.0)\.key\.(.+)", r"\1.to_k.\2"),
    (r"(.+\.attentions\.0)\.value\.(.+)", r"\1.to_v.\2"),
    (r"(.+\.attentions\.0)\.proj_attn\.(.+)", r"\1.to_out.0.\2"),
)


def read_vae(checkpoint: Checkpoint, option: str, latent_scale: float) -> LoadPlan[VaeSizes]:
    """Plan how to load a VAE: alone or within a whole checkpoint, with released or diffusers' names.

    option: that named the file. latent_scale: goes into diffusers' configuration. Raises CheckpointError for
    any other file.
    """
    own, sources = vae_sources(checkpoint)
    wrong = other_kind(checkpoint, "a VAE of Stable Diffusion", option, GIVE)
    if (
        "encoder.down_blocks.0.resnets.0.conv1.weight" not in sources
        or "decoder.conv_in.weight" not in sources
    ):
        raise wrong
    shape = checked_shapes_of(own, sources, wrong)
    levels = {count(sources, rf"{side}_blocks\.\d+") for side in (r"encoder\.down", r"decoder\.up")}
    channels = shape("decoder.conv_in.weight")[1]
    if channels != LATENT_CHANNELS or levels != {LEVELS}:
        raise CheckpointError(
            f"{option} {checkpoint.path}: this VAE has {channels} latent channels and "
            f"{' and '.join(map(str, sorted(levels)))} levels; those of Stable Diffusion have "
            f"{LATENT_CHANNELS} and {LEVELS}. It is of another model, or tensors are missing.\n"
            f"  Give {GIVE}.",
            checkpoint.path,
        )
    widths = tuple(shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(LEVELS))
    groups = stated_groups(checkpoint, CONFIG_CLASSES) or GROUPS
    check_groups(checkpoint, widths, groups)
    config = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "layers_per_block": count(sources, r"encoder\.down_blocks\.0\.resnets\.\d+"),
        "latent_channels": channels,
        "norm_num_groups": groups,
        "scaling_factor": latent_scale,
        "use_quant_conv": "quant_conv.weight" in sources,
        "use_post_quant_conv": "post_quant_conv.weight" in sources,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in sources),
    }
    return LoadPlan(config, own, sources, IGNORED)


def vae_sources(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, TensorSource]]:
    """Return the VAE's part of a file, and how its tensors are made, by diffusers' names."""
    prefixes = (VAE, "vae.")
    prefix = next(
        (each for each in prefixes if any(name.startswith(each) for name in checkpoint.tensors)), ""
    )
    own = checkpoint.without_prefix(prefix, others=("",)) if prefix else checkpoint
    stored = plain_sources(own)
    names = _as_diffusers(stored)
    sources = rename_sources(stored, lambda name: translate_name(names.get(name, name), _OLD_ATTENTION))
    for name, source in sources.items():  # 1x1 convolutions in released files, linear layers in diffusers
        if re.fullmatch(r".+\.attentions\.0\.to_(q|k|v|out\.0)\.weight", name):
            sources[name] = source.then(_as_matrix)
    return own, sources


class _TensorName(str):
    """A name that diffusers' conversion takes for a tensor, which it would turn into a matrix else."""

    shape, ndim = (0, 0), 2


def _as_diffusers(names: Collection[str]) -> dict[str, str]:
    """Return released names, of tensors that diffusers' loader of single files knows -> its own names."""
    levels = [""] * count(names, r"decoder\.up\.\d+")
    if not levels:
        return {}
    stored = {name: _TensorName(name) for name in names}
    made = convert_ldm_vae_checkpoint(stored, {"down_block_types": levels, "up_block_types": levels})
    return {theirs: own for own, theirs in made.items() if theirs is not None}


def _as_matrix(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.flatten(1)


# Convolutions computed in bands of rows, so that a large picture needs less memory in the VAE.
#
# Only the workspace of the convolutions shrinks; norms and attention see the whole picture, so that the
# result is that without bands, but for the order of sums in the convolution itself.
def band_convolutions(network: nn.Module, bands: int) -> None:
    """Let all convolutions of a network that look beyond one pixel work in bands, at most this many."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.forward = _in_bands(module, bands)  # type: ignore[method-assign, assignment]


def _in_bands(conv: nn.Conv2d, bands: int) -> Callable[[Tensor], Tensor]:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    above, beside = (int(size) for size in conv.padding)  # rows and columns of zeros

    def forward(x: Tensor) -> Tensor:
        # x: B C H W
        height = x.shape[2]
        rows = (height + 2 * above - kernel) // stride + 1  # of the result
        if rows < 2 * bands:
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        result: Tensor | None = None
        edges = [rows * band // bands for band in range(bands + 1)]
        for start, end in zip(edges, edges[1:], strict=False):
            first, last = start * stride - above, (end - 1) * stride - above + kernel
            band = x[:, :, max(0, first) : min(height, last)]
            if first < 0 or last > height:
                band = F.pad(band, (0, 0, max(0, -first), max(0, last - height)))
            made = F.conv2d(band, conv.weight, conv.bias, conv.stride, (0, beside))
            if result is None:
                result = made.new_empty((*made.shape[:2], rows, made.shape[3]))
                result = result.contiguous(memory_format=_format_of(x))
            result[:, :, start:end] = made
        assert result is not None
        return result

    return forward


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
