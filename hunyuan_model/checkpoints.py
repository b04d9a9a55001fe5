"""Checkpoints of the HunyuanVideo and SkyReels V1 transformers: their dialects, their kinds, and loading."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.containers import load_pickled
from checkpoints.dialects import (
    DitShapes,
    Names,
    find_dialect,
    join_parts,
    make_wrong_kind_error,
    translate_name,
)
from checkpoints.dits import DitFormat, DitHeader, bare_names
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from checkpoints.stored.fp8 import dequantize, make_fp8_weight
from hunyuan_model.configs import IMAGE_CHANNELS, HunyuanVideoConfig
from hunyuan_model.model import HunyuanVideoModel
from hunyuan_model.names import COMFYUI_TENSORS, HUNYUAN_VIDEO
from hunyuan_model.spec import DIT
from modules.errors import CheckpointError
from networks.names.layouts import swapped_tensors, tensor_patterns
from protocols.family import DitSpec
from protocols.loading import TensorSource

TABLE_MULTIPLE = 32  # a head width that 32 divides splits into whole pairs for frames, rows and columns

# diffusers' names -> the published ones. Source: checkpoints of hunyuanvideo-community/HunyuanVideo and
# Skywork/SkyReels-V1-*. A name that ends in #n is the nth of the parts that are stacked by rows in the
# published tensor.
FROM_DIFFUSERS: Names = (
    *tensor_patterns(HUNYUAN_VIDEO),
    (
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.(norm[12])\.(\w+)",
        r"txt_in.individual_token_refiner.blocks.\1.\2.\3",
    ),
)
# tensors in which diffusers stores scale before shift
SWAPPED = swapped_tensors(HUNYUAN_VIDEO)
CONFIG_TENSORS = {  # for `read_dimensions`
    "in_dim": "img_in.proj.weight",
    "num_heads": "double_blocks.0.img_attn_q_norm.weight",
    "ffn_dim": "double_blocks.0.img_mlp.fc1.weight",
    "refiner_blocks": "txt_in.individual_token_refiner.blocks",
    "refiner_ffn_dim": "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight",
    "text_dim": "txt_in.input_embedder.weight",
    "pooled_dim": "vector_in.in_layer.weight",
    "freq_dim": "time_in.mlp.0.weight",
    "out_dim": "final_layer.linear.weight",
}
DIALECTS: Mapping[str, tuple[str, Names]] = {  # dialect -> its first weight of queries, its tensor names
    "official": ("double_blocks.0.img_attn_qkv.weight", ()),
    "ComfyUI": ("double_blocks.0.img_attn.qkv.weight", COMFYUI_TENSORS),
    "diffusers": ("transformer_blocks.0.attn.add_q_proj.weight", FROM_DIFFUSERS),
}


# tensor that only this model has -> its name
RELATED_MODELS = {
    "clean_x_embedder.proj.weight": "a FramePack transformer",
    "image_projection.up.weight": "a FramePack transformer",
    "distilled_guidance_layer.in_proj.weight": "a Chroma transformer",
    "cond_type_embedding.weight": "a HunyuanVideo 1.5 transformer",
    "cond_type_embed.weight": "a HunyuanVideo 1.5 transformer",
    "byt5_in.fc1.weight": "a HunyuanImage 2.1 transformer",
    "time_r_in.mlp.0.weight": "a HunyuanImage 2.1 transformer",
}


def identify(path: Path) -> str | None:
    """Return a hint about a HunyuanVideo transformer file or a related one; None for other files."""
    try:
        with open_checkpoint(path) as checkpoint:
            bare = bare_names(checkpoint)
            related = _name_related_model(bare)
            if related is not None:
                return f"it looks like {related}"
            return f"it is {_name_model(_read_header(bare).config)} (--dit)"
    except CheckpointError:
        return None


def describe(checkpoint: Checkpoint) -> str | None:
    """Return the name of the model in an opened checkpoint, for another family's error message."""
    relative = _name_related_model(checkpoint)
    if relative is not None:
        return relative
    try:
        return _name_model(_read_header(checkpoint).config)
    except CheckpointError:
        return None


def _name_model(config: HunyuanVideoConfig) -> str:
    """Return the model's name; the two T2V models have the same tensors and share a name."""
    return (
        "the SkyReels V1 I2V transformer"
        if config.kind == "i2v"
        else "a HunyuanVideo or SkyReels V1 T2V transformer"
    )


