"""Checkpoint files of Wan's VAEs: recognize dialect and generation, and read dimensions from tensors.

Our modules have the names of the official files, so these need no table. diffusers' names are a list of
(pattern, our name).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from math import isqrt
from pathlib import Path

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.kinds import UNSUPPORTED_MODELS
from checkpoints.opening import Checkpoint, list_tensor_sources
from modules.errors import CheckpointError
from protocols.data import LatentSpec
from protocols.loading import TensorInfo
from wan.configs import RELEASES, WAN_2_1, WAN_2_2
from wan.vae_blocks import FACTORS, VaeLayer, WanVaeConfig
from wan.vae_shortcuts import fits_shortcut

DIFFUSERS: Names = (
    (r"(encoder|decoder)\.conv_in\.(.+)", r"\1.conv1.\2"),
    (r"(encoder|decoder)\.norm_out\.(.+)", r"\1.head.0.\2"),
    (r"(encoder|decoder)\.conv_out\.(.+)", r"\1.head.2.\2"),
    (r"quant_conv\.(.+)", r"conv1.\1"),
    (r"post_quant_conv\.(.+)", r"conv2.\1"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", r"\1.middle.1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.middle.0.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.middle.2.\2"),
    (r"encoder\.down_blocks\.(.+)", r"encoder.downsamples.\1"),
)
DIFFUSERS_RESIDUAL: Names = (  # inside a numbered layer of a list
    (r"(.+\.\d+)\.norm1\.gamma", r"\1.residual.0.gamma"),
    (r"(.+\.\d+)\.conv1\.(weight|bias)", r"\1.residual.2.\2"),
    (r"(.+\.\d+)\.norm2\.gamma", r"\1.residual.3.gamma"),
    (r"(.+\.\d+)\.conv2\.(weight|bias)", r"\1.residual.6.\2"),
    (r"(.+\.\d+)\.conv_shortcut\.(weight|bias)", r"\1.shortcut.\2"),
)
# a layer of a level: of the decoder in Wan2.1, of both halves in Wan2.2
_LAYER = re.compile(r"(?:en|de)coder\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|\w+sampler(?:s\.0)?)\.(.+)")
_OFFICIAL_FIRST_LAYERS = {  # the encoder's first layer in Wan2.1, and in Wan2.2, where a stage contains it
    "encoder.downsamples.0.residual.2.weight",
    "encoder.downsamples.0.downsamples.0.residual.2.weight",
}
_Layer = tuple[str, int, int]  # down or up, level, index in it
_RESAMPLER = 1 << 30  # index of the resampler: after all residual blocks
_LAYER_LISTS = {"down": "encoder.downsamples", "up": "decoder.upsamples"}


def read_vae(
    checkpoint: Checkpoint,
    model: str = "a VAE of Wan2.1 or Wan2.2",
    files: str = "",
) -> LoadPlan[WanVaeConfig]:
    """Plan how to load a VAE of Wan2.1 or Wan2.2 from an official, ComfyUI or diffusers file.

    `model` and `files` describe, in error messages, the VAE needed and its released files (default: Wan's).

    Raises:
        CheckpointError: For any other file.
    """
    checkpoint = checkpoint.without_prefix(
        "first_stage_model.", "vae.", ignored_prefixes=("model.diffusion_model.", "text_encoders.")
    )
    names = checkpoint.tensors
    if "decoder.conv1.weight" in names and not _OFFICIAL_FIRST_LAYERS.isdisjoint(names):
        translate: Callable[[str], str] | None = str  # official names
    else:
        translate = _find_diffusers_translation(names)
    # related VAEs have layers of the same names
    is_unsupported = any(tensor in names for tensor, _ in UNSUPPORTED_MODELS)
    if translate is None or is_unsupported:
        wan_files = f"{WAN_2_1.files}; for TI2V-5B {WAN_2_2.files}"
        raise make_wrong_kind_error(checkpoint, model, "--vae", files or wan_files)
    sources = rename_sources(list_tensor_sources(checkpoint), translate)
    # the dimensions follow from the shapes
    shape = make_shape_reader(checkpoint, sources)
    latent_channels = shape("conv2.weight")[0]
    encoder = _read_layers(shape, sources, "encoder.downsamples")
    decoder = _read_layers(shape, sources, "decoder.upsamples")
    colors = shape("encoder.conv1.weight")[1]
    patch = isqrt(colors // 3)  # edge of a patch, whose pixels are channels
    config = WanVaeConfig(latent_channels, encoder, decoder, patch=patch, colors=colors // patch**2)
    _check_dimensions(config, colors, checkpoint.path)
    return LoadPlan(config, checkpoint, sources)


def _find_diffusers_translation(names: Mapping[str, TensorInfo]) -> Callable[[str], str] | None:
    """Return the function that converts diffusers' tensor names to official ones; None for another VAE."""
    quant_conv = names.get("quant_conv.weight")  # diffusers' name of `conv1`
    if quant_conv is None:
        return None
    if "encoder.down_blocks.0.conv1.weight" in names:
        return _translate_flat_names(names)
    has_time_axis = len(quant_conv.shape) != 4  # Qwen-Image-2.1's VAE has none
    if has_time_axis and "encoder.down_blocks.0.resnets.0.norm1.gamma" in names:
        # Translate diffusers' names of Wan2.2, whose levels are lists of layers.
        layers = {_read_layer(match) for match in map(_LAYER.fullmatch, names) if match}

        def number(layer: _Layer) -> str:
            half, level, index = layer
            in_level = [other for other in layers if other[:2] == (half, level)]
            num_before = sum(other_index < index for _, _, other_index in in_level)
            return f"{level}.{half}samples.{num_before}"

        return lambda name: _translate(name, number)
    return None


def check_latents(
    config: WanVaeConfig, latent: LatentSpec, path: Path, needed_by: str, files: str = ""
) -> None:
    """Raise CheckpointError if a model's latents belong to another VAE.

    Args:
        config: Dimensions of the given VAE.
        latent: Latent space of the model.
        path: The VAE's file.
        needed_by: What needs the latents, for the message, such as "--task ti2v-5B".
        files: Released files of the right VAE; "" for Wan's own.
    """
    release = RELEASES[latent.channels]
    has_alpha = config.colors == 4
    if config.latent_channels != latent.channels:
        difference = (
            f"is {RELEASES[config.latent_channels].description}; {needed_by} needs {release.description}"
        )
    elif has_alpha and not latent.has_alpha:
        difference = f"is a VAE for pixels with alpha; {needed_by} needs one without"
    elif latent.has_alpha and not has_alpha:
        difference = f"is a VAE for pixels without alpha; {needed_by} needs one with alpha"
    else:
        return
    raise CheckpointError(f"{path} {difference}.\n  Pass {files or release.files} to --vae.", path)


def _translate_flat_names(names: Iterable[str]) -> Callable[[str], str]:
    """Translate diffusers' names of Wan2.1, whose decoder has the layers of all levels in one list."""
    layers = sorted({_read_layer(match) for match in map(_LAYER.fullmatch, names) if match})
    numbers = {layer: index for index, layer in enumerate(layers)}
    return lambda name: _translate(name, lambda layer: str(numbers[layer]))


def _read_layer(match: re.Match[str]) -> _Layer:
    return match[1], int(match[2]), int(match[3] or _RESAMPLER)


def _translate(name: str, number: Callable[[_Layer], str]) -> str:
    match = _LAYER.fullmatch(name)
    if match is not None:
        name = f"{_LAYER_LISTS[match[1]]}.{number(_read_layer(match))}.{match[4]}"
    return translate_name(translate_name(name, DIFFUSERS), DIFFUSERS_RESIDUAL)


def _read_layers(
    shape: Callable[[str], tuple[int, ...]], names: Collection[str], start: str
) -> tuple[VaeLayer, ...]:
    """Read the layers of a list; Wan2.2 nests them in stages, each with a list of the same name."""
    # `shape` returns the shape of a tensor, `names` are all tensor names, `start` is the list's name.
    list_name = start.split(".")[-1]
    layers: list[VaeLayer] = []
    for index in range(count(names, rf"{re.escape(start)}\.\d+")):
        name = f"{start}.{index}"
        stage = _read_layers(shape, names, f"{name}.{list_name}")
        if stage:  # nested layers: kind and output width come from the last one, which resamples
            layers.append(VaeLayer(stage[-1].kind, stage[0].width_in, stage[-1].width_out, stage))
            continue
        kind = "residual"
        weight = f"{name}.residual.2.weight"
        if f"{name}.resample.1.weight" in names:
            kind = "temporal" if f"{name}.time_conv.weight" in names else "spatial"
            weight = f"{name}.resample.1.weight"
        width_out, width_in = shape(weight)[:2]
        layers.append(VaeLayer(kind, width_in, width_out))
    return tuple(layers)


def _check_dimensions(config: WanVaeConfig, colors: int, path: Path) -> None:
    """Raise CheckpointError unless a VAE has the channels and the strides of a released one."""
    # `colors` is the number of inputs of the first layer.
    release = RELEASES.get(config.latent_channels)
    if release is None:
        raise _make_vae_error(path, f"has {config.latent_channels} latent channels")
    has_alpha = config.colors == 4 and config.patch == 1  # the VAE of Qwen-Image-Layered
    if colors != 3 * config.patch**2 and not has_alpha:
        raise _make_vae_error(path, f"takes {colors} channels")
    frame_stride, pixel_stride, _ = release.stride
    for half, layers in (("encoder", config.encoder), ("decoder", config.decoder)):
        time_factor = 1
        space_factor = config.patch  # pixels of a patch are folded into channels first
        for layer in layers:
            layer_frames, layer_rows, _ = FACTORS[layer.kind]
            time_factor *= layer_frames
            space_factor *= layer_rows
        if (time_factor, space_factor) != (frame_stride, pixel_stride):
            raise CheckpointError(
                f"{path}: its {half} scales time by {time_factor} and space by {space_factor}, the one of "
                f"{release.name} by {frame_stride} and {pixel_stride}. The file contains another model, or "
                f"tensors are missing.\n  Pass {release.files} to --vae.",
                path,
            )
        # stages of Wan2.2; checked after the scales, because that check names what is missing
        stages = [layer for layer in layers if layer.layers]
        if stages:
            _check_shortcuts(stages, release.files, path, is_down=half == "encoder")


def _check_shortcuts(stages: Iterable[VaeLayer], files: str, path: Path, is_down: bool) -> None:
    """Raise CheckpointError if a stage has layers or channels that do not allow a shortcut around it."""
    # `files` are the released ones, for the message.
    for stage in stages:
        if not _has_shortcut(stage, is_down):
            raise CheckpointError(
                f"{path}: a stage from {stage.width_in} to {stage.width_out} channels cannot have "
                f"a shortcut. The file contains another model.\n  Pass {files} to --vae.",
                path,
            )


def _make_vae_error(path: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: this VAE {difference}; known are {WAN_2_1.description} and {WAN_2_2.description}.\n"
        f"  Pass {WAN_2_1.file} or {WAN_2_2.file} to --vae.",
        path,
    )


def _has_shortcut(stage: VaeLayer, is_down: bool) -> bool:
    if any(layer.kind != "residual" for layer in stage.layers[:-1]):
        return False  # only the last layer may resample
    if stage.kind == "residual" and not is_down:
        return True  # it needs none
    return fits_shortcut(stage.width_in, stage.width_out, FACTORS[stage.kind], is_down)
