"""Files of LTX-2's video VAE: recognise their dialects, read the list of layers from the tensors.

Our modules have the names of the official file, whose lists hold residual blocks and resamplings in turn.
diffusers' names are nested by level.

Three facts are in no tensor: whether the decoder mirrors borders, looks ahead, and has shortcuts around its
resamplings. They come from the settings in the file (metadata `config`) or in config.json beside it, else
from the release, which the decoder's list tells: three resamplings, all in time and space, are LTX-2's, whose
decoder mirrors borders and has shortcuts; others are like LTX-2.3's, with zeros and without shortcuts. Both
decoders look ahead.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isqrt

from ltx_2.released import own_part, read_settings
from ltx_2.video_vae_blocks import BlockGroup, Factors, HalfConfig, Resampling, VideoVaeConfig
from modules.checkpoints.dialects import LoadPlan, count, other_kind, rename_sources, shapes_of
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

STATISTICS = {  # of latents: the file's name -> diffusers' and ours
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}
UNUSED = ("per_channel_statistics.*",)  # further statistics
FILES = "the official file of LTX-2 or LTX-2.3, its video VAE alone, or diffusers' folder vae"
FACTORS: dict[int, Factors] = {2: (2, 1, 1), 4: (1, 2, 2), 8: (2, 2, 2)}  # by the size of their blocks
ZEROS, REFLECT = "zeros", "reflect"
DIFFUSERS_CLASS = "AutoencoderKLLTX2Video"
# of the decoder with neighbourhood attention that LTX-2.5 has beside the usual one
_DIFFUSION = ("decoder.det_stages.", "decoder.diff_blocks.")
_TIMED = re.compile(r"decoder\.(?:.+\.)?(?:last_)?(?:time_embedder|timestep_scale_multiplier)\b.*")
_LEVEL = re.compile(
    r"(?:en|de)coder\.(?:mid_block|(?:down|up)_blocks\.(\d+))\.(?:resnets|((?:down|up)samplers\.0))\.(.+)"
)


def read_video_vae(checkpoint: Checkpoint) -> LoadPlan[VideoVaeConfig]:
    """Plan how to load a video VAE of LTX-2 or LTX-2.3: official file, or diffusers' layout.

    Raises CheckpointError for any other file.
    """
    checkpoint = own_part(checkpoint, "vae.")
    names, sources = checkpoint.tensors, plain_sources(checkpoint)
    refusal = other_kind(checkpoint, "a video VAE of LTX-2", "--vae", FILES)
    if any(name.startswith(_DIFFUSION) for name in names):
        raise CheckpointError(
            f"{checkpoint.path} has the diffusion decoder of LTX-2.5, which is not supported. Give "
            "ltx-2.5-video-vae-conv-bf16.safetensors to --vae: it decodes the same latents.",
            checkpoint.path,
        )
    if any(map(_TIMED.fullmatch, names)):
        raise CheckpointError(
            f"{checkpoint.path}: its decoder takes a time step, as LTX-Video's does, which is not supported. "
            f"Give {FILES} to --vae.",
            checkpoint.path,
        )
    if "latents_mean" in names and "decoder.mid_block.resnets.0.conv1.conv.weight" in names:
        sources = rename_sources(sources, _flat_names(names))
    elif "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" not in names:
        raise refusal
    sources = rename_sources(sources, lambda name: STATISTICS.get(name, name))
    shape = shapes_of(checkpoint, sources, refusal)
    encoder = _half(shape, sources, "encoder", refusal)
    config = _with_facts(checkpoint, encoder, _half(shape, sources, "decoder", refusal))
    colours = shape("encoder.conv_in.conv.weight", 5)[1]
    if (
        colours != 3 * config.patch**2
        or shape("decoder.conv_out.conv.weight", 5)[0] != colours
        or config.encoder.width_out < config.latent_channels
        or config.encoder.factors != config.decoder.factors
        or not all(part.has_shortcut(True) for part in config.encoder.resamplings)
        or not all(part.has_shortcut(False) for part in config.decoder.resamplings if part.is_residual)
    ):
        raise refusal
    return LoadPlan(config, checkpoint, sources, UNUSED)


def _flat_names(names: Iterable[str]) -> Callable[[str], str]:
    """Translate diffusers' names: a level's resampling comes first in the decoder, last in the encoder."""

    def key(found: re.Match[str]) -> tuple[str, int, bool]:
        half = found[0][:7]
        middle = 1 << 30 if half == "encoder" else -1
        is_second = (found[2] is None) == (half == "decoder")
        return half, middle if found[1] is None else int(found[1]), is_second

    places = sorted({key(found) for found in map(_LEVEL.fullmatch, names) if found})

    def translate(name: str) -> str:
        found = _LEVEL.fullmatch(name)
        if found is None:
            return name
        place = key(found)
        index = [one for one in places if one[0] == place[0]].index(place)
        start = f"{place[0]}.{'down' if place[0] == 'encoder' else 'up'}_blocks.{index}"
        return f"{start}.{found[3]}" if found[2] else f"{start}.res_blocks.{found[3]}"

    return translate


def _half(
    shape: Callable[..., tuple[int, ...]], names: Iterable[str], half: str, refusal: CheckpointError
) -> HalfConfig:
    """Read the encoder or the decoder; what is in no tensor is as in LTX-2.3's.

    By how much a resampling changes resolution follows from its channels and those behind it.
    """
    names, is_down = frozenset(names), half == "encoder"
    start = f"{half}.{'down' if is_down else 'up'}_blocks"
    parts: list[BlockGroup | Resampling] = []
    width_out, last_width = shape(f"{half}.conv_out.conv.weight", 5)[:2]
    width = last_width  # behind the part that is read
    for index in reversed(range(count(names, rf"{re.escape(start)}\.\d+"))):
        name = f"{start}.{index}"
        if f"{name}.conv.conv.weight" in names:
            convolved, width_in = shape(f"{name}.conv.conv.weight", 5)[:2]
            large, small = (width, convolved) if is_down else (convolved, width)
            if not parts or large % small or large // small not in FACTORS:
                raise refusal
            parts.insert(0, Resampling(width_in, width, FACTORS[large // small], is_residual=is_down))
            width = width_in
        else:
            first = f"{name}.res_blocks.0.conv1.conv.weight"  # LTX-Video 0.9 has other resamplings
            if first not in names or shape(first, 5)[1] != width:
                raise refusal
            blocks = count(names, rf"{re.escape(name)}\.res_blocks\.\d+")
            parts.insert(0, BlockGroup(width, blocks))
    width_in, taken = shape(f"{half}.conv_in.conv.weight", 5)[:2]
    if width_in != width or not parts:
        raise refusal
    return HalfConfig(taken, width_in, tuple(parts), last_width, width_out, is_causal=is_down)


def _with_facts(checkpoint: Checkpoint, encoder: HalfConfig, decoder: HalfConfig) -> VideoVaeConfig:
    """Add what is in no tensor. Raises CheckpointError if the file's settings cannot be used."""
    path, told = checkpoint.path, read_settings(checkpoint, "vae", DIFFUSERS_CLASS)
    ups = decoder.resamplings
    is_first = [part.factors for part in ups] == 3 * [FACTORS[8]]
    try:
        shortcuts = told.get("upsample_residual", len(ups) * [is_first])
        if "decoder_blocks" in told:  # [["res_x", {...}], ["compress_all", {"residual": true, ...}], ...]
            blocks = [dict(told) for kind, told in told["decoder_blocks"] if kind.startswith("compress")]
            shortcuts = [block.get("residual", False) for block in blocks]
        elif isinstance(shortcuts, bool):
            shortcuts = len(ups) * [shortcuts]
        modes = (
            told.get("encoder_spatial_padding_mode", ZEROS),
            told.get(
                "decoder_spatial_padding_mode",
                told.get("spatial_padding_mode", REFLECT if is_first else ZEROS),
            ),
        )
        is_causal = told.get("decoder_causal", told.get("causal_decoder", False))
        given = iter([bool(one) for one in reversed(shortcuts)])  # listed from the pixels on
        parts = tuple(
            replace(part, is_residual=next(given)) if isinstance(part, Resampling) else part
            for part in decoder.parts
        )
        if not {*modes} <= {ZEROS, REFLECT} or len(shortcuts) != len(ups) or type(is_causal) is not bool:
            raise ValueError(f"paddings {modes}, shortcuts {shortcuts}, causal decoder {is_causal}")
    except (ValueError, TypeError, AttributeError, StopIteration, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the settings of its VAE, in the file or in config.json beside it, cannot be used: "
            f"{error}. Give {FILES} to --vae.",
            path,
        ) from error
    return VideoVaeConfig(
        decoder.taken,
        isqrt(encoder.taken // 3),
        replace(encoder, reflects=modes[0] == REFLECT),
        replace(decoder, parts=parts, reflects=modes[1] == REFLECT, is_causal=is_causal),
    )
