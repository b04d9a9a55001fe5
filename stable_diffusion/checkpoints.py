"""The U-Net and the VAE of a file: read dimensions from its tensors, and plan how to load the networks.

diffusers' classes take their dimensions as keyword arguments: `UnetSizes` and `VaeSizes` contain these.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import dialects
from checkpoints.encoders import check_groups, declared_groups
from checkpoints.filling import on_meta_device
from checkpoints.opening import Checkpoint, list_tensor_sources
from modules.errors import CheckpointError
from protocols.loading import TensorInfo, TensorSource
from stable_diffusion.contract import SD1, SDXL, ModelKind
from stable_diffusion.files import EXPECTED_FILE, VAE
from stable_diffusion.names import (
    INPUT_AND_OUTPUT_LAYERS,
    RESNET_LAYERS,
    SDXL_EMBEDDING_LAYERS,
    unet_blocks,
    unet_samplers,
)
from stable_diffusion.released_names import VAE_LEVELS, map_vae_names_to_diffusers


def read_levels(names: Collection[str]) -> tuple[int, ...]:
    """Return the number of residual blocks at each level of a U-Net's down path.

    Args:
        names: LDM names of its tensors, as in released single files.
    """
    downsamplers = []  # their indices in input_blocks; one ends each level except the last
    input_blocks = {0}  # 0: the first convolution
    for name in names:
        match = re.match(r"input_blocks\.(\d{1,4})\.", name)
        if match:
            input_blocks.add(int(match[1]))
            if re.fullmatch(r"input_blocks\.\d{1,4}\.0\.op\.weight", name):
                downsamplers.append(int(match[1]))
    # a level's residual blocks are between two downsamplers
    bounds = [0, *sorted(downsamplers), max(input_blocks) + 1]
    return tuple(end - start - 1 for start, end in pairwise(bounds))


def ldm_to_diffusers_translator(names: Collection[str]) -> Callable[[str], str]:
    """Return a function from LDM to diffusers names of U-Net tensors; it leaves unknown names unchanged.

    Args:
        names: LDM names of all tensors of the U-Net, which determine the number of its levels and blocks.
    """
    layers = read_levels(names)
    diffusers_paths = dict((*INPUT_AND_OUTPUT_LAYERS, *SDXL_EMBEDDING_LAYERS))  # by LDM path of the module
    for block in unet_blocks(layers):
        if block.is_attention:
            diffusers_paths[block.ldm_path] = block.diffusers_path
            continue
        for ldm_layer, diffusers_layer in RESNET_LAYERS:
            diffusers_paths[f"{block.ldm_path}.{ldm_layer}"] = f"{block.diffusers_path}.{diffusers_layer}"
    for sampler in unet_samplers(layers):
        diffusers_paths[sampler.ldm_downsampler] = sampler.downsampler
        diffusers_paths[sampler.ldm_upsampler] = sampler.upsampler
        diffusers_paths[sampler.ldm_upsampler_without_attention] = sampler.upsampler

    def translate(name: str) -> str:
        module_path = name  # drop last components until it is the path of a renamed module
        while module_path:
            module_path = module_path.rpartition(".")[0]
            if module_path in diffusers_paths:
                return diffusers_paths[module_path] + name.removeprefix(module_path)
        return name

    return translate


def build_network(build: Callable[..., Any], config: Mapping[str, Any], path: Path) -> Any:
    """Build a diffusers network on the meta device; raise CheckpointError if its config is invalid."""
    try:
        with on_meta_device():
            return build(**config)
    # diffusers raises many classes of errors; all mean that the dimensions are inconsistent
    except Exception as error:
        raise CheckpointError(
            f"{path}: diffusers cannot build a network of these dimensions ({type(error).__name__}: "
            f"{error}). The file or the config.json next to it is damaged: copy or download it again.",
            path,
        ) from error


UnetSizes = Mapping[str, Any]

GROUPS = 32  # number of groups in all group norms, as released; the tensors do not show it
SD1_HEADS = 8  # number of heads in each attention, as released
HEAD_WIDTH = 64  # head width of the later kinds of models
NUM_SIZE_CONDITIONS = 6  # inputs of SDXL: original size, crop, target size
LATENT_CHANNELS, INPAINTING_CHANNELS = 4, 9
# input channels of a U-Net: for images, and for inpainting
UNET_INPUT_CHANNELS = (LATENT_CHANNELS, INPAINTING_CHANNELS)


class UnetDepths(NamedTuple):
    """Number of transformer blocks after each residual block, by level; 0 for no attention."""

    down: list[tuple[int, ...]]
    up: list[tuple[int, ...]]


def read_unet(checkpoint: Checkpoint, kind: ModelKind, pooled_width: int) -> dialects.LoadPlan[UnetSizes]:
    """Infer the config of diffusers' U-Net from a single file's tensor shapes, and plan how to load it.

    1. Rename the tensors to diffusers' names, and check that no level lacks a block.
    2. Read widths, depths and the text width from the tensor shapes.
    3. Check that the levels have the widths of the checkpoint's kind.

    Args:
        checkpoint: Tensors of the U-Net, without their prefix.
        kind: Kind of the checkpoint.
        pooled_width: Width of SDXL's pooled text state; 0 for other kinds.

    Raises:
        CheckpointError: If tensors that determine a dimension are missing or contradictory.
    """
    names = checkpoint.tensors
    sources = dialects.rename_sources(list_tensor_sources(checkpoint), ldm_to_diffusers_translator(names))
    layers_by_level = read_levels(names)
    make_error = partial(_make_unet_error, checkpoint.path)
    # returns a tensor's shape by name; raises this error for a different number of axes (default: 4)
    shape = dialects.make_shape_reader(checkpoint, sources, make_error("a tensor has an unexpected shape"))
    if not _has_all_layers(sources, layers_by_level):
        raise make_error("some of its input_blocks are missing")
    widths = tuple(
        shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(len(layers_by_level))
    )
    depths = _read_depths(sources, layers_by_level)
    attention = _find_last_attention(sources, depths)
    if attention is None:
        raise make_error("it has no attention to the text")
    config: dict[str, Any] = {
        "sample_size": kind.size // 8,  # in latents, whose sides are an eighth of the image's
        "in_channels": shape("conv_in.weight")[1],
        "out_channels": shape("conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers_by_level,
        "norm_num_groups": GROUPS,
        "cross_attention_dim": shape(f"{attention}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": _has_linear_projection(names, sources.get(f"{attention}.proj_in.weight")),
        "attention_head_dim": _list_heads(kind, widths),  # diffusers' name for the number of heads
        "down_block_types": tuple(_select_block_type(level_depths, "Down") for level_depths in depths.down),
        "up_block_types": tuple(_select_block_type(level_depths, "Up") for level_depths in depths.up),
        **_make_depth_settings(depths.down, depths.up),
    }
    if kind is SDXL:
        width = shape("add_embedding.linear_1.weight", 2)[1]
        config |= _read_pooled_settings(width, pooled_width, make_error)
    _check_level_widths(kind, widths, depths, make_error)
    return dialects.LoadPlan(config, checkpoint, sources)


def _has_linear_projection(tensors: Mapping[str, TensorInfo], weight: TensorSource | None) -> bool:
    """Return whether an attention's input is projected by a linear layer instead of a 1x1 convolution."""
    return weight is not None and len(tensors[weight.names[0]].shape) == 2


