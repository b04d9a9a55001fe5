"""Files of MiniMax-H3's video VAE: recognize their dialects, read dimensions from the tensors.

Module names are those of the released file, whose rows of queries, keys and values are interleaved by head.
diffusers stores them separately, and the halves of the feed-forward's first layer in reverse order.

No tensor shows the strides of levels, the length of clips, or the statistics of latents. They come from
config.json in diffusers' folder; otherwise they are those of the release.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints.dialects import (
    DitShapes,
    LoadPlan,
    Names,
    join_parts,
    joined_shapes,
    make_wrong_kind_error,
    stack_heads,
)
from checkpoints.encoders import check_groups, declared_groups, declared_settings
from checkpoints.opening import Checkpoint, list_tensor_sources
from minimax_h3.released import LATENTS_MEAN, LATENTS_STD
from minimax_h3.video_vae_blocks import GROUPS, H3VaeLevel, H3VideoVaeConfig
from modules.errors import CheckpointError
from protocols.loading import TensorSource

FILES = (
    "video_vae/source/model.safetensors of MiniMaxAI/MiniMax-H3, minimax_h3_video_vae_fp16.safetensors of "
    "Comfy-Org, or diffusers' folder vae"
)
MODEL_KIND = "a video VAE of MiniMax-H3"
DIFFUSERS_CLASS = "AutoencoderKLMiniMaxH3"
UNUSED = ("decoder.mask_token",)  # a tensor that only the training of the VAE needs
_BLOCK = r"decoder\.transformer_blocks\.(\d+)"
DIFFUSERS: Names = (
    (
        r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv_shortcut\.(.+)",
        r"encoder.down.\1.block.\2.nin_shortcut.\3",
    ),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)", r"encoder.down.\1.downsample.\2"),
    (r"decoder\.proj_in\.(.+)", r"decoder.x_embedder.\1"),
    *(
        (rf"{_BLOCK}\.attn\.to_{letter}\.(.+)", rf"decoder.transformer_blocks.\1.attn.to_qkv.\2#{row}")
        for row, letter in enumerate("qkv")
    ),
    (rf"{_BLOCK}\.attn\.to_out\.0\.(.+)", r"decoder.transformer_blocks.\1.attn.to_out.\2"),
    (rf"{_BLOCK}\.ff\.net\.0\.proj\.(.+)", r"decoder.transformer_blocks.\1.ff.w1.\2"),
    (rf"{_BLOCK}\.ff\.net\.2\.(.+)", r"decoder.transformer_blocks.\1.ff.w2.\2"),
)


def read_video_vae(checkpoint: Checkpoint) -> LoadPlan[H3VideoVaeConfig]:
    """Plan how to load MiniMax-H3's video VAE; raise CheckpointError for any other file."""
    names = checkpoint.tensors
    stored = list_tensor_sources(checkpoint)
    stored_shapes = {name: info.shape for name, info in names.items()}
    has_encoder = "encoder.conv_in.weight" in names
    declared = _read_declared_info(checkpoint)
    # the released layout: queries, keys and values in one matrix, whose rows are reordered
    if has_encoder and "decoder.transformer_blocks.0.attn.to_qkv.weight" in names:
        # Sources with the fused matrix's rows reordered: all queries, then all keys, then all values
        stack = functools.partial(stack_heads, head_width=declared.head_width)
        sources = {
            name: source.with_step(stack) if ".attn.to_qkv." in name else source
            for name, source in stored.items()
        }
        shapes = stored_shapes
    # diffusers' layout: three matrices, which are joined to one
    elif has_encoder and "decoder.transformer_blocks.0.attn.to_q.weight" in names:
        sources = dict(_from_diffusers(stored))
        shapes = joined_shapes(stored_shapes, DIFFUSERS)
    else:
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, "--vae", FILES)
    return LoadPlan(_read_config(checkpoint, shapes, declared), checkpoint, sources, UNUSED)


def _from_diffusers(stored: Mapping[str, TensorSource]) -> Mapping[str, TensorSource]:
    """Return sources with the release's names: fused matrices, and gated halves in the release's order."""
    joined = join_parts(stored, DIFFUSERS)  # only to learn the names
    swapped = [name for name in joined if ".ff.w1." in name]
    return join_parts(stored, DIFFUSERS, swapped)


@dataclass(frozen=True)
class _DeclaredInfo:
    """Dimensions from config.json that tensors do not show; by default, the release's values."""

    time_strides: tuple[int, ...] = ()
    space_strides: tuple[int, ...] = ()
    head_width: int = 64
    rotary_fraction: float = 0.75
    clip_frames: int = 17
    num_dropped_latents: int = 3
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD


# key of config.json -> our field, and its numeric type
_KEYS: Mapping[str, tuple[str, type]] = {
    "temporal_downsample_factors": ("time_strides", int),
    "spatial_downsample_factors": ("space_strides", int),
    "decoder_attention_head_dim": ("head_width", int),
    "decoder_rope_dim_ratio": ("rotary_fraction", float),
    "clip_length": ("clip_frames", int),
    "token_drop": ("num_dropped_latents", int),
    "latents_mean": ("latents_mean", float),
    "latents_std": ("latents_std", float),
}


def _read_declared_info(checkpoint: Checkpoint) -> _DeclaredInfo:
    """Read the settings that the config.json next to the file declares."""
    path, settings = declared_settings(checkpoint, {DIFFUSERS_CLASS})
    info: dict[str, Any] = {}
    for key, (name, kind) in _KEYS.items():
        if key not in settings:
            continue
        value = settings[key]
        numbers = value if isinstance(value, list) else [value]
        is_list = isinstance(getattr(_DeclaredInfo, name), tuple)
        if is_list != isinstance(value, list) or not all(_is_number(number, kind) for number in numbers):
            raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, which is not possible.", path)
        info[name] = tuple(numbers) if is_list else value
    return _DeclaredInfo(**info)


