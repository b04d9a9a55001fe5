"""Files of LTX-2's video VAE: recognize their dialects, read the list of layers from the tensors.

Module names are those of the official file, whose lists alternate residual blocks and resamplings. diffusers'
names are nested by level.

No tensor shows whether the decoder mirrors borders, looks ahead, or has shortcuts around its resamplings.
This is read from the settings in the file (metadata `config`) or in config.json next to it. Without settings
the release decides. A decoder with three resamplings, all in time and space, is LTX-2's: it mirrors borders
and has shortcuts. Any other is treated like LTX-2.3's: zeros at borders, no shortcuts. Both look ahead.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any, NamedTuple

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error, rename_sources
from checkpoints.opening import Checkpoint, list_tensor_sources
from ltx_2.released import read_settings, select_part
from ltx_2.video_vae_blocks import BlockGroup, CoderConfig, Factors, Resampling, VideoVaeConfig
from modules.errors import CheckpointError

STATISTICS = {  # statistics of latents: the file's name -> diffusers' and our names
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}
UNUSED = ("per_channel_statistics.*",)  # further statistics
FILES = "the official file of LTX-2 or LTX-2.3, its video VAE alone, or diffusers' folder vae"
FACTORS: dict[int, Factors] = {2: (2, 1, 1), 4: (1, 2, 2), 8: (2, 2, 2)}  # by the size of their blocks
Shape = Callable[..., tuple[int, ...]]  # name and number of axes of a tensor -> its shape
ZEROS, REFLECT = "zeros", "reflect"
DIFFUSERS_CLASS = "AutoencoderKLLTX2Video"
# tensors of LTX-2.5's additional decoder, which has neighborhood attention
_DIFFUSION_DECODER_PREFIXES = ("decoder.det_stages.", "decoder.diff_blocks.")
_TIMESTEP_TENSORS = re.compile(r"decoder\.(?:.+\.)?(?:last_)?(?:time_embedder|timestep_scale_multiplier)\b.*")
_LEVEL = re.compile(
    r"(?:en|de)coder\.(?:mid_block|(?:down|up)_blocks\.(\d+))\.(?:resnets|((?:down|up)samplers\.0))\.(.+)"
)


def read_video_vae(checkpoint: Checkpoint) -> LoadPlan[VideoVaeConfig]:
    """Plan how to load a video VAE of LTX-2 or LTX-2.3, from an official file or a diffusers folder.

    Raises CheckpointError for any other file.
    """
    checkpoint = select_part(checkpoint, "vae.")
    names = checkpoint.tensors
    sources = list_tensor_sources(checkpoint)
    rejection = make_wrong_kind_error(checkpoint, "a video VAE of LTX-2", "--vae", FILES)
    _reject_other_decoders(checkpoint)
    if "latents_mean" in names and "decoder.mid_block.resnets.0.conv1.conv.weight" in names:
        # diffusers numbers mid and up blocks separately; the official file has one list
        sources = rename_sources(sources, _translate_flat_names(names))
    elif "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" not in names:
        raise rejection
    sources = rename_sources(sources, lambda name: STATISTICS.get(name, name))
    shape = make_shape_reader(checkpoint, sources, rejection)
    encoder = _read_coder(shape, sources, "encoder", rejection)
    decoder = _read_coder(shape, sources, "decoder", rejection)
    # Add settings that no tensor shows; raise CheckpointError if the file's settings are invalid
    path = checkpoint.path
    settings = read_settings(checkpoint, "vae", DIFFUSERS_CLASS)
    try:
        encoder, decoder = _apply_settings(settings, encoder, decoder)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the settings of its VAE, in the file or in config.json next to it, cannot be used: "
            f"{error}. Pass {FILES} to --vae.",
            path,
        ) from error
    patch = isqrt(encoder.channels_in // 3)
    config = VideoVaeConfig(decoder.channels_in, patch, encoder, decoder)
    # the tensors must agree with the settings
    patch_width = shape("encoder.conv_in.conv.weight", 5)[1]
    if patch_width != 3 * config.patch**2:  # 3 colors for each pixel of a patch
        raise rejection
    if shape("decoder.conv_out.conv.weight", 5)[0] != patch_width or not _coders_fit(config):
        raise rejection
    return LoadPlan(config, checkpoint, sources, UNUSED)


def _reject_other_decoders(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the decoder is the diffusion decoder of LTX-2.5, or requires a timestep."""
    names = checkpoint.tensors
    if any(name.startswith(_DIFFUSION_DECODER_PREFIXES) for name in names):
        raise CheckpointError(
            f"{checkpoint.path} has the diffusion decoder of LTX-2.5, which is not supported. Pass "
            "ltx-2.5-video-vae-conv-bf16.safetensors to --vae: it decodes the same latents.",
            checkpoint.path,
        )
    if any(_TIMESTEP_TENSORS.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{checkpoint.path}: its decoder requires a timestep, as LTX-Video's does, which is not "
            f"supported. Pass {FILES} to --vae.",
            checkpoint.path,
        )