def _read_header(checkpoint: Checkpoint) -> DitHeader[HunyuanVideoConfig]:
    """Read config and dialect of a checkpoint; raise CheckpointError for a variant that is not supported."""
    path = checkpoint.path
    names = checkpoint.tensors
    related = _name_related_model(checkpoint)
    if related is not None:
        raise CheckpointError(
            f"{path} is {related}, which is not supported here.\n  Pass a HunyuanVideo T2V or SkyReels V1 "
            "checkpoint to --dit.",
            path,
        )
    dialect = _find_dialect(names)
    if dialect is None:
        files = (
            "the transformer's checkpoint, such as mp_rank_00_model_states.pt or "
            "skyreels_hunyuan_i2v_bf16.safetensors,"
        )
        raise make_wrong_kind_error(checkpoint, "a HunyuanVideo or SkyReels V1 transformer", "--dit", files)
    query_weight, table = DIALECTS[dialect]
    file_shapes = {translate_name(name, table): info.shape for name, info in names.items()}
    shapes = DitShapes(path, file_shapes, "HunyuanVideo")
    dimensions = read_dimensions(shapes, DIT, CONFIG_TENSORS)
    has_guidance = "guidance_in.mlp.0.weight" in file_shapes
    config = HunyuanVideoConfig(**dimensions, has_guidance=has_guidance)
    _check_input_channels(config, path)
    return DitHeader(config, dialect, names[query_weight].dtype)


def _find_dialect(names: Collection[str]) -> str | None:
    """Return the naming scheme of a file with a token refiner, from its first query weight; else None."""
    return find_dialect(DIALECTS, names) if _has_refiner(names) else None


def _check_input_channels(config: HunyuanVideoConfig, path: Path) -> None:
    """Raise CheckpointError unless a model takes noisy latents, alone or followed by an image's latents."""
    if config.in_dim not in (config.out_dim, config.out_dim + IMAGE_CHANNELS):
        # HunyuanVideo-I2V has an image and a mask of one channel
        is_i2v = config.in_dim == 2 * config.out_dim + 1
        name = "HunyuanVideo-I2V" if is_i2v else "an unknown variant of HunyuanVideo"
        raise CheckpointError(
            f"{path} is {name} with {config.in_dim} input channels, which is not supported.\n"
            "  Pass a HunyuanVideo T2V or SkyReels V1 checkpoint to --dit.",
            path,
        )


def read_dimensions(shapes: DitShapes, spec: DitSpec, config_tensors: Mapping[str, str]) -> dict[str, Any]:
    """Read the dimensions that the configs of HunyuanVideo and FramePack share.

    Args:
        shapes: Shapes of the file's tensors.
        spec: Names inside the transformer.
        config_tensors: Tensor or list of blocks that shows each field of the config.

    Raises:
        CheckpointError: If a tensor is missing, or the width is not a multiple of the head width.
    """
    dim, in_dim, patch_size = shapes.patches(config_tensors["in_dim"])
    return {
        "dim": dim,
        **read_block_dimensions(shapes, spec, config_tensors, dim),
        "in_dim": in_dim,
        "out_dim": shapes.get_shape(config_tensors["out_dim"])[0] // math.prod(patch_size),
        "pooled_dim": shapes.get_shape(config_tensors["pooled_dim"])[1],
        "patch_size": patch_size,
    }


def read_block_dimensions(
    shapes: DitShapes, spec: DitSpec, config_tensors: Mapping[str, str], dim: int
) -> dict[str, int]:
    """Read the dimensions of the blocks and the token refiner, by field of the config.

    Args:
        shapes: Shapes of the file's tensors.
        spec: Names inside the transformer.
        config_tensors: Tensor or list of blocks that shows each field of the config.
        dim: Width of the model.

    Raises:
        CheckpointError: If a tensor is missing, or the width is not a multiple of the head width.
    """
    # the tensor is the norm of one head's queries or keys
    (head_width,) = shapes.get_shape(config_tensors["num_heads"], axes=1)
    if dim % head_width or head_width % TABLE_MULTIPLE:
        raise CheckpointError(
            f"{shapes.path}: width {dim} with heads of {head_width} is not a {shapes.model} transformer. The "
            f"head width must divide the width and be a multiple of {TABLE_MULTIPLE}.",
            shapes.path,
        )
    double_blocks, *single_blocks = spec.block_lists  # HunyuanVideo 1.5 has no single ones
    return {
        "num_heads": dim // head_width,
        "ffn_dim": shapes.get_shape(config_tensors["ffn_dim"])[0],
        "double_blocks": shapes.count_blocks(double_blocks),
        "single_blocks": sum(shapes.count_blocks(name) for name in single_blocks),
        "refiner_blocks": shapes.count_blocks(config_tensors["refiner_blocks"]),
        "refiner_ffn_dim": shapes.get_shape(config_tensors["refiner_ffn_dim"])[0],
        "text_dim": shapes.get_shape(config_tensors["text_dim"])[1],
        "freq_dim": shapes.get_shape(config_tensors["freq_dim"])[1],
    }