def _has_all_layers(names: Iterable[str], layers_by_level: Sequence[int]) -> bool:
    """Return whether each level of the encoder has tensors of all its residual blocks."""
    # Names may contain arbitrary numbers, so the counts are checked before looping over them.
    for level, num_layers in enumerate(layers_by_level):
        if num_layers < 1 or num_layers != dialects.count(names, rf"down_blocks\.{level}\.resnets\.\d+"):
            return False
    return True


def _make_unet_error(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"--ckpt {path}: its U-Net is not that of Stable Diffusion, or is damaged: {why}.\n"
        f"  Pass {EXPECTED_FILE}.",
        path,
    )


def _check_level_widths(
    kind: ModelKind, widths: Sequence[int], depths: UnetDepths, make_error: Callable[[str], CheckpointError]
) -> None:
    """Raise `make_error(...)` if group norms or attention heads do not divide a level's channels."""
    for width, level_depths in zip(widths, depths.down, strict=True):
        # levels without attention have no heads, and SD1 has a number of heads instead of their width
        divisor = SD1_HEADS if kind is SD1 else HEAD_WIDTH
        if width % GROUPS or (any(level_depths) and width % divisor):
            raise make_error(f"a width of {width} channels cannot be divided into groups and heads")


def _list_heads(kind: ModelKind, widths: Sequence[int]) -> tuple[int, ...]:
    """Return each level's number of attention heads; heads of SD2 and SDXL have a fixed width."""
    if kind is SD1:
        return (SD1_HEADS,) * len(widths)
    return tuple(max(1, width // HEAD_WIDTH) for width in widths)


def _find_last_attention(sources: Mapping[str, TensorSource], depths: UnetDepths) -> str | None:
    """Return the path of the first attention in the deepest down level with attention."""
    # Returns None if no level has attention, or if the middle block has none.
    has_middle = any(name.startswith("mid_block.attentions.0.") for name in sources)
    levels = [level for level, level_depths in enumerate(depths.down) if any(level_depths)]
    return f"down_blocks.{levels[-1]}.attentions.0" if levels and has_middle else None


def _read_depths(sources: Mapping[str, TensorSource], layers: Sequence[int]) -> UnetDepths:
    """Count the transformer blocks that follow each residual block of a U-Net."""

    def count_transformer_blocks(path: str, level: int, num_layers: int) -> tuple[int, ...]:
        return tuple(
            dialects.count(sources, rf"{path}_blocks\.{level}\.attentions\.{layer}\.transformer_blocks\.\d+")
            for layer in range(num_layers)
        )

    return UnetDepths(
        down=[count_transformer_blocks("down", level, num_layers) for level, num_layers in enumerate(layers)],
        # the up path goes through the levels in reverse and has one more block on each
        up=[
            count_transformer_blocks("up", level, num_layers + 1)
            for level, num_layers in enumerate(layers[::-1])
        ],
    )


def _read_pooled_settings(
    width: int, pooled_width: int, make_error: Callable[[str], Exception]
) -> dict[str, Any]:
    """Return U-Net settings of SDXL's additional conditions: pooled text state and image sizes."""
    # each size is embedded as `waves` values, half of them sines and half cosines
    waves, remainder = divmod(width - pooled_width, NUM_SIZE_CONDITIONS)
    if remainder or waves < 2 or waves % 2:
        raise make_error(
            f"label_emb takes width {width}, not that of a pooled text state ({pooled_width}) and "
            f"{NUM_SIZE_CONDITIONS} sizes"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": waves,
        "projection_class_embeddings_input_dim": width,
    }


def _select_block_type(depths: Sequence[int], way: str) -> str:
    return f"CrossAttn{way}Block2D" if any(depths) else f"{way}Block2D"


def _make_depth_settings(down: Sequence[Sequence[int]], up: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the config's transformer depths: one number per level if all its blocks are equally deep."""
    by_level = [{*depths, *up[len(down) - 1 - level]} for level, depths in enumerate(down)]
    if all(len(depths) == 1 for depths in by_level):
        return {"transformer_layers_per_block": tuple(max(1, *depths) for depths in by_level)}
    return {
        "transformer_layers_per_block": tuple(tuple(max(1, depth) for depth in depths) for depths in down),
        "reverse_transformer_layers_per_block": tuple(
            tuple(max(1, depth) for depth in depths) for depths in up
        ),
    }


# The VAE: names in released files and diffusers' folders, dimensions.
VaeSizes = Mapping[str, Any]  # keywords of diffusers' AutoencoderKL

VAE_GROUPS = 32  # number of groups in all group norms, as released
CONFIG_CLASSES = {"AutoencoderKL"}
EXPECTED_VAE = "a VAE of Stable Diffusion: a single file, or the folder vae in the layout of diffusers"

# tensors that files of a VAE may contain in addition: the loss of its training, averages
IGNORED = ("loss.*", "model_ema.*")

_OLD_ATTENTION: dialects.Names = (  # names in diffusers before 0.17
    (r"(.+\.attentions\.0)\.query\.(.+)", r"\1.to_q.\2"),
    (r"(.+\.attentions\.0)\.key\.(.+)", r"\1.to_k.\2"),
    (r"(.+\.attentions\.0)\.value\.(.+)", r"\1.to_v.\2"),
    (r"(.+\.attentions\.0)\.proj_attn\.(.+)", r"\1.to_out.0.\2"),
)


def read_vae(checkpoint: Checkpoint, option: str, latent_scale: float) -> dialects.LoadPlan[VaeSizes]:
    """Plan how to load a VAE from its own file or a full checkpoint, with released or diffusers names.

    1. Find the VAE's tensors, and rename them to diffusers' names.
    2. Reject other networks by tensor names and dimensions.
    3. Infer the config of diffusers' AutoencoderKL from the tensor shapes.

    Args:
        checkpoint: The opened checkpoint.
        option: Option that names the file.
        latent_scale: Scaling factor of latents for the diffusers config.

    Raises:
        CheckpointError: If the file contains no such VAE.
    """
    vae, sources = vae_sources(checkpoint)
    other_network = dialects.make_wrong_kind_error(
        checkpoint, "a VAE of Stable Diffusion", option, EXPECTED_VAE
    )
    if (
        "encoder.down_blocks.0.resnets.0.conv1.weight" not in sources
        or "decoder.conv_in.weight" not in sources
    ):
        raise other_network
    shape = dialects.make_shape_reader(vae, sources, other_network)
    channels = shape("decoder.conv_in.weight")[1]
    _check_vae_dimensions(checkpoint.path, option, sources, channels)
    widths = tuple(
        shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(VAE_LEVELS)
    )
    groups = declared_groups(checkpoint, CONFIG_CLASSES) or VAE_GROUPS
    check_groups(checkpoint, widths, groups)
    config = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * VAE_LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * VAE_LEVELS,
        "layers_per_block": dialects.count(sources, r"encoder\.down_blocks\.0\.resnets\.\d+"),
        "latent_channels": channels,
        "norm_num_groups": groups,
        "scaling_factor": latent_scale,
        "use_quant_conv": "quant_conv.weight" in sources,
        "use_post_quant_conv": "post_quant_conv.weight" in sources,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in sources),
    }
    return dialects.LoadPlan(config, vae, sources, IGNORED)


def _check_vae_dimensions(path: Path, option: str, names: Collection[str], channels: int) -> None:
    """Raise CheckpointError unless the VAE has Stable Diffusion's number of latent channels and levels."""
    levels = {dialects.count(names, rf"{side}_blocks\.\d+") for side in (r"encoder\.down", r"decoder\.up")}
    if channels != LATENT_CHANNELS or levels != {VAE_LEVELS}:
        raise CheckpointError(
            f"{option} {path}: this VAE has {channels} latent channels and "
            f"{' and '.join(map(str, sorted(levels)))} levels; those of Stable Diffusion have "
            f"{LATENT_CHANNELS} and {VAE_LEVELS}. It is of another model, or tensors are missing.\n"
            f"  Pass {EXPECTED_VAE}.",
            path,
        )


def vae_sources(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, TensorSource]]:
    """Return the VAE's part of a file, and how to build each tensor of diffusers' AutoencoderKL from it.

    The file may be a full checkpoint, with tensor names of LDM or of any diffusers version.
    """
    vae = checkpoint
    for prefix in (VAE, "vae."):
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            # ignored_prefixes=("",): all tensors without this prefix belong to other networks
            vae = checkpoint.without_prefix(prefix, ignored_prefixes=("",))
            break
    stored_sources = list_tensor_sources(vae)
    num_levels = dialects.count(stored_sources, r"decoder\.up\.\d+")
    diffusers_names = map_vae_names_to_diffusers(stored_sources, num_levels=num_levels)

    def rename(name: str) -> str:
        return dialects.translate_name(diffusers_names.get(name, name), _OLD_ATTENTION)

    sources = dialects.rename_sources(stored_sources, rename)
    for name, source in sources.items():  # 1x1 convolutions in released files, linear layers in diffusers
        if re.fullmatch(r".+\.attentions\.0\.to_(q|k|v|out\.0)\.weight", name):
            sources[name] = source.with_step(_as_matrix)
    return vae, sources