def _coders_fit(config: VideoVaeConfig) -> bool:
    """Return whether encoder and decoder fit each other, with matching widths at each resampling."""
    encoder, decoder = config.encoder, config.decoder
    return (
        encoder.width_out >= config.latent_channels
        and encoder.factors == decoder.factors
        and all(part.has_shortcut(True) for part in encoder.resamplings)
        and all(part.has_shortcut(False) for part in decoder.resamplings if part.is_residual)
    )


class _NestedLevel(NamedTuple):
    """Position of a residual block or resampling layer in diffusers' layout, which sorts in layer order."""

    coder: str  # encoder or decoder
    # index of its level; the middle block is the last level of the encoder, or the first of the decoder
    number: int
    # whether it is the second part of its level: resampling in the encoder, residual blocks in the decoder
    is_second: bool


def _read_level(match: re.Match[str]) -> _NestedLevel:
    """Parse a match of `_LEVEL` into the level of a nested module."""
    number, resampling, _ = match.groups()
    coder = match[0][: len("encoder")]
    is_encoder = coder == "encoder"
    middle = 1 << 30 if is_encoder else -1  # the middle block comes last in the encoder, first in the decoder
    is_resampling = resampling is not None
    return _NestedLevel(
        coder, middle if number is None else int(number), is_second=is_resampling == is_encoder
    )


def _translate_flat_names(names: Iterable[str]) -> Callable[[str], str]:
    """Return a function that translates diffusers' nested layer names to the official flat ones."""
    # The official names count residual blocks and resamplings of all levels in one list. A level's resampling
    # comes first in the decoder, last in the encoder.
    matches = [_LEVEL.fullmatch(name) for name in names]
    levels = sorted({_read_level(match) for match in matches if match})
    levels_by_coder = {
        coder: [level for level in levels if level.coder == coder] for coder in ("encoder", "decoder")
    }

    def translate(name: str) -> str:
        match = _LEVEL.fullmatch(name)
        if match is None:
            return name
        _, resampling, name_end = match.groups()
        level = _read_level(match)
        index = levels_by_coder[level.coder].index(level)  # in the flat list
        direction = "down" if level.coder == "encoder" else "up"
        start = f"{level.coder}.{direction}_blocks.{index}"
        return f"{start}.{name_end}" if resampling else f"{start}.res_blocks.{name_end}"

    return translate


def _read_coder(shape: Shape, names: Iterable[str], coder: str, rejection: CheckpointError) -> CoderConfig:
    """Return the layers of the encoder or the decoder; settings that no tensor shows are those of LTX-2.3."""
    # The factor of a resampling layer follows from its channels and those after it.
    names = frozenset(names)
    is_down = coder == "encoder"
    prefix = f"{coder}.{'down' if is_down else 'up'}_blocks"
    parts: list[BlockGroup | Resampling] = []
    width_out, last_width = shape(f"{coder}.conv_out.conv.weight", 5)[:2]
    width = last_width  # channels after the current part
    num_parts = count(names, rf"{re.escape(prefix)}\.\d+")
    # from the last part backward: a resampling layer's factor needs the width after it
    for index in reversed(range(num_parts)):
        name = f"{prefix}.{index}"
        if f"{name}.conv.conv.weight" not in names:
            # A group of residual blocks; raise `rejection` unless they have this width
            first_layer = f"{name}.res_blocks.0.conv1.conv.weight"  # LTX-Video 0.9 has other resamplings
            if first_layer not in names or shape(first_layer, 5)[1] != width:
                raise rejection
            parts.insert(0, BlockGroup(width, count(names, rf"{re.escape(name)}\.res_blocks\.\d+")))
        elif parts:
            resampling = _read_resampling(shape, name, width, is_down, rejection)
            parts.insert(0, resampling)
            width = resampling.width_in
        else:  # the last part has to be a group of blocks
            raise rejection
    width_in, channels_in = shape(f"{coder}.conv_in.conv.weight", 5)[:2]
    if width_in != width or not parts:
        raise rejection
    return CoderConfig(
        channels_in,
        width_in=width_in,
        parts=tuple(parts),
        last_width=last_width,
        width_out=width_out,
        is_causal=is_down,
    )


