"""Files of LTX-2's audio VAE and vocoders: recognise their dialects, read sizes from the tensors.

The networks are classes of diffusers; their settings are read here. Names are diffusers', the official file's
are translated. Strides of a vocoder are in no tensor: in all releases they follow from the kernel sizes.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ltx_2.released import own_part
from ltx_2.vae_checkpoints import STATISTICS, UNUSED
from modules.checkpoints.dialects import LoadPlan, count, other_kind, rename_sources, shapes_of
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

JOINED = 4  # mel frames of one latent frame, mel bins of one latent bin
LEVELS = 3  # resolutions of the audio VAE: two steps that join two
FILES = "the official file of LTX-2 or LTX-2.3, its sound alone, or diffusers' folder"
VOCODER = (  # parts of names: official -> diffusers
    (r"\bconv_pre\b", "conv_in"),
    (r"\bconv_post\b", "conv_out"),
    (r"\bact_post\b", "act_out"),
    (r"\bups\b", "upsamplers"),
    (r"\bresblocks\b", "resnets"),
    (r"\bdownsample\.lowpass\b", "downsample"),
)
UPSAMPLINGS = {16: 6, 15: 5, 12: 6, 11: 5, 8: 2, 4: 2}  # kernel size -> stride, in LTX-2 and LTX-2.3
DILATIONS = (1, 3, 5)
Settings = Mapping[str, Any]  # of a class of diffusers
Shape = Callable[..., tuple[int, ...]]


def read_sound_vae(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load the audio VAE of LTX-2 or LTX-2.3: official file, or diffusers' layout.

    option: that named the file. Raises CheckpointError for any other file.
    """
    checkpoint = own_part(checkpoint, "audio_vae.")
    sources = rename_sources(plain_sources(checkpoint), lambda name: STATISTICS.get(name, name))
    refusal = other_kind(checkpoint, "an audio VAE of LTX-2", option, f"{FILES} audio_vae")
    if "encoder.mid.block_1.conv1.conv.weight" not in sources or "latents_mean" not in sources:
        raise refusal
    shape = shapes_of(checkpoint, sources, refusal)
    base, sides = shape("encoder.conv_in.conv.weight")[:2]
    levels = range(count(sources, r"encoder\.down\.\d+"))
    latents = shape("decoder.conv_in.conv.weight")[1]
    (values,) = shape("latents_mean", 1)
    if len(levels) != LEVELS or values % latents:
        raise refusal
    widths = [shape(f"encoder.down.{level}.block.0.conv1.conv.weight")[0] for level in levels]
    settings = {
        "base_channels": base,
        "ch_mult": tuple(width // base for width in widths),
        "num_res_blocks": count(sources, r"encoder\.down\.0\.block\.\d+"),
        "in_channels": sides,
        "output_channels": shape("decoder.conv_out.conv.weight")[0],
        "latent_channels": latents,
        "mel_bins": JOINED * values // latents,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in sources,
        "norm_type": "pixel",
        "causality_axis": "height",  # no latent depends on later sound
    }
    return LoadPlan(settings, checkpoint, sources, UNUSED)


def read_vocoder(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load the vocoder of LTX-2 or LTX-2.3: official file, or diffusers' layout.

    option: that named the file. The settings are those of a vocoder with bandwidth extension if they have
    `bwe_in_channels`. Raises CheckpointError for any other file.
    """
    checkpoint = own_part(checkpoint, "vocoder.")
    sources = rename_sources(plain_sources(checkpoint), _vocoder_name)
    refusal = other_kind(checkpoint, "a vocoder of LTX-2", option, f"{FILES} vocoder")
    shape = shapes_of(checkpoint, sources, refusal)
    if "upsamplers.0.weight" in sources:
        return LoadPlan(
            {**_generator(shape, sources, "", refusal), "final_act_fn": "tanh"}, checkpoint, sources
        )
    if "vocoder.upsamplers.0.weight" not in sources or "mel_stft.mel_basis" not in sources:
        raise refusal
    window = shape("mel_stft.stft_fn.forward_basis", 3)[2]
    settings = {
        **_generator(shape, sources, "vocoder.", refusal),
        # as in the official code; diffusers' own settings leave the waveform unlimited here
        "final_act_fn": "clamp",
        **{
            f"bwe_{name}": value
            for name, value in _generator(shape, sources, "bwe_generator.", refusal).items()
        },
        "bwe_final_act_fn": None,
        "filter_length": window,
        "window_length": window,
        "num_mel_channels": shape("mel_stft.mel_basis", 2)[0],
    }
    return LoadPlan(settings, checkpoint, sources)


def _vocoder_name(name: str) -> str:
    for official, ours in VOCODER:
        name = re.sub(official, ours, name)
    return name


def _generator(shape: Shape, names: Collection[str], start: str, refusal: CheckpointError) -> dict[str, Any]:
    """Read the settings of one generator of waveforms."""
    ups = range(count(names, rf"{re.escape(start)}upsamplers\.\d+"))
    kernels = [shape(f"{start}upsamplers.{index}.weight", 3)[2] for index in ups]
    blocks = count(names, rf"{re.escape(start)}resnets\.\d+") // max(1, len(ups))
    if not kernels or not set(kernels) <= set(UPSAMPLINGS):
        raise refusal
    hidden, taken = shape(f"{start}conv_in.weight", 3)[:2]
    is_snake = f"{start}resnets.0.acts1.0.act.alpha" in names
    return {
        "in_channels": taken,
        "hidden_channels": hidden,
        "out_channels": shape(f"{start}conv_out.weight", 3)[0],
        "upsample_kernel_sizes": kernels,
        "upsample_factors": [UPSAMPLINGS[kernel] for kernel in kernels],
        "resnet_kernel_sizes": [
            shape(f"{start}resnets.{block}.convs1.0.weight", 3)[2] for block in range(blocks)
        ],
        "resnet_dilations": [list(DILATIONS)] * blocks,
        "act_fn": "snakebeta" if is_snake else "leaky_relu",
        "antialias": is_snake,
        "final_bias": f"{start}conv_out.bias" in names,
    }