def _as_matrix(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 2 else weight.flatten(1)


# Convolutions computed in bands of rows, so that a large image needs less memory in the VAE.
#
# Only the workspace of the convolutions shrinks; norms and attention see the whole image, so that the
# result equals that without bands, except for the order of sums in the convolution itself.
def band_convolutions(network: nn.Module, bands: int) -> None:
    """Make convolutions with kernels larger than 1x1 process an image in at most `bands` bands of rows."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.forward = _BandedConv2d(module, bands)  # type: ignore[method-assign, assignment]


@dataclass(frozen=True, eq=False)
class _BandedConv2d:
    """Computes a convolution in bands of rows to save memory."""

    conv: nn.Conv2d
    num_bands: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return the convolution of x, B C H W, computed band by band into one result tensor."""
        conv = self.conv
        pad_rows, pad_columns = (int(size) for size in conv.padding)  # number of zeros on each side
        num_rows = (x.shape[2] + 2 * pad_rows - conv.kernel_size[0]) // conv.stride[0] + 1  # of the result
        if num_rows < 2 * self.num_bands:  # too few: a band would have fewer than two rows
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        result: Tensor | None = None
        edges = [num_rows * band // self.num_bands for band in range(self.num_bands + 1)]
        for start, end in pairwise(edges):
            band = self._cut_rows(x, start, end, pad_rows)
            convolved = F.conv2d(band, conv.weight, conv.bias, conv.stride, (0, pad_columns))
            if result is None:  # the result's channels, dtype and device are only known now
                result = convolved.new_empty((*convolved.shape[:2], num_rows, convolved.shape[3]))
                if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
                    result = result.contiguous(memory_format=torch.channels_last)
            result[:, :, start:end] = convolved
        assert result is not None
        return result

    def _cut_rows(self, x: Tensor, start: int, end: int, pad_rows: int) -> Tensor:
        """Return the input rows that output rows `start` to `end` depend on, zero-padded outside of x."""
        height = x.shape[2]
        stride = self.conv.stride[0]
        first = start * stride - pad_rows
        last = (end - 1) * stride - pad_rows + self.conv.kernel_size[0]
        band = x[:, :, max(0, first) : min(height, last)]
        if first < 0 or last > height:
            band = F.pad(band, (0, 0, max(0, -first), max(0, last - height)))
        return band