def _read_resampling(
    shape: Shape, name: str, width_out: int, is_down: bool, rejection: CheckpointError
) -> Resampling:
    """Return a resampling layer, whose factors follow from its convolution's and its own output channels."""
    convolved, width_in = shape(f"{name}.conv.conv.weight", 5)[:2]
    large, small = (width_out, convolved) if is_down else (convolved, width_out)
    ratio, remainder = divmod(large, small)
    if remainder or ratio not in FACTORS:
        raise rejection
    return Resampling(width_in, width_out, FACTORS[ratio], is_residual=is_down)


def _apply_settings(
    settings: Mapping[str, Any], encoder: CoderConfig, decoder: CoderConfig
) -> tuple[CoderConfig, CoderConfig]:
    """Return encoder and decoder dimensions with paddings, shortcuts and causality from the settings."""
    # the oldest release has three equal upsamplings
    is_ltx_2_0 = [part.factors for part in decoder.resamplings] == 3 * [FACTORS[8]]
    shortcuts = _read_shortcuts(settings, len(decoder.resamplings), is_ltx_2_0)
    encoder_mode = settings.get("encoder_spatial_padding_mode", ZEROS)
    # two settings of the decoder have two names in files; the second one takes precedence
    decoder_mode = settings.get("spatial_padding_mode", REFLECT if is_ltx_2_0 else ZEROS)
    decoder_mode = settings.get("decoder_spatial_padding_mode", decoder_mode)
    is_causal = settings.get("causal_decoder", False)
    is_causal = settings.get("decoder_causal", is_causal)
    modes = (encoder_mode, decoder_mode)
    has_all = len(shortcuts) == len(decoder.resamplings)
    if not {*modes} <= {ZEROS, REFLECT} or not has_all or type(is_causal) is not bool:
        raise ValueError(f"paddings {modes}, shortcuts {shortcuts}, causal decoder {is_causal}")
    encoder = replace(encoder, reflects=encoder_mode == REFLECT)
    # The decoder's parts, each resampling with or without its shortcut
    # The settings list shortcuts starting at the pixels, so the last one is that of the first part.
    remaining = list(shortcuts)
    result: list[BlockGroup | Resampling] = []
    for part in decoder.parts:
        if isinstance(part, Resampling):
            part = replace(part, is_residual=bool(remaining.pop()))
        result.append(part)
    decoder = replace(
        decoder,
        parts=tuple(result),
        reflects=decoder_mode == REFLECT,
        is_causal=is_causal,
    )
    return encoder, decoder


def _read_shortcuts(settings: Mapping[str, Any], num_resamplings: int, is_ltx_2_0: bool) -> Sequence[Any]:
    """Return whether each resampling of the decoder has a shortcut, in the order of the settings."""
    # `is_ltx_2_0` is true for the decoder of LTX-2, which has shortcuts by default.
    if "decoder_blocks" in settings:
        # [["res_x", {...}], ["compress_all", {"residual": true, ...}], ...]
        blocks = [dict(info) for kind, info in settings["decoder_blocks"] if kind.startswith("compress")]
        return [block.get("residual", False) for block in blocks]
    shortcuts = settings.get("upsample_residual", num_resamplings * [is_ltx_2_0])
    return num_resamplings * [shortcuts] if isinstance(shortcuts, bool) else shortcuts