def _has_refiner(names: Iterable[str]) -> bool:
    """Return whether the names include a token refiner; FLUX has the same block names, but no refiner."""
    return any(
        name.startswith(("txt_in.individual_token_refiner.", "context_embedder.token_refiner."))
        for name in names
    )


def _name_related_model(checkpoint: Checkpoint) -> str | None:
    """Return the name of a related model, which has the same block names but other inputs; else None."""
    names = checkpoint.tensors
    for tensor, model in RELATED_MODELS.items():
        if tensor in names:
            return model
    patches = names.get("img_in.proj.weight")
    if patches is not None and len(patches.shape) == 4 and "double_blocks.0.img_mlp.fc1.weight" in names:
        return "a HunyuanImage 2.1 transformer"
    if "double_blocks.0.img_attn.qkv.weight" in names and not _has_refiner(names):
        return "a FLUX transformer"
    return None


def _make_sources(checkpoint: Checkpoint, header: DitHeader[HunyuanVideoConfig]) -> dict[str, TensorSource]:
    """Return how each published tensor is made from the file's tensors."""
    swapped = SWAPPED if header.dialect == "diffusers" else ()
    return join_parts(_scaled_sources(checkpoint, header), DIALECTS[header.dialect][1], swapped)


# Scales in a separate file, as for the official fp8 weights


def _scaled_sources(checkpoint: Checkpoint, header: DitHeader[HunyuanVideoConfig]) -> dict[str, TensorSource]:
    """Return the source of each tensor by its name in the file."""
    # Fp8 weights are multiplied by their scales.
    sources = list_tensor_sources(checkpoint)
    # only the released .pt file has its scales in a second file; safetensors without scales are plain casts
    if checkpoint.path.suffix != ".pt" or header.dialect != "official":
        return sources
    unscaled = []  # fp8 weights; a source with `build` already multiplies by a scale in the same file
    for name, source in sources.items():
        if checkpoint.tensors[name].dtype.itemsize == 1 and source.build is None:
            unscaled.append(name)
    if unscaled:
        # The file with the scales of a released fp8 file, and its scales by module path
        scales_path = checkpoint.path.with_name(f"{checkpoint.path.stem}_map.pt")
        if not scales_path.is_file():
            raise CheckpointError(
                f"{checkpoint.path} has fp8 weights whose scales are in {scales_path.name}, which is missing "
                "next to it.\n"
                "  Download that file too, or pass the bf16 checkpoint to --dit.",
                checkpoint.path,
            )
        scales = _read_scales(scales_path)
        for name in unscaled:
            scale = scales.get(name.removesuffix(".weight"))
            if scale is None:
                raise CheckpointError(
                    f"{scales_path} has no scale for {name}: it does not belong to {checkpoint.path}.",
                    checkpoint.path,
                )
            sources[name] = _scale_source(name, scale)
    return sources


def _read_scales(path: Path) -> dict[str, float]:
    """Read the scales of fp8 weights by module path. Raises CheckpointError for another file."""
    content: Any = load_pickled(path)
    try:
        return {str(name): float(value) for name, value in content.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a map of scales ({error}). Download or copy it again.", path
        ) from error


def _scale_source(name: str, scale: float) -> TensorSource:
    """Return the source of an fp8 weight whose file has a single scale for it."""

    def factor(weight: Tensor) -> Tensor:
        return torch.tensor([scale], device=weight.device)

    return TensorSource(
        (name,),
        lambda weight: dequantize(weight, factor(weight)),
        lambda weight: make_fp8_weight(weight, factor(weight)),
    )


FORMAT = DitFormat(_read_header, lambda header: _name_model(header.config), HunyuanVideoModel, _make_sources)
read_dit_header, load_dit = FORMAT.read_header, FORMAT.load
