"""Released single-file (LDM) names for networks from folders in diffusers' layout."""

import re
from collections.abc import Collection, Iterator, Mapping

from networks.names.texts import open_clip_names
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.files import UNET, VAE
from stable_diffusion.names import (
    INPUT_AND_OUTPUT_LAYERS,
    RESNET_LAYERS,
    SDXL_EMBEDDING_LAYERS,
    unet_blocks,
    unet_samplers,
)
from stable_diffusion.text_checkpoints import CLIP_L, OPEN_CLIP, PROJECTION, SD1_TEXT, SD2_TEXT

# for each text encoder of a kind: the prefix of its names, and whether it is OpenCLIP
TEXT_ENCODER_PREFIXES: Mapping[ModelKind, tuple[tuple[str, bool], ...]] = {
    SD1: ((SD1_TEXT, False),),
    SD2: ((SD2_TEXT, True),),
    SDXL: ((CLIP_L, False), (OPEN_CLIP, True)),
}
VAE_LEVELS = 4  # resolutions of the VAE: 8 pixels become one latent pixel
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("proj_out", "to_out.0"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
)
_VAE_SHORTCUT = ("nin_shortcut", "conv_shortcut")


def ldm_unet_names(layers: list[int], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (LDM name, diffusers name) of each U-Net weight; LDM names are those of released single files.

    Args:
        layers: Number of residual blocks at each level of the down path.
        names: Diffusers names of the U-Net's weights.
    """
    # Map the diffusers path of each renamed module of a U-Net to its LDM path
    # Arguments are those of `ldm_unet_names`.
    ldm_paths: dict[str, str] = {}
    for ldm_path, diffusers_path in (*INPUT_AND_OUTPUT_LAYERS, *SDXL_EMBEDDING_LAYERS):
        ldm_paths[diffusers_path] = ldm_path
    for block in unet_blocks(layers):
        if block.is_attention:
            ldm_paths[block.diffusers_path] = block.ldm_path
            continue
        for ldm_layer, diffusers_layer in RESNET_LAYERS:
            ldm_paths[f"{block.diffusers_path}.{diffusers_layer}"] = f"{block.ldm_path}.{ldm_layer}"
    for sampler in unet_samplers(layers):  # a downsampler and an upsampler between two levels
        ldm_paths[sampler.downsampler] = sampler.ldm_downsampler
        # LDM numbers the modules of a block: with an attention, the upsampler is the third, else the second
        attentions = sampler.upsampler.replace("upsamplers.0.conv", "attentions.")
        has_attention = any(name.startswith(attentions) for name in names)
        ldm_paths[sampler.upsampler] = (
            sampler.ldm_upsampler if has_attention else sampler.ldm_upsampler_without_attention
        )
    for name in names:
        module_path = name  # drop last components until it is the path of a renamed module
        while module_path not in ldm_paths:
            module_path = module_path.rpartition(".")[0]
        yield f"{UNET}{ldm_paths[module_path]}{name.removeprefix(module_path)}", name


def _vae_path_pairs(num_levels: int) -> Iterator[tuple[str, str]]:
    """Yield (LDM path, diffusers path) of each VAE module whose paths differ; both end with a dot."""
    for side in ("encoder", "decoder"):
        yield f"{side}.norm_out.", f"{side}.conv_norm_out."
        for index in (0, 1):
            yield f"{side}.mid.block_{index + 1}.", f"{side}.mid_block.resnets.{index}."
        for ldm_path, diffusers_path in _VAE_ATTENTION:
            yield f"{side}.mid.attn_1.{ldm_path}.", f"{side}.mid_block.attentions.0.{diffusers_path}."
    for level in range(num_levels):
        # diffusers counts the decoder's levels from the smallest features, LDM from the largest
        diffusers_level = num_levels - 1 - level
        yield f"encoder.down.{level}.block.", f"encoder.down_blocks.{level}.resnets."
        yield f"encoder.down.{level}.downsample.", f"encoder.down_blocks.{level}.downsamplers.0."
        yield f"decoder.up.{level}.block.", f"decoder.up_blocks.{diffusers_level}.resnets."
        yield f"decoder.up.{level}.upsample.", f"decoder.up_blocks.{diffusers_level}.upsamplers.0."


def ldm_vae_name(name: str) -> str:
    """Return a VAE weight's published name."""
    ldm_shortcut, diffusers_shortcut = _VAE_SHORTCUT
    for ldm_path, diffusers_path in _vae_path_pairs(VAE_LEVELS):
        if name.startswith(diffusers_path):
            name = ldm_path + name.removeprefix(diffusers_path).replace(diffusers_shortcut, ldm_shortcut)
            break
    return f"{VAE}{name}"


def map_vae_names_to_diffusers(ldm_names: Collection[str], num_levels: int) -> dict[str, str]:
    """Map published VAE tensor names to diffusers' names, where the two differ.

    Args:
        ldm_names: Names of the tensors, without the prefix of a whole checkpoint.
        num_levels: Number of levels of the decoder.
    """
    ldm_shortcut, diffusers_shortcut = _VAE_SHORTCUT
    mapped = {}
    for ldm_path, diffusers_path in _vae_path_pairs(num_levels):
        for name in ldm_names:
            if name.startswith(ldm_path):
                mapped[name] = diffusers_path + name.removeprefix(ldm_path).replace(
                    ldm_shortcut, diffusers_shortcut
                )
    return mapped


def ldm_vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a VAE tensor's shape in a published file, in which attention weights are 1x1 convolutions."""
    is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    return (*shape, 1, 1) if is_attention and len(shape) == 2 else shape


def ldm_text_encoder_names(kind: ModelKind, index: int, names: Collection[str]) -> dict[str, list[str]]:
    """Map each tensor of a text encoder in a single file to the weights that it contains, by name.

    Only OpenCLIP's encoders fuse weights: its `in_proj` contains query, key and value.

    Args:
        kind: Kind of the checkpoint.
        index: Index of the encoder.
        names: Names of the encoder's weights in transformers.
    """
    prefix, is_open_clip = TEXT_ENCODER_PREFIXES[kind][index]
    if not is_open_clip:
        return {f"{prefix}text_model.{name}": [name] for name in names}
    not_in_layers = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"]
    fused_weights = {f"{prefix}{name}": _list_fused_weights(name) for name in not_in_layers}
    if PROJECTION in names:
        fused_weights[f"{prefix}text_projection"] = [PROJECTION]
    layer_pattern = re.compile(r"encoder\.layers\.(\d+)\.")
    layers = sorted({int(match[1]) for match in map(layer_pattern.match, names) if match})
    for layer in layers:
        fused_weights |= _map_open_clip_layer(prefix, layer, source_layer=layer)
    # released files have one more layer, which the model does not use: it gets the last one's weights
    if kind is SD2:
        fused_weights |= _map_open_clip_layer(prefix, layers[-1] + 1, source_layer=layers[-1])
    return fused_weights


_LAYER = ("ln_1.{}", "ln_2.{}", "mlp.c_fc.{}", "mlp.c_proj.{}", "attn.out_proj.{}", "attn.in_proj_{}")


def _map_open_clip_layer(prefix: str, layer: int, source_layer: int) -> dict[str, list[str]]:
    """Map each tensor of an OpenCLIP layer in a file to the weights of `source_layer` fused in it."""
    names = [leaf.format(parameter) for leaf in _LAYER for parameter in ("weight", "bias")]
    blocks = "transformer.resblocks"
    return {
        f"{prefix}{blocks}.{layer}.{name}": _list_fused_weights(f"{blocks}.{source_layer}.{name}")
        for name in names
    }


def _list_fused_weights(open_clip_name: str) -> list[str]:
    """Return the names of the CLIP weights that are fused in one of OpenCLIP's tensors."""
    return [name for name, _ in open_clip_names(open_clip_name)]