def _is_number(value: Any, kind: type) -> bool:
    """Return whether a JSON value is a finite number, or for `int` an integer from 0 to 4096."""
    if type(value) is int:
        return 0 <= value <= 4096 if kind is int else True
    return kind is float and type(value) is float and math.isfinite(value)


def _read_config(
    checkpoint: Checkpoint, stored_shapes: Mapping[str, tuple[int, ...]], declared: _DeclaredInfo
) -> H3VideoVaeConfig:
    """Return the VAE's dimensions; raise CheckpointError if they do not match each other."""
    # `declared` are the settings that no tensor shows, from config.json.
    shapes = DitShapes(checkpoint.path, stored_shapes, "video VAE of MiniMax-H3")
    latent_channels = shapes.get_shape("post_quant_conv.weight", axes=5)[0]
    dim, channels = shapes.get_shape("decoder.x_embedder.weight")
    levels = _read_levels(shapes, declared)
    groups = declared_groups(checkpoint, {DIFFUSERS_CLASS}) or GROUPS
    check_groups(checkpoint, [level.width for level in levels], groups)
    config = H3VideoVaeConfig(
        levels=levels,
        latent_channels=latent_channels,
        dim=dim,
        head_width=declared.head_width,
        ffn_dim=shapes.get_shape("decoder.transformer_blocks.0.ff.w2.weight")[1],
        num_layers=shapes.count_blocks("decoder.transformer_blocks"),
        num_registers=shapes.get_shape("decoder.register_tokens", axes=3)[1],
        groups=groups,
        rotary_fraction=declared.rotary_fraction,
        clip_frames=declared.clip_frames,
        num_dropped_latents=declared.num_dropped_latents,
        latents_mean=declared.latents_mean,
        latents_std=declared.latents_std,
    )
    _check(checkpoint, config, channels, shapes.get_shape("decoder.proj_out.weight")[0])
    return config


def _read_levels(shapes: DitShapes, declared: _DeclaredInfo) -> tuple[H3VaeLevel, ...]:
    """Return the levels of the encoder, with strides from config.json or else from the tensor shapes."""
    # Without config.json each resampling halves height and width. All but the first one also halve time,
    # until the patches of the decoder have as many frames.
    prefixes = [f"encoder.down.{index}" for index in range(shapes.count_blocks("encoder.down"))]
    has_downsample = [f"{prefix}.downsample.conv.weight" in shapes.shapes for prefix in prefixes]
    space_strides = declared.space_strides or tuple(2 if has else 1 for has in has_downsample)
    time_strides = declared.time_strides or _infer_time_strides(shapes, has_downsample, space_strides)
    if not len(space_strides) == len(time_strides) == len(prefixes):
        raise CheckpointError(
            f"{shapes.path}: its config.json has strides of {len(space_strides)} and {len(time_strides)} "
            f"levels, but its encoder has {len(prefixes)}. Copy the folder again.",
            shapes.path,
        )
    levels = []
    for prefix, time_stride, space_stride in zip(prefixes, time_strides, space_strides, strict=True):
        width = shapes.get_shape(f"{prefix}.block.0.conv2.weight", axes=5)[0]
        levels.append(H3VaeLevel(width, shapes.count_blocks(f"{prefix}.block"), time_stride, space_stride))
    return tuple(levels)


def _infer_time_strides(
    shapes: DitShapes, has_downsample: Sequence[bool], space_strides: Sequence[int]
) -> tuple[int, ...]:
    """Return each level's stride in time, whose product is the number of frames in a patch of the decoder."""
    # It is 2 at each downsampling except the first one, until the product is reached.
    # decoder.proj_out makes the colors of a patch: 3 x frames x side x side
    patch_side = math.prod(space_strides)
    patch_frames = shapes.get_shape("decoder.proj_out.weight")[0] // (3 * patch_side**2)
    strides: list[int] = []
    is_after_first = False
    for has in has_downsample:
        halves_time = has and is_after_first and math.prod(strides) < patch_frames
        strides.append(2 if halves_time else 1)
        is_after_first = is_after_first or has
    return tuple(strides)


def _check(checkpoint: Checkpoint, config: H3VideoVaeConfig, channels: int, patch: int) -> None:
    """Raise CheckpointError if the VAE's encoder, decoder and latent statistics do not fit each other."""
    # `channels` is the number of inputs of the decoder, `patch` the number of outputs of its last layer.
    patch_width = 3 * config.time_stride * config.space_stride**2
    if config.head_width < 1 or config.dim % config.head_width:
        error = f"a decoder of width {config.dim} has no heads of {config.head_width}"
    elif channels != config.latent_channels:
        error = f"its decoder takes {channels} channels, but its latents have {config.latent_channels}"
    elif patch != patch_width:
        error = f"its decoder produces patches of width {patch}, but its encoder takes {patch_width}"
    elif not len(config.latents_mean) == len(config.latents_std) == config.latent_channels:
        error = (
            f"{len(config.latents_mean)} means and {len(config.latents_std)} deviations for "
            f"{config.latent_channels} latent channels: other VAEs than the release need "
            "latents_mean and latents_std in a config.json"
        )
    elif (
        config.clip_frames < 1 or config.num_dropped_latents >= config.clip_latents or 0 in config.latents_std
    ):
        error = (
            f"clips of {config.clip_frames} frames without the last {config.num_dropped_latents} latents are "
            "not possible"
        )
    else:
        return
    raise CheckpointError(
        f"{checkpoint.path}: {error}. Pass {FILES} to --vae.",
        checkpoint.path,
    )
